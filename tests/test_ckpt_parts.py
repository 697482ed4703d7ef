"""Shares, totals and their settlement, for any members, ranks and cuts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt import parts
from ckpt.format import FormatError
from ckpt.parts import Attempt, Held, Part, settle

BLOCK = 4


def attempt(member: str, rank: int, ranks: int, members: list[str], sizes: list[int]) -> Attempt:
    found = []
    for f, size in enumerate(sizes):
        blocks = -(-size // BLOCK)
        start, stop = (min(BLOCK * (blocks * edge // ranks), size) for edge in (rank, rank + 1))
        if start < stop:
            found.append(Held("theta", f, start, stop, size, 0))
    return Attempt("p/1", {}, member, rank, ranks, tuple(members), 0, True, BLOCK, 1.0, 1.0, tuple(found))


def part_of(a: Attempt, index: int, total: int) -> Part:
    spans = [[p.fragment, p.start, p.stop] for p in parts.portion(a, index)]
    return Part(a.member, a.rank, a.ranks, a.members, index, ({"spans": spans},), {"theta/0": total})


@settings(deadline=None)
@given(st.data())
def test_shares_that_are_there_tile_everything_and_others_are_missing(data: st.DataObject) -> None:
    """Whoever made up for whom, with whatever ranks: one source each, so nothing overlaps."""
    worlds = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    members = [f"m{i}" for i in range(len(worlds))]
    every = [
        part_of(attempt(member, rank, ranks, members, sizes), index, 3 if rank == 0 else 0)
        for member, ranks in zip(members, worlds, strict=True)
        for rank in range(ranks)
        for index in range(len(members))
    ]
    there = data.draw(st.lists(st.sampled_from(every), unique_by=id))
    settled = settle(there, members)

    def whole(member: str, index: int) -> bool:
        have = {p.rank for p in there if p.member == member and p.share == index}
        return len(have) == worlds[members.index(member)]

    assert settled.differ == ""
    assert settled.missing == [i for i in range(len(members)) if not any(whole(m, i) for m in members)]
    assert settle(every, members).missing == []
    for chosen, complete in ((settled.shards, not settled.missing), (settle(every, members).shards, True)):
        for f, size in enumerate(sizes):
            spans = sorted((a, b) for record in chosen for g, a, b in record["spans"] if g == f)
            assert all(one[1] <= other[0] for one, other in pairwise(spans)), "no overlap"
            assert not complete or sum(b - a for a, b in spans) == size


@given(st.binary(max_size=300), st.lists(st.integers(0, 20)))
def test_digests_add_up_over_any_cut_into_blocks(data: bytes, cuts: list[int]) -> None:
    size, total = 16, 0
    edges = sorted({0, -(-len(data) // size), *(min(c, len(data) // size) for c in cuts)})
    for first, last in pairwise(edges):
        total += parts.block_sum(memoryview(data)[first * size : last * size], first, size)
    assert total % parts.MODULUS == parts.block_sum(memoryview(data), 0, size)


def test_digests_are_what_they_are() -> None:
    golden = sum(
        int.from_bytes(blake3(bytes([index, 0, 0, 0, 0, 0, 0, 0]) + block).digest(), "little")
        for index, block in ((2, b"abcd"), (3, b"ef"))
    )
    assert parts.block_sum(memoryview(b"abcdef"), 2, 4) == golden % parts.MODULUS
    assert parts.block_sum(memoryview(b"efab"), 0, 2) != parts.block_sum(memoryview(b"abef"), 0, 2)


def test_members_that_differ_are_named_once_all_their_ranks_have_spoken() -> None:
    def said(member: str, rank: int, total: int) -> Part:
        return Part(member, rank, 2, ("a", "b"), 0, (), {"theta/0": total, "x/0": 5})

    half = [said("a", 0, 1), said("a", 1, 2), said("b", 0, 0)]
    assert settle(half, ["a", "b"]).differ == ""
    assert settle([*half, said("b", 1, 3)], ["a", "b"]).differ == ""
    odd = [*half, said("b", 1, 4)]
    assert settle(odd, ["a", "b"]).differ == "theta/0: a against b"
    assert settle([*odd, said("c", 0, 1), said("c", 1, 2)], ["a", "b"]).differ == "theta/0: b against a, c"


@given(st.lists(st.integers(1, 50), max_size=6), st.integers(1, 30))
def test_shards_hold_all_pieces_in_bounded_size(lengths: list[int], size: int) -> None:
    pieces = [Held("x", f, 3, 3 + n, 99, 1000 * f) for f, n in enumerate(lengths)]
    groups = list(parts.shards(iter(pieces), size))
    assert all(0 < sum(p.stop - p.start for p in group) <= size for group in groups)
    flat = [
        (p.fragment, e, p.at + 4 * (e - p.start)) for group in groups for p in group for e in range(p.start, p.stop)
    ]
    assert flat == [(f, 3 + i, 1000 * f + 4 * i) for f, n in enumerate(lengths) for i in range(n)]


@given(st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b'{"format": 3, "rank": 0, "ranks": 0}']))
def test_what_is_no_part_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parts.decode_part(raw)


def test_a_part_comes_back() -> None:
    part = Part("eu_1", 1, 2, ("eu_1", "us_2"), 0, ({"name": "s"},), {"theta/0": 7})
    name, data = parts.encode_part(part)
    assert parts.decode_part(data) == part and name.startswith("eu_1-1-")
