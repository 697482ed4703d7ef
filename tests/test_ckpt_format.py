"""The checkpoint format: what no honest writer writes is refused with a finding, whatever its digest says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from blake3 import blake3

from ckpt import format
from ckpt.format import FormatError, Piece


def sealed() -> dict[str, Any]:
    """A manifest of two shards that hold theta/0 (13 elements) in two pieces."""
    cuts = [("rank-0", 0, 7), ("rank-1", 7, 13)]
    shards = [
        {
            "name": n,
            "bytes": 99,
            "sha256": "ab" * 32,
            "chunks": ["cd" * 32],
            "pieces": [{"plane": "theta", "fragment": 0, "start": a, "stop": b}],
        }
        for n, a, b in cuts
    ]
    return format.seal({"step": 7}, shards)


def edit_first_piece(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["shards"][0]["pieces"][0].update(fields)


def edit_first_shard(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["shards"][0].update(fields)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no format version": lambda m: m.pop("format"),
    "no format version but True": lambda m: m.update(format=True),
    "has format version 3, and this program reads 4": lambda m: m.update(format=3),
    "has format version 5, and this program reads 4": lambda m: m.update(format=5),
    "with shards None": lambda m: m.pop("shards"),
    "with shards 7": lambda m: m.update(shards=7),
    "a shard with name None": lambda m: m.update(shards=[3]),
    "name '../../etc/passwd'": edit_first_shard(name="../../etc/passwd"),
    "name '/etc/passwd'": edit_first_shard(name="/etc/passwd"),
    r"name '\.\.'": edit_first_shard(name=".."),
    r"name 'a\\x00'": edit_first_shard(name="a\0"),
    "names a shard twice": lambda m: m["shards"].append({**m["shards"][0], "bytes": 20, "pieces": []}),
    "bytes -1": edit_first_shard(bytes=-1),
    "bytes True": edit_first_shard(bytes=True),
    r"bytes 1\.5": edit_first_shard(bytes=1.5),
    "bytes '9'": edit_first_shard(bytes="9"),
    "bytes 1{24}": edit_first_shard(bytes=int("1" * 24)),
    "sha256 None": edit_first_shard(sha256=None),
    "sha256 'ABC": edit_first_shard(sha256="ABCD" * 16),
    "chunks None": edit_first_shard(chunks=None),
    "a chunk whose digest is none": edit_first_shard(chunks=["AB" * 32]),
    "of 99 bytes with the digests of 0 chunks": edit_first_shard(chunks=[]),
    "of 99 bytes with the digests of 2 chunks": edit_first_shard(chunks=["cd" * 32] * 2),
    "of 36 bytes, which are not a header": edit_first_shard(bytes=36),
    f"of {1 << 50} bytes with the digests of 1 chunks": edit_first_shard(bytes=1 << 50),
    "of 67108901 bytes, which are not a header": edit_first_shard(
        bytes=8 + format.MAX_HEADER + 4 * 7 + 1, chunks=["cd" * 32] * 5
    ),
    "pieces {}": edit_first_shard(pieces={}),
    "plane None": edit_first_shard(pieces=["x"]),
    "plane '../x'": edit_first_piece(plane="../x"),
    "plane 1": edit_first_piece(plane=1),
    "fragment None": edit_first_piece(fragment=None),
    "start -1": edit_first_piece(start=-1),
    r"of elements \[0, 0\)": edit_first_piece(stop=0),
    "stop 9007199254740992": edit_first_piece(stop=1 << 53),
    r"misses elements \[0, 1\) of theta/0": edit_first_piece(start=1),
    r"misses elements \[6, 7\) of theta/0": edit_first_piece(stop=6),
    "overlapping the piece before it, which ends at 8": edit_first_piece(stop=8),
    "a 'prefix'": lambda m: m.update(prefix="/etc"),
}


@pytest.mark.parametrize("finding", HOSTILE)
def test_hostile_manifests_with_a_right_digest(finding: str) -> None:
    manifest = sealed()
    assert format.open_manifest(format.encode_json(manifest)) == manifest
    HOSTILE[finding](manifest)
    manifest["digest"] = format.digest(manifest)
    with pytest.raises(FormatError, match=finding) as caught:
        format.open_manifest(format.encode_json(manifest))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"7", b"\xff\xfe", b'{"format": NaN}', b'{"format": 3, "x": 1e999}', b"[" * 100_000]
    + [b'{"format": 3, "digest": "", "x": ' + b"[" * n + b"]" * n + b"}" for n in (300, 500, 900, 980, 5000)],
)
def test_manifests_that_are_hardly_json(raw: bytes) -> None:
    with pytest.raises(FormatError):
        format.open_manifest(raw)


def test_nesting_at_the_limits_of_reading_and_of_writing() -> None:
    # Which limit comes first depends on Python's version, and where on the stack, which is short in a thread.
    depths = [*range(970, 1000), 5000, 20_000]
    raws = [b'{"format": 3, "digest": "", "x": ' + b"[" * n + b"]" * n + b"}" for n in depths]
    with ThreadPoolExecutor(1) as pool:
        errors = [pool.submit(format.open_manifest, raw).exception() for raw in raws]
    assert {type(error) for error in errors} == {FormatError}


def test_other_keys_of_a_shard_are_left_alone() -> None:
    shards = [{**record, "region": "eu"} for record in sealed()["shards"]]
    manifest = format.seal({}, shards)
    assert format.open_manifest(format.encode_json(manifest))["shards"][0]["region"] == "eu"


def offsets(name: str, begin: Any, end: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update(data_offsets=[begin, end])


BAD_HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "hold the pieces": lambda h: h.pop("theta/1/0"),
    "not hold the pieces": lambda h: h.update({"theta/2/0": h["theta/1/0"]}),
    "hold theta/0/0 as 13": lambda h: h["theta/0/0"].update(dtype="I32"),
    "hold theta/0/0 as 13 fp32": lambda h: h["theta/0/0"].update(shape=[12]),
    "hold theta/1/0 as 5 fp32": lambda h: h.update({"theta/1/0": 3}),
    "no offsets for theta/0/0": offsets("theta/0/0", 0, "52"),
    "has no offsets for theta/0/0": offsets("theta/0/0", -52, 0),
    "48 bytes for the 13": offsets("theta/0/0", 0, 48),
    r"theta/1/0 at byte \d+, and not at": offsets("theta/1/0", 0, 20),  # overlaps
    "theta/1/0 at byte 1": offsets("theta/1/0", 900, 920),  # beyond the end
}


def shard() -> tuple[bytes, format.Shard]:
    pieces = [Piece("theta", 0, 0, 13, torch.zeros(13)), Piece("theta", 1, 0, 5, torch.ones(5))]
    raw = format.encode_shard(pieces)
    return raw, format.shards_of({"shards": [format.shard_record("s", raw, pieces)]})[0]


@pytest.mark.parametrize("finding", BAD_HEADERS)
def test_hostile_shard_headers(finding: str) -> None:
    raw, record = shard()
    length = format.header_length(raw[:8], len(raw))
    assert [begin for _, begin in record.begins] == [8 + length, 60 + length]
    format.check_header(raw[8 : 8 + length], record)
    header = json.loads(raw[8 : 8 + length])
    BAD_HEADERS[finding](header)
    text = json.dumps(header).encode().ljust(length + 100)
    begins = tuple((span, begin + 100) for span, begin in record.begins)
    with pytest.raises(FormatError, match=finding):
        format.check_header(text, format.Shard("s", 8 + len(text) + 72, record.chunks, begins))


def test_shard_headers_that_are_none() -> None:
    for text in (b"[]", b"{", b"", b"\xff", b"[" * 100_000):
        with pytest.raises(FormatError):
            format.check_header(text, shard()[1])


def test_tensors_must_end_with_the_object() -> None:
    """Sizes and pieces of a manifest say how long the header is; another header does not fit."""
    raw, record = shard()
    length = format.header_length(raw[:8], len(raw))
    with pytest.raises(FormatError, match="theta/0/0 at byte"):
        format.check_header(raw[8 : 8 + length] + b" ", record)


def test_chunks_are_digests_of_the_object_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "CHUNK", 100)
    record = format.shard_record("s", bytes(range(250)), [])
    parts = [bytes(range(a, min(a + 100, 250))) for a in (0, 100, 200)]
    assert record["chunks"] == [blake3(part).hexdigest() for part in parts]
    assert record["sha256"] == hashlib.sha256(bytes(range(250))).hexdigest() and record["bytes"] == 250


def test_header_lengths_are_bounded_by_the_object_and_a_limit() -> None:
    def says(length: int, size: int) -> int:
        return format.header_length(length.to_bytes(8, "little"), size)

    assert says(92, 100) == 92 and says(format.MAX_HEADER, 1 << 40) == format.MAX_HEADER
    for length, size in [(93, 100), (format.MAX_HEADER + 1, 1 << 40), ((1 << 64) - 1, 1 << 40)]:
        with pytest.raises(FormatError, match=f"says that its header has {length} bytes"):
            says(length, size)
    with pytest.raises(FormatError, match="has only 7 bytes"):
        format.header_length(b"1234567", 7)
