"""What the bytes of a checkpoint mean: safetensors shards and the JSON manifest, as pure functions on bytes.

Nothing that comes from a store is believed and nothing is unpickled. Whatever does not fit raises
FormatError, whose text is the rest of a sentence that begins with the object: "has no list of shards".

A shard is a safetensors file (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length,
a JSON header {name: {dtype, shape, data_offsets}}, then the tensors back to back. Ours are named
"plane/fragment/start", and lie in the order in which the manifest has them: it alone says where each begins, so that
nothing of a shard is believed before its digest is known to be right.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:  # a process that only uploads does without
    from torch import Tensor

FORMAT = 4
OWN_KEYS = ("format", "shards", "digest", "prefix")  # of a manifest; the rest is the caller's body
CHUNK = 16 << 20  # bytes of an object that have a digest of their own: what a ranged read has to fetch at least
MAX_MANIFEST = 64 << 20  # bytes
MAX_HEADER = 64 << 20  # bytes; the safetensors library itself stops at 100 MB
ITEM = {"F32": 4, "BF16": 2}  # bytes of an element, by safetensors' names

_NAME = re.compile(r"[A-Za-z0-9_=+@-][A-Za-z0-9_.=+@-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class FormatError(ValueError):
    """What is wrong with an object, as the rest of a sentence."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a fragment of a plane; `tensor` is fp32, on the CPU, [stop - start]."""

    plane: str
    fragment: int
    start: int
    stop: int
    tensor: Tensor


@dataclass(frozen=True, order=True)
class Span:
    """What a manifest says of a piece: its elements [start, stop) are in the shard of this name."""

    plane: str
    fragment: int
    start: int
    stop: int
    shard: str

    @property
    def tensor_name(self) -> str:
        return f"{self.plane}/{self.fragment}/{self.start}"


@dataclass(frozen=True)
class Shard:
    """What a manifest says of a shard: its size in bytes, the BLAKE3 (hex) of each CHUNK of the object, header included (the
    last is shorter), and its pieces with the byte at which each begins, in the order of the file."""

    name: str
    bytes: int
    chunks: tuple[str, ...]
    begins: tuple[tuple[Span, int], ...]


def require(fine: bool, otherwise: str) -> None:
    """Raise FormatError(otherwise) unless `fine`."""
    if not fine:
        raise FormatError(otherwise)


def is_name(value: Any) -> bool:
    """Whether this can name a shard or a plane: no separator, no leading dot; no path leaves its folder."""
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def is_count(value: Any) -> bool:
    """Whether this is an integer that JSON carries exactly everywhere, and not a bool."""
    return type(value) is int and 0 <= value < 1 << 53


def shard_record(name: str, data: bytes | memoryview, pieces: Sequence[Piece | Span]) -> dict[str, Any]:
    """What the manifest says of this shard. pieces: those of `data`, in its order."""
    view = memoryview(data)
    chunks = [blake3(view[begin : begin + CHUNK]).hexdigest() for begin in range(0, len(view), CHUNK)]
    return {
        "name": name,
        "bytes": len(view),
        "sha256": hashlib.sha256(view).hexdigest(),
        "chunks": chunks,
        "pieces": [{"plane": p.plane, "fragment": p.fragment, "start": p.start, "stop": p.stop} for p in pieces],
    }


def encode_shard(pieces: list[Piece]) -> bytes:
    """The safetensors file of these pieces; ValueError if one is no flat fp32 CPU tensor or comes twice."""
    for piece in pieces:
        _check_piece(piece)
    header = encode_header([(f"{p.plane}/{p.fragment}/{p.start}", "F32", [p.stop - p.start]) for p in pieces])
    return b"".join([header, *(piece.tensor.detach().contiguous().numpy().data for piece in pieces)])


def encode_header(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> bytes:
    """What a safetensors file begins with before these tensors (name, dtype of ITEM, shape), which follow back to back in
    this order; ValueError if a name comes twice."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        if name in header:
            raise ValueError(f"tensor {name} is given twice")
        begin, end = end, end + ITEM[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin aligned
    return len(text).to_bytes(8, "little") + text


def _check_piece(piece: Piece) -> None:
    import torch

    tensor, length = piece.tensor, piece.stop - piece.start
    if not (is_name(piece.plane) and is_count(piece.fragment) and is_count(piece.start)):
        raise ValueError(f"{piece.plane!r}, {piece.fragment!r}, {piece.start!r} name no plane, fragment and start")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.shape != (length,):
        raise ValueError(
            f"piece {piece.plane}/{piece.fragment} [{piece.start}, {piece.stop}) is {tensor.dtype} of shape "
            f"{list(tensor.shape)} on {tensor.device}, not {length} fp32 elements on the CPU"
        )


def header_length(head: bytes | memoryview, size: int) -> int:
    """Bytes of the JSON header of a shard of `size` bytes, which begins with `head`, if it can be."""
    require(len(head) >= 8, f"has only {size} bytes")
    length = int.from_bytes(head[:8], "little")
    require(length <= min(MAX_HEADER, size - 8), f"says that its header has {length} bytes")
    return length


def check_header(header: bytes, shard: Shard) -> None:
    """FormatError unless the JSON header of a shard says what the manifest does: exactly its tensors, as fp32, where the
    manifest has them, to the end of the object. Then every safetensors library reads what we do."""
    entries = decode_json(header)
    require(isinstance(entries, dict), "has a header that is not a JSON object")
    entries.pop("__metadata__", None)
    wanted = {span.tensor_name for span, _ in shard.begins}
    require(entries.keys() == wanted, "does not hold the pieces that the manifest says")
    for span, begin in shard.begins:
        start = _data_offset(span.tensor_name, entries[span.tensor_name], span.stop - span.start)
        there = 8 + len(header) + start
        require(there == begin, f"has {span.tensor_name} at byte {there}, and not at {begin} as the manifest says")


def _data_offset(name: str, entry: Any, elements: int) -> int:
    fits = isinstance(entry, dict) and entry.get("dtype") == "F32" and entry.get("shape") == [elements]
    require(fits, f"does not hold {name} as {elements} fp32 elements")
    offsets = entry.get("data_offsets")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(is_count, offsets))):
        raise FormatError(f"has no offsets for {name} but {offsets!r:.60}")
    start, stop = offsets
    require(stop - start == 4 * elements, f"has {stop - start} bytes for the {elements} fp32 elements of {name}")
    return int(start)


def seal(body: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a body and its shards, with its digest; ValueError if the body has one of OWN_KEYS."""
    taken = [key for key in OWN_KEYS if key in body]
    if taken:
        raise ValueError(f"the body of a manifest cannot have the key {taken[0]!r}: that one is the manifest's own")
    # Through JSON once, so that what is hashed is only what JSON can say: string keys, lists for tuples.
    manifest = json.loads(json.dumps({**body, "format": FORMAT, "shards": shards}, allow_nan=False))
    return {**manifest, "digest": digest(manifest)}


def encode_json(value: dict[str, Any]) -> bytes:
    """The only bytes that stand for this object, readable by people."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def decode_json(raw: bytes) -> Any:
    """Parse JSON; FormatError for anything else, and for too deep a nesting."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON ({str(error)[:100]})") from error


