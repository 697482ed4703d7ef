"""Flat-space checkpoints: safetensors shards, then one JSON manifest that makes them a checkpoint.

A checkpoint holds *planes* ("theta", "momentum", "x", "exp_avg", ...), each cut into *fragments*, each a flat
fp32 vector of which every rank writes the contiguous element range [start, stop) that it holds. The layout of
ranks is nowhere in it, so any other mesh reads any range back. Objects, all created and never overwritten:

    <prefix>/<shard name>.safetensors     tensors "plane/fragment/start"
    <prefix>/manifest.json                written last: without it there is no checkpoint

Whatever is damaged raises DamagedError; a store that fails raises StoreError, which is not the same: an
outage must not make a run fall back to an older checkpoint. Digests find damage; they do not authenticate a
writer.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ckpt import format
from ckpt.format import FormatError, Piece, Span, require
from ckpt.store import MissingError, Store, StoreError

__all__ = [
    "MANIFEST",
    "DamagedError",
    "Piece",
    "Reader",
    "check_headers",
    "commit_manifest",
    "findings",
    "load_manifest",
    "newest",
    "read_range",
    "save_shard",
    "verify",
]

MANIFEST = "manifest.json"
FIRST_READ = 64 << 10  # bytes: the header of most shards comes with the first request
CHUNK = 32 << 20  # bytes hashed at a time
READERS = 4  # shards looked at in parallel

_log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A checkpoint that must not be loaded; one sentence that names the object and what is wrong."""


@contextmanager
def _naming(store: Store, key: str) -> Iterator[None]:
    """Turn a finding about the object at `key` into a whole sentence."""
    try:
        yield
    except FormatError as error:
        raise DamagedError(f"{store.url}: {key} is damaged: it {error}") from error


def save_shard(store: Store, prefix: str, shard_name: str, pieces: list[Piece]) -> dict[str, Any]:
    """Write one rank's pieces as `<prefix>/<shard_name>.safetensors` and return its record for the manifest.

    The record is {name, bytes, sha256, pieces: [{plane, fragment, start, stop}]}; empty pieces are left out.
    Saving the same bytes again is fine; StoreError if the shard exists with others, ValueError for a bad name
    or piece.
    """
    if not format.is_name(shard_name):
        raise ValueError(f"shard name {shard_name!r} is not made of letters, digits and _.=+@-")
    full = [piece for piece in pieces if piece.stop != piece.start]
    data = format.encode_shard(full)
    key = _shard_key(prefix, shard_name)
    if not store.create(key, data):
        raise StoreError(f"{store.url}: {key} exists with other contents: save under another name")
    spans = [{"plane": p.plane, "fragment": p.fragment, "start": p.start, "stop": p.stop} for p in full]
    sha256 = hashlib.sha256(data).hexdigest()
    return {"name": shard_name, "bytes": len(data), "sha256": sha256, "pieces": spans}


