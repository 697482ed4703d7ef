"""Chunks of shards in object storage, on this machine's disk: all processes of the machine share them.

A chunk is fetched when somebody reads it, by one process: others that want it wait for its lock, which ends with its holder.
It is checked against the index before it is marked as there, and again by every process that meets it, which maps it into its
memory. What was not read for longest goes first when the directory is full; whoever has it mapped reads on.

A file has the chunks of a run, each at its place, and a byte for each that says whether it is there (a file for each chunk takes
three times the time to write: that of creating files).
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from ckpt.store import MissingError, StoreError
from diloco.corpus.folder import CHUNK, store_of

RUN = 16
"""Chunks that one request fetches at most: neighbours, which have one file and one lock."""
RUN_BYTES = RUN * CHUNK
LOCKS = 1024
DAMAGED_TRIES = 3
"""A chunk that arrives damaged may have been damaged on its way."""
RETRY_SECONDS = (0.25, 8.0)
"""Between two tries: at first, and at most."""
TOUCH_SECONDS = 1.0
"""How exactly the cache knows when a chunk was read last."""
FILL = 0.9
"""Of the limit, to which the cache is emptied when it is full."""
KNOWN = 10_000
"""Runs of which a process remembers what it has checked."""
MAPPED = 64
"""Runs that a process has mapped at most: as many as the usual group of the order has."""
DIGEST = 32


@dataclass(frozen=True)
class Shard:
    """Of `size` bytes; `checksum` is that of its digests, hex."""

    name: str
    size: int
    checksum: str


class Run(NamedTuple):
    """RUN chunks of a shard, fewer at its end."""

    shard: Shard
    number: int

    @property
    def key(self) -> Key:
        return self.shard.name, self.number

    @property
    def size(self) -> int:
        """Bytes."""
        return min(RUN_BYTES, self.shard.size - self.number * RUN_BYTES)


Key = tuple[str, int]
"""Of a run: its shard and its number there."""


@dataclass
class Mapped:
    """A run's file. Nobody changes a chunk that is there."""

    data: memoryview
    """The run, and the marks of its chunks."""
    inode: int
    checked: bytearray
    """Whether this process has, each of the chunks."""
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
    _checked: dict[Key, tuple[int, bytearray]] = field(default_factory=dict)
    """The inode of a run's file, and what this process has checked of it."""
    _mapped: dict[Key, Mapped] = field(default_factory=dict)
    """The oldest first."""
    _sums: dict[str, bytes] = field(default_factory=dict)
    """Shard -> digests of its chunks, 32 bytes for each MiB that was ever asked of it."""
    _unseen: int = 1 << 62
    """Bytes fetched since this process looked at what there is."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def read(self, shard: Shard, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a shard. Raises OSError if they cannot be had."""
        number, inside = divmod(start, RUN_BYTES)
        end = inside + stop - start
        if end > RUN_BYTES:
            middle = (number + 1) * RUN_BYTES
            return memoryview(b"".join((self.read(shard, start, middle), self.read(shard, middle, stop))))
        return self.run(Run(shard, number), range(inside // CHUNK, -(-end // CHUNK)))[inside:end]

    def run(self, run: Run, chunks: Collection[int]) -> memoryview:
        """All of a run, of which these chunks are right. Raises OSError if they cannot be had."""
        mapped = self._mapped.get(run.key)
        recent = mapped is not None and time.monotonic() - mapped.touched < TOUCH_SECONDS
        if mapped is not None and recent and all(mapped.checked[chunk] for chunk in chunks):
            return mapped.data
        while (mapped := self._at_hand(run, chunks)) is None:
            self.bring(run, min(chunks), max(chunks) + 1)
        return mapped.data

    def _at_hand(self, run: Run, chunks: Collection[int]) -> Mapped | None:
        """The run's file, if these chunks are right; None: one of them is not here, any more or yet."""
        mapped = self._look(run)
        if mapped is None or not all(mapped.data[run.size + chunk] for chunk in chunks):
            return None
        for chunk in chunks:
            if not mapped.checked[chunk]:
                part = mapped.data[chunk * CHUNK : min((chunk + 1) * CHUNK, run.size)]
                if blake3(part).digest() != self._digest(run, chunk, time.monotonic()):
                    print(f"data: {self._path(run)} is damaged on this disk: fetching it again", flush=True)
                    Path(self._path(run)).unlink(missing_ok=True)
                    return None
                mapped.checked[chunk] = True
        return mapped

    def _look(self, run: Run) -> Mapped | None:
        """The run's file, which is told that it is read. None: there is none, or somebody begins to make it."""
        try:
            file = os.open(self._path(run), os.O_RDONLY)
        except FileNotFoundError:
            self._mapped.pop(run.key, None)
            return None
        try:
            status = os.stat(file)
            if status.st_size != run.size + RUN:
                return None
            mapped = self._mapped.get(run.key)
            if mapped is None or mapped.inode != status.st_ino:
                data = memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ))
                mapped = Mapped(data, status.st_ino, self._known(run, status.st_ino), 0.0)
                self._mapped[run.key] = mapped
                if len(self._mapped) > MAPPED:
                    self._mapped.pop(next(iter(self._mapped)), None)
            with suppress(PermissionError):  # another user's: it may go sooner
                os.utime(file)
        finally:
            os.close(file)
        mapped.touched = time.monotonic()
        return mapped

    def _path(self, run: Run) -> str:
        return f"{self.root}/{self.folder}/{run.shard.name}/{run.number:06d}"

    def _known(self, run: Run, inode: int) -> bytearray:
        """What this process has checked of the run's file."""
        found = self._checked.get(run.key)
        if found is None or found[0] != inode:
            if len(self._checked) >= KNOWN:
                self._checked.clear()
            found = self._checked[run.key] = inode, bytearray(RUN)
        return found[1]

    def bring(self, run: Run, first: int, last: int) -> None:
        """Chunks [first, last) of a run into the cache, in one request, if one of them is not there. Raises OSError."""
        if not self._missing(run, first, last):
            return
        begin = time.monotonic()  # waiting for one who has the lock is waiting for the store
        with self._locked(f"{hash_of(f'{self.folder}/{run.shard.name}/{run.number}') % LOCKS}"):
            missing = self._missing(run, first, last)  # by now another process may have brought them
            if not missing:
                return
            first, last = missing[0], missing[-1] + 1
            start, stop = first * CHUNK, min(last * CHUNK, run.size)
            digests = [self._digest(run, chunk, begin) for chunk in range(first, last)]
            key, at = f"{run.shard.name}.tokens", run.number * RUN_BYTES
            data = self._fetch(key, at + start, at + stop, partial(_has, digests), begin)
            try:
                self._place(run, first, last, data)
            except OSError as error:
                raise OSError(
                    f"data.cache: {self._path(run)} cannot be written ({error.strerror}): set data.cache to a directory with "
                    f"room for data.cache_bytes={self.limit}, or set less"
                ) from error
        self._unseen += len(data)
        if self._unseen > self.limit // 64:
            self._make_room()

    def _missing(self, run: Run, first: int, last: int) -> list[int]:
        """Those of the run's chunks [first, last) that are not there. The others are wanted soon, which their file is told."""
        marks = b""
        with suppress(FileNotFoundError), open(self._path(run), "rb", buffering=0) as file:
            file.seek(run.size)
            marks = file.read()
            with suppress(PermissionError):
                os.utime(file.fileno())
        return [chunk for chunk in range(first, last) if len(marks) != RUN or not marks[chunk]]

    def _place(self, run: Run, first: int, last: int, data: memoryview) -> None:
        """Puts the run's chunks [first, last) where they belong. What of them is there already is written again, as it is."""
        path = self._path(run)
        os.makedirs(path.rpartition("/")[0], exist_ok=True)
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            status = os.stat(file.fileno())
            if status.st_size != run.size + RUN:
                file.truncate(run.size + RUN)
            os.posix_fallocate(file.fileno(), first * CHUNK, len(data))  # a quarter less time than without, on ext4
            file.seek(first * CHUNK)
            file.write(data)
            file.flush()
            file.seek(run.size + first)
            file.write(b"\1" * (last - first))
        self._known(run, status.st_ino)[first:last] = b"\1" * (last - first)

    def _digest(self, run: Run, chunk: int, begin: float) -> bytes:
        shard, place = run.shard, DIGEST * (run.number * RUN + chunk)
        if shard.name not in self._sums:
            length = DIGEST * -(-shard.size // CHUNK)
            right = partial(_is, shard.checksum)
            self._sums[shard.name] = bytes(self._fetch(f"{shard.name}.sums", 0, length, right, begin))
        return self._sums[shard.name][place : place + DIGEST]

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
    """(when it was read last, bytes, path) of all runs."""
    for folder in os.scandir(root):
        for shard in os.scandir(folder) if folder.name != "locks" else ():
            for file in os.scandir(shard):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    yield status.st_mtime, 512 * status.st_blocks, file.path  # it may have holes


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
