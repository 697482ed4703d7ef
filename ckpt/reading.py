"""Reading checkpoints: every byte is hashed before it is used, however little of a checkpoint is read.

A shard is read in the chunks of its manifest (ckpt.format.CHUNK), each whole and against its own digest, by several threads
at once: hashing and the network leave Python's lock alone. Memory beside the output is a chunk for each thread.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from ckpt import format
from ckpt.checkpoint import MANIFEST, DamagedError, load_manifest, naming, shard_key
from ckpt.format import CHUNK, FormatError, Shard, Span, require
from ckpt.store import MissingError, Store

READERS = 4
"""Chunks under way at once. 8 took 12 % longer here (two cores, the server on them), and 100 MiB more."""
KEPT = 2
"""Chunks of which only a part was asked for that a Reader keeps: what is read in order needs the rest next."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Want:
    """Elements of a fragment of a plane from `start` on, as many as `out` has: contiguous fp32, on the CPU."""

    plane: str
    fragment: int
    start: int
    out: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.out.numel()


@dataclass(frozen=True)
class _Part:
    """Bytes from `begin` of an object on, which belong in `out`."""

    begin: int
    out: memoryview


class Reader:
    """Ranges of the planes of a checkpoint, verified. Threads may share one."""

    def __init__(self, store: Store, manifest: dict[str, Any]):
        """`manifest` is from load_manifest or commit_manifest; DamagedError if its pieces are malformed."""
        self._store = store
        self._prefix: str = manifest["prefix"]
        self._kept, self._lock = OrderedDict[tuple[str, int], memoryview](), threading.Lock()
        self._by_fragment: dict[tuple[str, int], list[tuple[Span, int]]] = defaultdict(list)
        with naming(store, f"{self._prefix}/{MANIFEST}"):
            format.spans_of(manifest)
            self._shards = {shard.name: shard for shard in format.shards_of(manifest)}
        for span, begin in sorted(each for shard in self._shards.values() for each in shard.begins):
            self._by_fragment[span.plane, span.fragment].append((span, begin))

    def elements(self, plane: str, fragment: int) -> int:
        """Elements of a fragment of a plane in this checkpoint; 0 if it is not there."""
        spans = self._by_fragment.get((plane, fragment), [])
        return spans[-1][0].stop if spans else 0

    def read(self, plane: str, fragment: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop), a new fp32 CPU tensor [stop - start]; see read_into."""
        if not 0 <= start <= stop:
            raise ValueError(f"[{start}, {stop}) is not a range of elements")
        self._check(plane, fragment, start, stop)  # before memory is allocated
        out = torch.empty(stop - start, dtype=torch.float32)
        self.read_into([Want(plane, fragment, start, out)])
        return out

    def read_into(self, wants: Sequence[Want]) -> None:
        """Fill all of these at once. DamagedError if a part is missing or not as it was written, StoreError if the store
        fails; what is in the outputs then is to be thrown away."""
        tasks: dict[tuple[str, int], list[_Part]] = defaultdict(list)
        for want in wants:
            self._check(want.plane, want.fragment, want.start, want.stop)
            for shard, part in self._parts(want):
                for index, inside in _by_chunk(part):
                    tasks[shard, index].append(inside)
        run_all(
            self._fill,
            [(self._shards[name], index, parts) for (name, index), parts in sorted(tasks.items(), key=_place)],
        )

    def _check(self, plane: str, fragment: int, start: int, stop: int) -> None:
        have = self.elements(plane, fragment)
        with naming(self._store, f"{self._prefix}/{MANIFEST}"):
            require(stop <= have, f"has {have} elements of {plane}/{fragment}, and not [{start}, {stop})")

    def _parts(self, want: Want) -> Iterator[tuple[str, _Part]]:
        raw = want.out.numpy().data.cast("B")
        for span, begin in self._by_fragment[want.plane, want.fragment]:
            first, last = max(want.start, span.start), min(want.stop, span.stop)
            if first < last:
                out = raw[4 * (first - want.start) : 4 * (last - want.start)]
                yield span.shard, _Part(begin + 4 * (first - span.start), out)

    def _fill(self, shard: Shard, index: int, parts: list[_Part]) -> None:
        """Fetch and check one chunk, and copy what is wanted of it."""
        key = (shard.name, index)
        with self._lock:
            chunk = self._kept.pop(key, None)
        if chunk is None:
            chunk = self._fetch(shard, index)
        for part in parts:
            begin = part.begin - index * CHUNK
            part.out[:] = chunk[begin : begin + len(part.out)]
        if sum(len(part.out) for part in parts) < len(chunk):
            with self._lock:
                self._kept[key] = chunk
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)

    def _fetch(self, shard: Shard, index: int) -> memoryview:
        key = shard_key(self._prefix, shard.name)
        with naming(self._store, key):
            return fetch_chunk(self._store, key, shard, index)


def _place(task: tuple[tuple[str, int], Any]) -> tuple[str, int]:
    return task[0]


def _by_chunk(part: _Part) -> Iterator[tuple[int, _Part]]:
    """(index of the chunk, the part of it in there)."""
    at, end = part.begin, part.begin + len(part.out)
    while at < end:
        stop = min(end, (at // CHUNK + 1) * CHUNK)
        yield at // CHUNK, _Part(at, part.out[at - part.begin : stop - part.begin])
        at = stop


def fetch_chunk(store: Store, key: str, shard: Shard, index: int) -> memoryview:
    """Chunk `index` of the object at `key`. FormatError if it is not as it was written."""
    begin = index * CHUNK
    end = min(begin + CHUNK, shard.bytes)
    try:
        chunk = store.view(key, begin, end)
    except MissingError as error:
        raise FormatError("is missing") from error
    require(len(chunk) == end - begin, f"ends within bytes [{begin}, {end}) of its {shard.bytes}")
    right = blake3(chunk).hexdigest() == shard.chunks[index]
    require(right, f"does not have the digest of the manifest in bytes [{begin}, {end})")
    return chunk


def run_all(work: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> None:
    """Do all of these, READERS at a time; raises what the first one that failed has raised, and begins no other then."""
    todo = list(tasks)
    if len(todo) == 1:
        work(*todo[0])
        return
    with ThreadPoolExecutor(READERS) as pool:
        futures = [pool.submit(work, *task) for task in todo]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        errors = [error for future in futures if future in done and (error := future.exception())]
        if errors:
            raise errors[0]


def read_range(store: Store, manifest: dict[str, Any], plane: str, fragment: int, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a fragment of a plane, fp32 on the CPU, whatever mesh wrote them; verified.

    Fetches the chunks that the range touches; keep a Reader for many ranges. DamagedError if a part is missing or is not
    as it was written, StoreError if the store fails.
    """
    return Reader(store, manifest).read(plane, fragment, start, stop)