def commit_manifest(store: Store, prefix: str, body: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Create `<prefix>/manifest.json`, which makes the shards a checkpoint. Call it when all are stored.

    `body` is anything JSON. Returns what load_manifest will return: the body's keys and `format`, `shards`,
    `digest` (sha256 of the rest, hex) and `prefix` (where it was found; not stored). DamagedError if the
    shards' pieces overlap or leave a gap, StoreError if another manifest is there, ValueError if the body
    uses one of these keys.
    """
    key = f"{prefix}/{MANIFEST}"
    manifest = format.seal(body, shards)
    with _naming(store, key):
        format.spans_of(manifest)
    if not store.create(key, format.encode_json(manifest)):
        raise StoreError(f"{store.url}: {key} exists with other contents: a checkpoint is never overwritten")
    return {**manifest, "prefix": prefix}


def load_manifest(store: Store, prefix: str) -> dict[str, Any]:
    """Read and check `<prefix>/manifest.json`; see commit_manifest for what it returns.

    Checks format version, digest, and that shards and pieces are well formed, without overlaps or gaps. It
    does not look at the shards: check_headers and verify do. DamagedError if anything is wrong, MissingError
    if there is none.
    """
    key = f"{prefix}/{MANIFEST}"
    with _naming(store, key):
        size = store.size(key)
        require(size <= format.MAX_MANIFEST, f"has {size} bytes, more than any manifest ({format.MAX_MANIFEST})")
        manifest = format.open_manifest(store.read(key, 0, size))
    return {**manifest, "prefix": prefix}


def _shard_key(prefix: str, name: str) -> str:
    return f"{prefix}/{name}.safetensors"


def _shard_size(store: Store, key: str, expected: int) -> int:
    try:
        size = store.size(key)
    except MissingError as error:
        raise FormatError("is missing") from error
    require(size == expected, f"has {size} bytes, not the {expected} of the manifest")
    return size


def _shard_bytes(store: Store, key: str, begin: int, end: int) -> bytes:
    try:
        data = store.read(key, begin, end)
    except MissingError as error:
        raise FormatError("is missing") from error
    require(len(data) == end - begin, f"ends within bytes [{begin}, {end})")
    return data


class Reader:
    """Ranges of the planes of a checkpoint; keeps the headers that it has read. Threads may share one."""

    def __init__(self, store: Store, manifest: dict[str, Any]):
        """`manifest` is from load_manifest or commit_manifest; DamagedError if its pieces are malformed."""
        self._store = store
        self._prefix: str = manifest["prefix"]
        self._sizes: dict[str, int] = {}
        self._offsets: dict[str, dict[str, int]] = {}
        self._by_fragment: dict[tuple[str, int], list[Span]] = defaultdict(list)
        self._by_shard: dict[str, list[Span]] = defaultdict(list)
        with self._naming(MANIFEST):
            for span in format.spans_of(manifest):
                self._by_fragment[span.plane, span.fragment].append(span)
                self._by_shard[span.shard].append(span)
            self._sizes.update((record["name"], record["bytes"]) for record in manifest["shards"])

    def elements(self, plane: str, fragment: int) -> int:
        """Elements of a fragment of a plane in this checkpoint; 0 if it is not there."""
        spans = self._by_fragment.get((plane, fragment), [])
        return spans[-1].stop if spans else 0

    def read(self, plane: str, fragment: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop), a new fp32 CPU tensor [stop - start]; DamagedError if a part is missing."""
        if not 0 <= start <= stop:
            raise ValueError(f"[{start}, {stop}) is not a range of elements")
        have = self.elements(plane, fragment)
        with self._naming(MANIFEST):
            require(stop <= have, f"has {have} elements of {plane}/{fragment}, and not [{start}, {stop})")
        if start == stop:
            return torch.empty(0, dtype=torch.float32)
        spans = [s for s in self._by_fragment[plane, fragment] if s.start < stop and start < s.stop]
        for span in spans:
            self.offsets(span.shard)  # all sizes are checked before memory is allocated
        out = torch.empty(stop - start, dtype=torch.float32)
        raw = out.numpy().data.cast("B")
        for span in spans:
            first, last = max(start, span.start), min(stop, span.stop)
            raw[4 * (first - start) : 4 * (last - start)] = self._elements(span, first, last)
        return out

    def offsets(self, shard: str) -> dict[str, int]:
        """Where each tensor of a shard begins, in bytes; DamagedError unless the manifest agrees."""
        if shard not in self._offsets:
            self._offsets[shard] = self._read_header(shard)
        return self._offsets[shard]

    def _read_header(self, shard: str) -> dict[str, int]:
        key = _shard_key(self._prefix, shard)
        wanted = {span.tensor_name: span.stop - span.start for span in self._by_shard[shard]}
        with _naming(self._store, key):
            size = _shard_size(self._store, key, self._sizes[shard])
            head = _shard_bytes(self._store, key, 0, min(size, FIRST_READ))
            end = 8 + format.header_length(head, size)
            if len(head) < end:
                head += _shard_bytes(self._store, key, len(head), end)
            return format.tensor_offsets(head[8:end], size, wanted)

    def _elements(self, span: Span, first: int, last: int) -> bytes:
        key = _shard_key(self._prefix, span.shard)
        begin = self.offsets(span.shard)[span.tensor_name] + 4 * (first - span.start)
        with _naming(self._store, key):
            return _shard_bytes(self._store, key, begin, begin + 4 * (last - first))

    def _naming(self, name: str) -> Any:
        return _naming(self._store, f"{self._prefix}/{name}")


def read_range(store: Store, manifest: dict[str, Any], plane: str, fragment: int, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a fragment of a plane, fp32 on the CPU, whatever mesh wrote them.

    Fetches only the bytes of the range and the headers of their shards; keep a Reader for many ranges. The
    contents are not hashed: call verify first. DamagedError if a part is missing, StoreError if the store
    fails.
    """
    return Reader(store, manifest).read(plane, fragment, start, stop)


def check_headers(store: Store, manifest: dict[str, Any]) -> None:
    """Check that every shard has its size and exactly its tensors, without reading these; or DamagedError."""
    reader = Reader(store, manifest)
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(reader.offsets, [record["name"] for record in manifest["shards"]]))


def verify(store: Store, manifest: dict[str, Any]) -> None:
    """Read every shard and compare its sha256 with the manifest's; DamagedError names one that differs."""
    for error in findings(store, manifest):
        raise error


def findings(store: Store, manifest: dict[str, Any]) -> list[DamagedError]:
    """Read every shard as verify does: what is wrong with each one that is not as the manifest says."""

    def finding(record: dict[str, Any]) -> DamagedError | None:
        try:
            _verify_shard(store, manifest["prefix"], record)
        except DamagedError as error:
            return error
        return None

    with _naming(store, f"{manifest['prefix']}/{MANIFEST}"):
        format.spans_of(manifest)
    with ThreadPoolExecutor(READERS) as pool:
        return [error for error in pool.map(finding, manifest["shards"]) if error]


def _verify_shard(store: Store, prefix: str, record: dict[str, Any]) -> None:
    key = _shard_key(prefix, record["name"])
    sha256 = hashlib.sha256()
    with _naming(store, key):
        size = _shard_size(store, key, record["bytes"])
        for begin in range(0, size, CHUNK):
            sha256.update(_shard_bytes(store, key, begin, min(begin + CHUNK, size)))
        require(sha256.hexdigest() == record["sha256"], "does not have the sha256 of the manifest")


def _log_damage(prefix: str, error: DamagedError) -> None:
    _log.warning("checkpoint %s is left out: %s", prefix, error)


def newest(
    store: Store, root: str, on_damaged: Callable[[str, DamagedError], None] = _log_damage
) -> Iterator[dict[str, Any]]:
    """The manifests `<root>/<n>/manifest.json` that load and whose shards' headers fit, highest n first.

    A damaged one costs nothing but itself: `on_damaged(prefix, error)` hears of it and the search goes on.
    StoreError stops it. Contents are not hashed: see verify.
    """
    for prefix in _numbered(store, root):
        try:
            manifest = load_manifest(store, prefix)
            check_headers(store, manifest)
        except DamagedError as error:
            on_damaged(prefix, error)
        except MissingError as error:
            on_damaged(prefix, DamagedError(f"{error}: it was removed since it was listed"))
        else:
            yield manifest


def _numbered(store: Store, root: str) -> list[str]:
    """Prefixes of the checkpoints under `root` by falling number."""
    pattern = re.compile(re.escape(root) + r"/([0-9]{1,18})/" + re.escape(MANIFEST))
    found = [match[1] for key in store.list(root) if (match := pattern.fullmatch(key))]
    return [f"{root}/{number}" for number in sorted(found, key=lambda n: (int(n), n), reverse=True)]
