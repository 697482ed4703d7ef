"""Chunks of shards in object storage, on this machine's disk: all processes of the machine share them.

A chunk is fetched when somebody reads it, by one process: others that want it wait for its lock, which ends with its holder.
It is checked against the index before it gets its name, and again by every process that meets it, which maps it into its memory.
What was not read for longest goes first when the directory is full; whoever has it mapped reads on.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from ckpt.store import MissingError, StoreError
from diloco.corpus.folder import CHUNK, store_of

RUN = 16
"""Chunks that one request fetches at most: neighbours, which have one lock."""
LOCKS = 1024
DAMAGED_TRIES = 3
"""A chunk that arrives damaged may have been damaged on its way."""
RETRY_SECONDS = (0.25, 8.0)
"""Between two tries: at first, and at most."""
TOUCH_SECONDS = 1.0
"""How exactly the cache knows when a chunk was read last."""
FILL = 0.9
"""Of the limit, to which the cache is emptied when it is full."""
KNOWN = 100_000
"""Chunks that a process remembers to have checked."""
MAPPED = 1024
"""Chunks that a process has mapped at most: as many as the usual group of the order has."""
DIGEST = 32


@dataclass(frozen=True)
class Shard:
    """Of `size` bytes; `checksum` is that of its digests, hex."""

    name: str
    size: int
    checksum: str


@dataclass
class Mapped:
    """A chunk that this process has checked. Nobody changes a chunk in place."""

    data: memoryview
    touched: float
    """By time.monotonic(): when its file was last told that it is read."""


@dataclass
class Cache:
    """Of the folder at `url`, below the directory `root`, which holds caches and nothing else. Threads may share one."""

    url: str
    root: Path
    folder: str
    """Of this url's chunks in `root`: another content needs another name."""
    limit: int
    """Bytes below `root`, of all together; exceeded by 1/64 for each process at most, and on the disk by what one has mapped
    still while others have removed it."""
    patience: float
    """Seconds for which an answer is waited for."""
    _checked: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    """(shard, chunk) -> (inode, size) of the file that this process has checked."""
    _mapped: dict[tuple[str, int], Mapped] = field(default_factory=dict)
    """The oldest first."""
    _sums: dict[str, bytes] = field(default_factory=dict)
    """Shard -> digests of its chunks, 32 bytes for each MiB that was ever asked of it."""
    _unseen: int = 1 << 62
    """Bytes fetched since this process looked at what there is."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def read(self, shard: Shard, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a shard. Raises OSError if they cannot be had."""
        chunk, inside = divmod(start, CHUNK)
        if inside + stop - start <= CHUNK:
            return self._chunk(shard, chunk)[inside : inside + stop - start]
        parts = []
        while start < stop:
            chunk, inside = divmod(start, CHUNK)
            end = min(stop, (chunk + 1) * CHUNK)
            parts.append(self._chunk(shard, chunk)[inside : inside + end - start])
            start = end
        return memoryview(b"".join(parts))

    def _chunk(self, shard: Shard, chunk: int) -> memoryview:
        mapped = self._mapped.get((shard.name, chunk))
        if mapped is not None and time.monotonic() - mapped.touched < TOUCH_SECONDS:
            return mapped.data
        while (data := self._at_hand(shard, chunk)) is None:
            self.bring(shard, chunk, chunk + 1)
        return data

    def _path(self, shard: Shard, chunk: int) -> str:
        return f"{self.root}/{self.folder}/{shard.name}/{chunk:06d}"

    def _at_hand(self, shard: Shard, chunk: int) -> memoryview | None:
        """None: it is not here, any more or yet."""
        key, path = (shard.name, chunk), self._path(shard, chunk)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            self._mapped.pop(key, None)
            return None
        try:
            identity = _identity(file)
            mapped = self._mapped.get(key)
            if mapped is None or self._checked.get(key) != identity:
                data = memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ) if identity[1] else b"")
                if self._checked.get(key) != identity:
                    if blake3(data).digest() != self._digest(shard, chunk, time.monotonic()):
                        print(f"data: {path} is damaged on this disk: fetching it again", flush=True)
                        Path(path).unlink(missing_ok=True)
                        return None
                    self._remember(shard, chunk, identity)
                mapped = self._mapped[key] = Mapped(data, 0.0)
                if len(self._mapped) > MAPPED:
                    self._mapped.pop(next(iter(self._mapped)), None)
            with suppress(PermissionError):  # another user's: it may go sooner
                os.utime(file)
            mapped.touched = time.monotonic()
            return mapped.data
        finally:
            os.close(file)

    def _remember(self, shard: Shard, chunk: int, identity: tuple[int, int]) -> None:
        if len(self._checked) >= KNOWN:
            self._checked.clear()
        self._checked[shard.name, chunk] = identity

    def bring(self, shard: Shard, first: int, last: int) -> None:
        """Chunks [first, last) of one run into the cache, in one request, if one of them is not there. Raises OSError if they
        cannot be had."""
        if not self._missing(shard, first, last):
            return
        begin = time.monotonic()  # waiting for one who has the lock is waiting for the store
        with self._locked(f"{hash_of(f'{self.folder}/{shard.name}/{first // RUN}') % LOCKS}"):
            missing = self._missing(shard, first, last)  # by now another process may have brought them
            if not missing:
                return
            first, last = missing[0], missing[-1] + 1
            start, stop = first * CHUNK, min(last * CHUNK, shard.size)
            digests = [self._digest(shard, chunk, begin) for chunk in range(first, last)]
            data = self._fetch(f"{shard.name}.tokens", start, stop, partial(_has, digests), begin)
            os.makedirs(f"{self.root}/{self.folder}/{shard.name}", exist_ok=True)
            for chunk in missing:
                self._place(shard, chunk, data[(chunk - first) * CHUNK : (chunk - first + 1) * CHUNK])
        self._unseen += len(data)
        if self._unseen > self.limit // 64:
            self._make_room()

    def _missing(self, shard: Shard, first: int, last: int) -> list[int]:
        return [chunk for chunk in range(first, last) if not os.path.exists(self._path(shard, chunk))]

    def _place(self, shard: Shard, chunk: int, data: memoryview) -> None:
        path = self._path(shard, chunk)
        folder, _, name = path.rpartition("/")
        hidden = f"{folder}/.{name}.{os.getpid()}.{threading.get_ident()}"
        with open(hidden, "wb") as file:
            file.write(data)
            file.flush()
            self._remember(shard, chunk, _identity(file.fileno()))
        self._mapped.pop((shard.name, chunk), None)  # of a file that was removed
        os.rename(hidden, path)

    def _digest(self, shard: Shard, chunk: int, begin: float) -> bytes:
        if shard.name not in self._sums:
            length = DIGEST * -(-shard.size // CHUNK)
            right = partial(_is, shard.checksum)
            self._sums[shard.name] = bytes(self._fetch(f"{shard.name}.sums", 0, length, right, begin))
        return self._sums[shard.name][DIGEST * chunk : DIGEST * (chunk + 1)]

    def _fetch(self, key: str, start: int, stop: int, right: Callable[[memoryview], bool], begin: float) -> memoryview:
        """Bytes of an object. begin: of the wait for them, by time.monotonic(). Raises OSError: that they are not right, or that
        its store stayed away."""
        delay, damaged = RETRY_SECONDS[0], 0
        while True:
            try:
                data = store_of(self.url).view(key, start, stop)
                if len(data) == stop - start and right(data):
                    _outage.ended(self.url)
                    return data
                damaged += 1
                if damaged == DAMAGED_TRIES:
                    raise DamagedShard(
                        f"{self.url}/{key} is damaged: its bytes [{start}, {stop}) do not have the digests of the index: copy it "
                        "again from where it was prepared"
                    )
            except MissingError as error:
                raise DamagedShard(f"{error}: copy it again from where it was prepared") from error
            except StoreError as error:
                if time.monotonic() - begin > self.patience:
                    _outage.given_up(self.url)
                    raise
                _outage.began(self.url, error, self.patience)
            time.sleep(delay)
            delay = min(2 * delay, RETRY_SECONDS[1])

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Between processes and threads alike. Whether it is ours: always, if we wait."""
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def _make_room(self) -> None:
        """What was not read for longest goes, if there is too much. Nobody needs to wait for that: one process does it."""
        with self._locked("room", wait=False) as ours:
            if not ours:
                return
            self._unseen = 0
            found = sorted(_files(self.root))
            total = sum(size for _, size, _ in found)
            if total <= self.limit - self.limit // 16:
                return
            self._mapped.clear()  # or what goes would stay on the disk
            for _, size, path in found:
                if total <= FILL * self.limit:
                    return
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size


class DamagedShard(OSError):
    """The store has something else than was prepared."""


def _files(root: Path) -> Iterator[tuple[float, int, str]]:
    """(when it was read last, bytes, path) of all chunks, and of what killed processes left of some."""
    for folder in os.scandir(root):
        for shard in os.scandir(folder) if folder.name != "locks" else ():
            for file in os.scandir(shard):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    yield status.st_mtime, status.st_size, file.path


def _identity(file: int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_ino, status.st_size


def _is(checksum: str, data: memoryview) -> bool:
    return hashlib.sha256(data).hexdigest() == checksum


def _has(digests: Sequence[bytes], data: memoryview) -> bool:
    parts = (data[k * CHUNK : (k + 1) * CHUNK] for k in range(len(digests)))
    return all(blake3(part).digest() == digest for part, digest in zip(parts, digests, strict=True))


def hash_of(name: str) -> int:
    """The same in all processes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


class _Outage:
    """Says so once when a store is away, and once when it is back."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def began(self, url: str, error: StoreError, patience: float) -> None:
        if self._since.setdefault(url, now := time.monotonic()) == now:
            print(f"data: {error}: trying again for {patience:.0f} s", flush=True)

    def given_up(self, url: str) -> None:
        self._since.pop(url, None)

    def ended(self, url: str) -> None:
        if (since := self._since.pop(url, None)) is not None:
            print(f"data: {url} answers again after {time.monotonic() - since:.1f} s", flush=True)


_outage = _Outage()
