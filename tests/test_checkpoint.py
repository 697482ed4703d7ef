"""Checkpoints: any range comes back whatever mesh wrote it, and whatever is damaged is found."""

from __future__ import annotations

import ast
import copy
import hashlib
import itertools
import random
import uuid
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt.format
import ckpt.reading
from ckpt.checkpoint import MANIFEST, DamagedError, Piece, commit_manifest, load_manifest, save_shard
from ckpt.reading import Reader, Want, findings, newest, read_range, verify
from ckpt.store import MissingError, Store, StoreError

PREFIX = "ckpt/7"
SIZES = {("theta", 0): 13, ("theta", 1): 5, ("momentum", 0): 13}


def values(plane: str, fragment: int, elements: int) -> torch.Tensor:
    """Any bits, NaN and infinities among them, and always the same."""
    seed = int.from_bytes(hashlib.sha256(f"{plane}/{fragment}".encode()).digest()[:4], "little")
    return (
        torch.randint(-(1 << 31), 1 << 31, (elements,), generator=torch.Generator().manual_seed(seed))
        .int()
        .view(torch.float32)
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


def save(store: Store, world: int, sizes: dict[tuple[str, int], int] = SIZES, prefix: str = PREFIX) -> dict[str, Any]:
    """A checkpoint as `world` ranks write it, each its share of every fragment of every plane."""
    records = []
    for rank in range(world):
        pieces = []
        for (plane, fragment), elements in sizes.items():
            share = -(-elements // world)
            start, stop = min(rank * share, elements), min((rank + 1) * share, elements)
            pieces.append(Piece(plane, fragment, start, stop, values(plane, fragment, elements)[start:stop]))
        records.append(save_shard(store, prefix, f"rank-{rank}", pieces))
    return commit_manifest(store, prefix, {"step": 7, "nested": {"lr": [0.1, 1e-9]}}, records)


CHUNK = 4096


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt.format, "CHUNK", CHUNK)
    monkeypatch.setattr(ckpt.reading, "CHUNK", CHUNK)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_range_comes_back_whatever_mesh_wrote_it(data: st.DataObject) -> None:
    elements = data.draw(st.integers(1, 300), "elements")
    world = data.draw(st.integers(1, 9), "writers")
    readers = data.draw(st.integers(1, 9), "readers")
    store = Store(f"memory://{uuid.uuid4().hex}/run")
    manifest = save(store, world, {("theta", 3): elements, ("x", 0): 1})
    whole = values("theta", 3, elements)
    start = data.draw(st.integers(0, elements), "start")
    stop = data.draw(st.integers(start, elements), "stop")
    assert same_bits(read_range(store, manifest, "theta", 3, start, stop), whole[start:stop])
    reader, cuts = Reader(store, manifest), [elements * rank // readers for rank in range(readers + 1)]
    parts = [reader.read("theta", 3, a, b) for a, b in itertools.pairwise(cuts)]
    assert same_bits(torch.cat(parts), whole)
    verify(store, load_manifest(store, PREFIX))


def test_load_returns_what_commit_returned(store: Store) -> None:
    manifest = save(store, 3)
    assert load_manifest(store, PREFIX) == manifest
    assert manifest["step"] == 7 and manifest["nested"] == {"lr": [0.1, 1e-9]}
    assert manifest["format"] == ckpt.format.FORMAT and manifest["prefix"] == PREFIX
    assert b"prefix" not in store.read(f"{PREFIX}/{MANIFEST}")  # a checkpoint can be moved
    verify(store, manifest)


def test_reader_knows_sizes(store: Store) -> None:
    reader = Reader(store, save(store, 2))
    assert [reader.elements(*key) for key in SIZES] == list(SIZES.values())
    assert reader.elements("theta", 9) == reader.elements("none", 0) == 0


def test_shards_are_safetensors_files(store: Store) -> None:
    manifest = save(store, 2)
    for record in manifest["shards"]:
        raw = store.read(f"{PREFIX}/{record['name']}.safetensors")
        assert len(raw) == record["bytes"] and hashlib.sha256(raw).hexdigest() == record["sha256"]
        tensors = safetensors.torch.load(raw)
        assert tensors.keys() == {f"{p['plane']}/{p['fragment']}/{p['start']}" for p in record["pieces"]}
        for piece in record["pieces"]:
            tensor = tensors[f"{piece['plane']}/{piece['fragment']}/{piece['start']}"]
            whole = values(piece["plane"], piece["fragment"], SIZES[piece["plane"], piece["fragment"]])
            assert same_bits(tensor, whole[piece["start"] : piece["stop"]])


def test_a_shard_of_the_safetensors_library_is_read(store: Store) -> None:
    tensors = {"exp/0/0": values("exp", 0, 4), "theta/0/0": values("theta", 0, 6)}  # by name, as it writes them
    raw = safetensors.torch.save(tensors)
    store.create(f"{PREFIX}/s.safetensors", raw)
    pieces = [{"plane": n.split("/")[0], "fragment": 0, "start": 0, "stop": len(t)} for n, t in tensors.items()]
    digest = blake3(raw).hexdigest()
    record = {"name": "s", "bytes": len(raw), "sha256": digest, "chunks": [digest], "pieces": pieces}
    manifest = commit_manifest(store, PREFIX, {}, [record])
    for name, tensor in tensors.items():
        assert same_bits(read_range(store, manifest, name.split("/")[0], 0, 1, 4), tensor[1:4])


def test_a_header_longer_than_a_chunk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    sizes = {("a_plane_with_quite_a_long_name_" * 4, n): 1 for n in range(1000)}
    manifest = save(store, 1, sizes)
    assert store.size(f"{PREFIX}/rank-0.safetensors") > 2 * CHUNK  # nearly all of it header
    verify(store, manifest)
    plane = next(iter(sizes))[0]
    assert same_bits(read_range(store, manifest, plane, 499, 0, 1), values(plane, 499, 1))


def test_nothing_is_overwritten(store: Store) -> None:
    def one(tensor: torch.Tensor) -> dict[str, Any]:
        return save_shard(store, PREFIX, "s", [Piece("x", 0, 0, 2, tensor)])

    record = one(torch.zeros(2))
    assert one(torch.zeros(2)) == record
    with pytest.raises(StoreError, match="exists with other contents"):
        one(torch.ones(2))
    manifest = commit_manifest(store, PREFIX, {"step": 1}, [record])
    assert commit_manifest(store, PREFIX, {"step": 1}, [record]) == manifest
    with pytest.raises(StoreError, match="never overwritten"):
        commit_manifest(store, PREFIX, {"step": 2}, [record])
    assert load_manifest(store, PREFIX)["step"] == 1


def test_empty_pieces_and_shards(store: Store) -> None:
    manifest = save(store, 8, {("theta", 0): 3})  # five ranks hold nothing
    assert [len(record["pieces"]) for record in manifest["shards"]] == [1, 1, 1, 0, 0, 0, 0, 0]
    verify(store, manifest)
    assert same_bits(read_range(store, manifest, "theta", 0, 0, 3), values("theta", 0, 3))
    assert read_range(store, manifest, "theta", 0, 3, 3).shape == (0,)


@pytest.mark.parametrize(
    "piece",
    [
        Piece("x", 0, 0, 2, torch.zeros(3)),
        Piece("x", 0, 0, 4, torch.zeros(2, 2)),
        Piece("x", 0, 0, 2, torch.zeros(2, dtype=torch.bfloat16)),
        Piece("x", 0, 0, 2, torch.zeros(2, device="meta")),
        Piece("../x", 0, 0, 2, torch.zeros(2)),
        Piece("x", -1, 0, 2, torch.zeros(2)),
        Piece("x", 0, -2, 0, torch.zeros(2)),
    ],
)
def test_bad_pieces_are_refused(store: Store, piece: Piece) -> None:
    with pytest.raises(ValueError):
        save_shard(store, PREFIX, "s", [piece])
    assert store.list() == []


def test_bad_names_bodies_and_doubles_are_refused(store: Store) -> None:
    piece = Piece("x", 0, 0, 1, torch.zeros(1))
    with pytest.raises(ValueError, match="given twice"):
        save_shard(store, PREFIX, "s", [piece, piece])
    for name in ("../s", "a/b", "", ".s"):
        with pytest.raises(ValueError, match="shard name"):
            save_shard(store, PREFIX, name, [piece])
    for key in ("format", "shards", "digest", "prefix"):
        with pytest.raises(ValueError, match=key):
            commit_manifest(store, PREFIX, {key: 1}, [])
    with pytest.raises(ValueError):
        commit_manifest(store, PREFIX, {"loss": float("nan")}, [])
    assert store.list() == []


def test_missing_parts_are_damage_and_a_missing_manifest_is_missing(store: Store) -> None:
    manifest = save(store, 3)
    for plane, fragment, stop in [("theta", 0, 14), ("theta", 2, 1), ("v", 0, 1), ("theta", 0, 1 << 60)]:
        with pytest.raises(DamagedError, match="and not"):
            read_range(store, manifest, plane, fragment, 0, stop)
    with pytest.raises(ValueError, match="not a range"):
        read_range(store, manifest, "theta", 0, 3, 2)
    store.delete(f"{PREFIX}/rank-1.safetensors")
    with pytest.raises(DamagedError, match=r"rank-1\.safetensors is damaged: it is missing"):
        verify(store, manifest)
    with pytest.raises(DamagedError, match="is missing"):
        read_range(store, manifest, "theta", 0, 0, 13)
    assert same_bits(read_range(store, manifest, "theta", 0, 0, 5), values("theta", 0, 13)[:5])
    with pytest.raises(MissingError):
        load_manifest(store, "ckpt/8")


def test_an_object_that_is_shorter_than_its_manifest_or_its_store_says(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = save(store, 1)
    key = f"{PREFIX}/rank-0.safetensors"
    raw = store.read(key)
    store.write(key, raw[:-1])
    with pytest.raises(DamagedError, match=f"has {len(raw) - 1} bytes, not the {len(raw)} of the manifest"):
        verify(store, manifest)
    monkeypatch.setattr(store, "size", lambda _: len(raw))  # as if it was cut since it was looked at
    with pytest.raises(DamagedError, match="ends within bytes"):
        read_range(store, manifest, "theta", 0, 0, 13)
    with pytest.raises(DamagedError, match="ends within bytes"):
        verify(store, manifest)


def test_sizes_are_checked_before_memory_is_allocated(store: Store) -> None:
    manifest = save(store, 1, {("theta", 0): 13})
    manifest["shards"][0]["pieces"][0]["stop"] = 1 << 50  # 4 PiB
    with pytest.raises(DamagedError, match="which are not a header and its pieces"):
        read_range(store, manifest, "theta", 0, 0, 1 << 50)


def flips(raw: bytes) -> list[bytes]:
    out = []
    for position in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        out.append(bytes(flipped))
    return out


def test_every_flipped_bit_and_cut_of_a_manifest_is_found() -> None:
    store = Store(f"memory://{uuid.uuid4().hex}/run")
    save(store, 1, {("theta", 0): 2})
    raw = store.read(f"{PREFIX}/{MANIFEST}")
    for damaged in [*flips(raw), *(raw[:n] for n in range(len(raw))), raw + b"\n", b" " + raw]:
        store.write(f"{PREFIX}/{MANIFEST}", damaged)
        with pytest.raises(DamagedError):
            load_manifest(store, PREFIX)
    store.write(f"{PREFIX}/{MANIFEST}", raw)
    load_manifest(store, PREFIX)


def test_every_flipped_bit_and_cut_of_a_shard_is_found() -> None:
    store = Store(f"memory://{uuid.uuid4().hex}/run")
    manifest = save(store, 1, {("theta", 0): 2})
    key = f"{PREFIX}/rank-0.safetensors"
    raw = store.read(key)
    for damaged in [*flips(raw), *(raw[:n] for n in range(len(raw))), raw + b"\0"]:
        store.write(key, damaged)
        with pytest.raises(DamagedError):
            verify(store, manifest)
        if len(damaged) <= len(raw):  # what comes after the end is not read
            with pytest.raises(DamagedError) as caught:
                read_range(store, manifest, "theta", 0, 0, 2)
            assert "\n" not in str(caught.value)


def test_a_hostile_manifest_reads_nothing_outside_its_folder(store: Store) -> None:
    manifest = save(store, 2)
    del manifest["prefix"]
    manifest["shards"][0]["name"] = "../../secret"
    manifest["digest"] = ckpt.format.digest(manifest)
    store.write(f"{PREFIX}/{MANIFEST}", ckpt.format.encode_json(manifest))
    with pytest.raises(DamagedError, match=r"^\S+: ckpt/7/manifest\.json is damaged: it has .*'\.\./\.\./secret'$"):
        load_manifest(store, PREFIX)
    for use in (Reader, verify):  # nor when somebody hands it over without loading it
        with pytest.raises(DamagedError, match="secret"):
            use(store, {**manifest, "prefix": PREFIX})


def test_a_manifest_that_is_too_large_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    monkeypatch.setattr(ckpt.format, "MAX_MANIFEST", 100)
    monkeypatch.setattr(store, "read", lambda *_: pytest.fail("was read"))
    with pytest.raises(DamagedError, match="more than any manifest"):
        load_manifest(store, PREFIX)


def test_commit_refuses_gaps_and_overlaps(store: Store) -> None:
    records = save(store, 3)["shards"]
    for shards in ([records[0], records[2]], [*records, {**records[0], "name": "again"}]):
        with pytest.raises(DamagedError, match=r"misses|overlapping"):
            commit_manifest(store, "ckpt/8", {}, shards)
    assert not store.exists(f"ckpt/8/{MANIFEST}")


def test_newest_skips_and_reports_what_is_damaged(store: Store) -> None:
    for number in (5, 9, 10, 11, 12, 13):
        save(store, 2, prefix=f"ckpt/{number}")
    save(store, 1, prefix="ckpt/x14")
    save(store, 1, prefix="elsewhere/99")
    store.delete(f"ckpt/13/{MANIFEST}")  # was never committed: no checkpoint, and no report
    store.write(f"ckpt/12/{MANIFEST}", b"{}")
    store.write(f"ckpt/11/{MANIFEST}", store.read(f"ckpt/11/{MANIFEST}")[:-1])
    store.write(f"ckpt/9/{MANIFEST}", store.read(f"ckpt/9/{MANIFEST}").replace(b"rank-0", b"rank-9"))
    reports: list[tuple[str, str]] = []
    found = newest(store, "ckpt", lambda prefix, error: reports.append((prefix, str(error))))
    assert [manifest["prefix"] for manifest in found] == ["ckpt/10", "ckpt/5"]
    assert [prefix for prefix, _ in reports] == ["ckpt/12", "ckpt/11", "ckpt/9"]
    assert "format version" in reports[0][1] and "the way" in reports[1][1] and "digest" in reports[2][1]


def test_newest_logs_by_default_and_finds_nothing_in_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    assert list(newest(store, "ckpt")) == []
    store.write(f"ckpt/3/{MANIFEST}", b"{}")
    assert list(newest(store, "ckpt")) == []
    assert "checkpoint ckpt/3 is left out" in caplog.text


def test_newest_does_not_take_an_outage_for_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1, prefix="ckpt/1")
    save(store, 1, prefix="ckpt/2")

    def away(*_: Any) -> bytes:
        raise StoreError("the store is away")

    monkeypatch.setattr(store, "read", away)
    with pytest.raises(StoreError, match="away"):
        list(newest(store, "ckpt", lambda *_: pytest.fail("reported as damaged")))


def counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first byte, bytes) of every read of the store from now on."""
    real, fetched = store.view, []

    def counting(key: str, start: int, stop: int) -> memoryview:
        fetched.append((start, stop - start))
        return real(key, start, stop)

    monkeypatch.setattr(store, "view", counting)
    return fetched


def test_a_read_fetches_the_chunks_of_its_range_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    manifest = save(store, 1, {("theta", 0): 100_000})
    record, whole = manifest["shards"][0], values("theta", 0, 100_000)
    begin = record["bytes"] - 400_000
    assert len(record["chunks"]) == -(-record["bytes"] // CHUNK)
    fetched, reader = counted(store, monkeypatch), Reader(store, manifest)
    assert same_bits(reader.read("theta", 0, 10_000, 10_020), whole[10_000:10_020])
    first = (begin + 40_000) // CHUNK * CHUNK
    assert fetched == [(first, CHUNK)]
    for start in range(10_020, 20_000, 20):  # in order, in small steps: what was fetched serves them
        assert same_bits(reader.read("theta", 0, start, start + 20), whole[start : start + 20])
    assert fetched == [(at, CHUNK) for at in range(first, begin + 80_000, CHUNK)]


def test_many_ranges_at_once_and_what_is_damaged_elsewhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    manifest = save(store, 3, {("theta", 0): 100_000, ("momentum", 0): 100_000})
    wants = [Want(plane, 0, a, torch.empty(9_000)) for plane in ("theta", "momentum") for a in range(0, 90_000, 9_000)]
    Reader(store, manifest).read_into(wants)
    for want in wants:
        assert same_bits(want.out, values(want.plane, 0, 100_000)[want.start : want.stop])
    key = f"{PREFIX}/rank-2.safetensors"
    store.write(key, store.read(key)[:-1] + b"!")  # the last byte of the last piece
    read_range(store, manifest, "theta", 0, 0, 100_000)
    with pytest.raises(DamagedError, match=r"rank-2.*does not have the digest of the manifest in bytes"):
        read_range(store, manifest, "momentum", 0, 99_999, 100_000)


def test_a_thousand_flips_are_found_and_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any bit of any shard, by who reads all of its planes and by `verify`."""
    small_chunks(monkeypatch)
    manifest, rng = save(store, 3, {("theta", 0): 30_001, ("momentum", 0): 30_001}), random.Random(0)
    for flip in range(1000):
        record = rng.choice(manifest["shards"])
        key = f"{PREFIX}/{record['name']}.safetensors"
        raw = store.read(key)
        at = rng.randrange(8 * len(raw))
        damaged = bytearray(raw)
        damaged[at // 8] ^= 1 << at % 8
        store.write(key, bytes(damaged))
        begin, stop = at // 8 // CHUNK * CHUNK, min(at // 8 // CHUNK * CHUNK + CHUNK, len(raw))
        where = rf"{record['name']}\.safetensors is damaged: .* in bytes \[{begin}, {stop}\)"
        with pytest.raises(DamagedError, match=where):
            wants = [Want(plane, 0, 0, torch.empty(30_001)) for plane in ("theta", "momentum")]
            Reader(store, manifest).read_into(wants)
        if flip % 10 == 0:
            assert len(findings(store, manifest)) == 1
        store.write(key, raw)


def test_swapped_shards_are_found(store: Store) -> None:
    manifest = save(store, 2, {("theta", 0): 26})
    keys = [f"{PREFIX}/rank-{rank}.safetensors" for rank in range(2)]
    first, second = map(store.read, keys)
    store.write(keys[0], second)
    store.write(keys[1], first)
    assert len(findings(store, manifest)) == 2
    for start, name in ((0, "rank-0"), (13, "rank-1")):
        with pytest.raises(DamagedError, match=name):
            read_range(store, manifest, "theta", 0, start, start + 13)


def test_a_store_that_is_away_while_it_is_read_is_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = save(store, 3)

    def away(*_: Any) -> int:
        raise StoreError("the store is away")

    monkeypatch.setattr(store, "view", away)
    for read in (lambda: verify(store, manifest), lambda: read_range(store, manifest, "theta", 0, 0, 13)):
        with pytest.raises(StoreError, match="away"):
            read()


def test_load_does_not_change_with_the_caller(store: Store) -> None:
    body = {"step": 7, 3: (1, 2)}
    before = copy.deepcopy(body)
    manifest = commit_manifest(store, PREFIX, body, [])
    assert body == before and manifest["3"] == [1, 2] and load_manifest(store, PREFIX) == manifest


def test_ckpt_neither_unpickles_nor_imports_its_users() -> None:
    for path in Path(ckpt.format.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {
                "pickle",
                "marshal",
                "shelve",
                "diloco",
                "elastic",
            }, path
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"), path
