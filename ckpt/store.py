"""One small object store over fsspec, with a create-if-absent that is complete at once.

The journal and the checkpoints need four things of a store: an object is there entirely or not at all, the
second creation of a key is refused, ranges can be read, and listings are never stale. A directory gives them
by `os.link` (a plain `open("xb")` shows an empty file, and a kill there leaves it for ever), S3 by
`If-None-Match: *`. Anything else may try: `Store.prove` finds out before a run relies on it.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ckpt import s3
from ckpt.files import ABSENT, TEMPORARY, Files
from ckpt.remote import Remote

CREATE_TRIES = 3
PROBES = 4  # creators that race in `prove`

_PART = re.compile(r"[A-Za-z0-9_.=+@-]{1,255}")
_LOST_SLASH = re.compile(r"[a-z][a-z0-9+.-]*:/(?!/)")  # s3:/bucket would be a directory named 's3:'


class StoreError(OSError):
    """The store did not do what was asked; one sentence that names the store and the key."""


class MissingError(StoreError, FileNotFoundError):
    """There is no object of this key."""


def check_key(key: str) -> str:
    """Return `key` if it is a relative posix path of plain ASCII names, without '..'; else StoreError."""
    parts = key.split("/")
    plain = all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)
    if not plain or parts[0] == TEMPORARY or len(key) > 1000:
        raise StoreError(
            f"{key[:200]!r} is not a key: use names of letters, digits and _.=+@- between '/', without '..'"
        )
    return key


Buffer = bytes | memoryview


class Backend(Protocol):
    """What differs between stores. Absent keys raise FileNotFoundError, other failures whatever they are."""

    def create(self, key: str, data: bytes) -> None:
        """Raise if the key exists, or if the outcome is unknown."""
        ...

    def write(self, key: str, data: bytes) -> None: ...

    def read(self, key: str, start: int, stop: int | None) -> Buffer: ...

    def size(self, key: str) -> int: ...

    def delete(self, key: str) -> None: ...

    def find(self, folder: str) -> Iterator[str]:
        """All keys under the folder ('' is the whole store), in any order."""
        ...

    def modified(self, folder: str) -> Iterator[tuple[str, float]]:
        """As find, with the second at which the store says that the object was written."""
        ...

    def sweep(self) -> None:
        """Remove what killed processes left behind."""
        ...


class Store:
    """Objects of bytes under relative keys, at a directory or any fsspec URL (`s3://bucket/prefix`).

    Safe to use from several threads. Every failure is a StoreError; an absent object is its subclass
    MissingError (also a FileNotFoundError).
    """

    def __init__(self, url: str):
        self._backend, self.url = _open(url)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def create(self, key: str, data: bytes) -> bool:
        """Create an object, complete at once, unless the key exists. True: it is there with these bytes.

        A refusal, a time-out or an error mean that the outcome is unknown (a client's own retry turns success
        into 412), so the object is read back and compared: contents that must not be confused need a nonce.
        StoreError leaves the outcome open (a delayed request may still land); creating the same bytes again
        is always safe.
        """
        check_key(key)
        failure: StoreError | None = None
        for attempt in range(CREATE_TRIES):
            if attempt:
                time.sleep(0.1 * 2**attempt)  # 409: another conditional request is under way
            try:
                with self._errors("create", key):
                    self._backend.create(key, data)
                return True
            except StoreError as error:
                failure = error
            held = self._holds(key, data)
            if held is not None:
                return held
        raise StoreError(f"{failure} ({CREATE_TRIES} tries; it may or may not have been created)") from failure

    def _holds(self, key: str, data: bytes) -> bool | None:
        """Whether the object has exactly these bytes; None where that cannot be told."""
        try:
            return self.size(key) == len(data) and self.read(key) == data
        except StoreError:
            return None

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object, fewer where it ends before; MissingError if there is none."""
        first = start or 0
        if first < 0 or (stop is not None and stop < first):
            raise ValueError(f"[{start}, {stop}) is not a range of bytes")
        return bytes(self._read(key, first, stop))

    def view(self, key: str, start: int, stop: int) -> memoryview:
        """As `read`, of memory as the client got it: what is large need not be copied."""
        return memoryview(self._read(key, start, stop)).cast("B")

    def _read(self, key: str, first: int, stop: int | None) -> Buffer:
        with self._errors("read", check_key(key)):
            if first == stop:
                return b""
            try:
                return self._backend.read(key, first, stop)
            except Exception:
                # S3 answers a range that begins beyond the end by an error (416).
                if first and self._backend.size(key) <= first:
                    return b""
                raise

    def size(self, key: str) -> int:
        """Bytes of an object; raise MissingError if there is none."""
        with self._errors("look at", check_key(key)):
            return self._backend.size(key)

    def exists(self, key: str) -> bool:
        """Whether there is an object of exactly this key (a folder is not one)."""
        try:
            self.size(key)
        except MissingError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Sorted keys of all objects in the folder `prefix` and below; '' is the whole store."""
        folder = prefix.rstrip("/")
        if folder:
            check_key(folder)
        with self._errors("list", folder or "it"):
            try:
                return sorted(key for key in self._backend.find(folder) if _is_key(key))
            except ABSENT:
                return []

    def clock(self) -> float:
        """What the store's own clock says, s since 1970: of an object that is written to read that."""
        probe = f"probe/{uuid.uuid4().hex}"
        self.write(probe, b"")
        try:
            with self._errors("list", probe):
                return dict(self._backend.modified("probe"))[probe]
        finally:
            self.delete(probe)

    def ages(self, folder: str) -> dict[str, float]:
        """All keys in the folder and below, and how many seconds ago each was written, by the store's own clock: the object
        that is written to read that is at least as young as all others."""
        now = self.clock()
        with self._errors("list", check_key(folder)):
            try:
                return {key: now - when for key, when in self._backend.modified(folder) if _is_key(key)}
            except ABSENT:
                return {}

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object at once; the last writer wins."""
        with self._errors("write", check_key(key)):
            self._backend.write(key, data)

    def delete(self, key: str) -> None:
        """Remove an object; none is fine."""
        with suppress(MissingError), self._errors("delete", check_key(key)):
            self._backend.delete(key)

    def prove(self) -> None:
        """Raise StoreError unless this store refuses a second creation, of a race and afterwards.

        Works on a key of its own under `probe/` and removes it. Also sweeps temporary files that killed
        processes left.
        """
        key = f"probe/{uuid.uuid4().hex}"
        refuses = self._refuses_a_second(key)
        self.delete(key)
        if not refuses:
            raise StoreError(
                f"{self.url} does not refuse to create an object twice, so two regions could both win: "
                f"set run.store to a directory with hard links or to S3 with If-None-Match"
            )
        with self._errors("sweep", TEMPORARY):
            self._backend.sweep()

    def _refuses_a_second(self, key: str) -> bool:
        """Race some creators (fsspec's own fallback looks first and then writes), then try once more."""
        *racing, late = [f"{key} {number}\n".encode() for number in range(PROBES + 1)]
        with ThreadPoolExecutor(PROBES) as pool:
            won = list(pool.map(lambda data: self.create(key, data), racing))
        if won.count(True) != 1 or self.create(key, late):
            return False
        return self.read(key) == racing[won.index(True)]

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        """Turn whatever a backend raises into one sentence; nothing is swallowed."""
        try:
            yield
        except StoreError:
            raise
        except ABSENT as error:
            raise MissingError(f"{self.url}: cannot {verb} {key}: there is none ({_brief(error)})") from error
        except Exception as error:  # clients raise their own families of errors: botocore's are no OSError
            raise StoreError(f"{self.url}: cannot {verb} {key}: {_brief(error)}") from error


def _open(url: str) -> tuple[Backend, str]:
    if not url or "::" in url or _LOST_SLASH.match(url):
        raise StoreError(f"{url!r} is not a store: give a directory or one fsspec URL such as s3://bucket/run")
    try:
        # Listings are cached by s3fs: an object of another writer would stay invisible.
        fs, root = url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError, OSError) as error:
        raise StoreError(f"{url!r} is not a store: {_brief(error)}") from error
    if isinstance(fs, LocalFileSystem):
        return Files(root), root
    if not root.strip("/"):
        raise StoreError(f"{url!r} is not a store: name the bucket or the folder, as in s3://bucket/run")
    return s3.backend(url, root) or Remote(fs, root), url.rstrip("/")


def _is_key(key: str) -> bool:
    try:
        check_key(key)
    except StoreError:
        return False
    return True


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