def digest(manifest: dict[str, Any]) -> str:
    """sha256, hex, of all of a manifest but its digest."""
    return hashlib.sha256(encode_json({k: v for k, v in manifest.items() if k != "digest"})).hexdigest()


def open_manifest(raw: bytes) -> dict[str, Any]:
    """Decode a stored manifest; FormatError if its format version, digest, shards or pieces are not right."""
    manifest: dict[str, Any] = decode_json(raw)
    require(isinstance(manifest, dict), "is not a JSON object")
    version = manifest.get("format")
    require(is_count(version), f"has no format version but {version!r:.40}")
    require(version == FORMAT, f"has format version {version}, and this program reads {FORMAT}")
    own_digest, own_bytes = _written_again(manifest)
    require(manifest.get("digest") == own_digest, "does not have the digest that it says")
    require(raw == own_bytes, "is not written the way this format is")
    require("prefix" not in manifest, "has a 'prefix', which is never stored")
    spans_of(manifest)
    return manifest


def _written_again(manifest: dict[str, Any]) -> tuple[str, bytes]:
    try:
        return digest(manifest), encode_json(manifest)
    except (ValueError, RecursionError) as error:
        # 1e999 is read as infinity, which is not written; and nesting can be read deeper than written.
        raise FormatError("holds what a manifest cannot hold") from error


def spans_of(manifest: dict[str, Any]) -> list[Span]:
    """All pieces by plane, fragment, start; FormatError for malformed ones, overlaps and gaps."""
    return _in_order([span for shard in shards_of(manifest) for span, _ in shard.begins])


def shards_of(manifest: dict[str, Any]) -> list[Shard]:
    """All shards; FormatError for malformed ones."""
    shards = [_shard(record) for record in field(manifest, "shards", is_list, "a body")]
    require(len({shard.name for shard in shards}) == len(shards), "names a shard twice")
    return shards


def _in_order(spans: list[Span]) -> list[Span]:
    ends: dict[tuple[str, int], int] = {}
    for span in sorted(spans):
        end = ends.get((span.plane, span.fragment), 0)
        require(span.start >= end, f"has {span.tensor_name} overlapping the piece before it, which ends at {end}")
        require(span.start == end, f"misses elements [{end}, {span.start}) of {span.plane}/{span.fragment}")
        ends[span.plane, span.fragment] = span.stop
    return sorted(spans)


def _shard(record: Any) -> Shard:
    """One shard's record, after checking every field; keys that are not ours are left alone."""
    name = field(record, "name", is_name, "a shard")
    what = f"shard {name}"
    size = field(record, "bytes", is_count, what)
    field(record, "sha256", _is_digest, what)
    chunks = field(record, "chunks", is_list, what)
    require(all(map(_is_digest, chunks)), f"has {what} with a chunk whose digest is none")
    require(len(chunks) == -(-size // CHUNK), f"has {what} of {size} bytes with the digests of {len(chunks)} chunks")
    spans = [_span(piece, name) for piece in field(record, "pieces", is_list, what)]
    begin = size - sum(4 * (span.stop - span.start) for span in spans)
    require(8 < begin <= 8 + MAX_HEADER, f"has {what} of {size} bytes, which are not a header and its pieces")
    begins = []
    for span in spans:
        begins.append((span, begin))
        begin += 4 * (span.stop - span.start)
    return Shard(name, size, tuple(chunks), tuple(begins))


def _span(piece: Any, shard: str) -> Span:
    what = f"a piece of shard {shard}"
    plane = field(piece, "plane", is_name, what)
    fragment, start, stop = (field(piece, key, is_count, what) for key in ("fragment", "start", "stop"))
    require(start < stop, f"has {what} of elements [{start}, {stop})")
    return Span(plane, fragment, start, stop, shard)


def field(record: Any, key: str, fits: Callable[[Any], bool], what: str) -> Any:
    """The value of a key of a JSON object that came from a store; FormatError, naming `what`, unless it fits."""
    value = record.get(key) if isinstance(record, dict) else None
    require(fits(value), f"has {what} with {key} {value!r:.60}")
    return value


def is_list(value: Any) -> bool:
    """Whether this is a JSON array."""
    return isinstance(value, list)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))