def verify(store: Store, manifest: dict[str, Any]) -> None:
    """Read every byte of every shard; DamagedError names one that is not as the manifest says."""
    for error in findings(store, manifest):
        raise error


def findings(store: Store, manifest: dict[str, Any]) -> list[DamagedError]:
    """Read every shard as verify does: what is wrong with each one that is not as the manifest says, by shard."""
    with naming(store, f"{manifest['prefix']}/{MANIFEST}"):
        format.spans_of(manifest)
        shards = format.shards_of(manifest)
    found: dict[tuple[str, int], DamagedError] = {}

    def look(shard: Shard, index: int) -> None:
        try:
            _verify_chunk(store, shard_key(manifest["prefix"], shard.name), shard, index)
        except DamagedError as error:
            found[shard.name, index] = error

    run_all(look, [(shard, index) for shard in shards for index in range(len(shard.chunks))])
    first: dict[str, DamagedError] = {}
    for (name, _), error in sorted(found.items(), key=_place):
        first.setdefault(name, error)
    return list(first.values())


def _verify_chunk(store: Store, key: str, shard: Shard, index: int) -> None:
    """One chunk; with the first one the size of the object, and a header that says what the manifest does."""
    with naming(store, key):
        if index == 0:
            try:
                size = store.size(key)
            except MissingError as error:
                raise FormatError("is missing") from error
            require(size == shard.bytes, f"has {size} bytes, not the {shard.bytes} of the manifest")
        chunk = fetch_chunk(store, key, shard, index)
        if index == 0:
            end = 8 + format.header_length(chunk, shard.bytes)
            # The chunks that it reaches into are checked like all others.
            header = bytes(chunk[8:end]) if end <= len(chunk) else store.read(key, 8, end)
            format.check_header(header, shard)


def _log_damage(prefix: str, error: DamagedError) -> None:
    _log.warning("checkpoint %s is left out: %s", prefix, error)


def newest(
    store: Store, root: str, on_damaged: Callable[[str, DamagedError], None] = _log_damage
) -> Iterator[dict[str, Any]]:
    """The manifests `<root>/<n>/manifest.json` that are right in themselves, highest n first.

    A damaged one costs nothing but itself: `on_damaged(prefix, error)` hears of it and the search goes on.
    StoreError stops it. Shards are not looked at: reading them finds what is wrong with them.
    """
    for prefix in numbered(store, root):
        try:
            manifest = load_manifest(store, prefix)
        except DamagedError as error:
            on_damaged(prefix, error)
        except MissingError as error:
            on_damaged(prefix, DamagedError(f"{error}: it was removed since it was listed"))
        else:
            yield manifest


def numbered(store: Store, root: str) -> list[str]:
    """Prefixes of the checkpoints under `root` by falling number."""
    pattern = re.compile(re.escape(root) + r"/([0-9]{1,18})/" + re.escape(MANIFEST))
    found = [match[1] for key in store.list(root) if (match := pattern.fullmatch(key))]
    return [f"{root}/{number}" for number in sorted(found, key=lambda n: (int(n), n), reverse=True)]
