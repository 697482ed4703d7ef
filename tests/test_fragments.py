"""The flat layout: fragments, blocks, rank slices, cells and digests, for any shapes and worlds."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from diloco.averaging import Averaging
from diloco.codec import CODECS
from diloco.fragments import BLOCK, Fragment, Slot, block_digests, digest, group_parameters
from elastic.plan import cells, chunks, ownership, rank_blocks

WORLD = st.integers(1, 9)
BLOCKS = st.integers(1, 40)


def fragment_of(elements: int, block: int) -> Fragment:
    return Fragment(0, (Slot("x", (elements,), 0),), block)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[tuple[str, tuple[int, ...]]], dict[str, int], int]:
    """Parameters in a model's order, the layer of some of them, and a number of fragments that it can have."""
    shape = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)
    layer = st.none() | st.integers(0, 5)
    drawn = draw(st.lists(st.tuples(shape, layer), min_size=1, max_size=20))
    parameters = [(f"p{i}", shape) for i, (shape, _) in enumerate(drawn)]
    layers = {f"p{i}": of for i, (_, of) in enumerate(drawn) if of is not None}
    others = len(drawn) - len(layers)
    possible = [n for n in range(1, 7) if len({of % n for of in layers.values()}) + others >= n]
    return parameters, layers, draw(st.sampled_from(possible))


# Grouping


def test_golden_grouping() -> None:
    """Four layers in two fragments; the embedding (first by size) and the rest even them out."""
    parameters = [
        ("embed", (10, 4)),
        ("layers.0.w", (4, 4)),
        ("layers.0.b", (4,)),
        ("layers.1.w", (4, 4)),
        ("layers.2.w", (4, 4)),
        ("layers.3.w", (2, 4)),
        ("norm", (4,)),
        ("head", (4, 10)),
    ]
    layers = {name: int(name.split(".")[1]) for name, _ in parameters if name.startswith("layers.")}
    even, odd = group_parameters(parameters, layers, 2)
    # Layers 0 and 2 are 36 elements, layers 1 and 3 are 24. embed (40) goes to odd, head (40) to even (36 < 64),
    # norm (4) to odd (64 < 76).
    assert [(s.name, s.start, s.stop) for s in even.slots] == [
        ("layers.0.w", 0, 16),
        ("layers.0.b", 16, 20),
        ("layers.2.w", 20, 36),
        ("head", 36, 76),
    ]
    assert [s.name for s in odd.slots] == ["embed", "layers.1.w", "layers.3.w", "norm"]
    assert (even.index, odd.index, even.elements, odd.elements, even.block) == (0, 1, 76, 68, BLOCK)


@given(models(), st.integers(1, 50))
def test_slots_partition_the_fragments(model: tuple, block: int) -> None:
    parameters, layers, count = model
    fragments = group_parameters(parameters, layers, count, block)
    assert [f.index for f in fragments] == list(range(count))
    for fragment in fragments:
        assert fragment.slots[0].start == 0
        assert all(a.stop == b.start for a, b in pairwise(fragment.slots))
        assert all(slot.stop - slot.start == prod(slot.shape) for slot in fragment.slots)
        assert fragment.elements == sum(prod(slot.shape) for slot in fragment.slots)
        assert fragment.block == block
    placed = [(slot.name, slot.shape) for fragment in fragments for slot in fragment.slots]
    assert sorted(placed) == sorted(parameters), "every parameter once"
    order = [name for name, _ in parameters]
    for fragment in fragments:
        positions = [order.index(slot.name) for slot in fragment.slots]
        assert positions == sorted(positions), "the model's own order inside a fragment"


@given(models())
def test_layers_are_strided_and_the_rest_evens_out(model: tuple) -> None:
    parameters, layers, count = model
    fragments = group_parameters(parameters, layers, count)
    home = {slot.name: fragment.index for fragment in fragments for slot in fragment.slots}
    assert all(home[name] == layer % count for name, layer in layers.items())
    sizes = [sum(prod(s) for n, s in parameters if n in layers and home[n] == f) for f in range(count)]
    others = [prod(shape) for name, shape in parameters if name not in layers]
    # Filling up the smallest never makes the spread larger than one item.
    spread = max([max(sizes) - min(sizes), *others])
    filled = [fragment.elements for fragment in fragments]
    assert max(filled) - min(filled) <= spread


def test_largest_first() -> None:
    """In the model's order 1, 1, 2 would give 3 and 1; largest first gives 2 and 2."""
    fragments = group_parameters([("a", (1,)), ("b", (1,)), ("c", (2,))], {}, 2)
    assert [f.elements for f in fragments] == [2, 2]


@given(st.integers(1, 500), st.integers(1, 60))
def test_blocks_and_spans(elements: int, block: int) -> None:
    fragment = fragment_of(elements, block)
    spans = [fragment.span(i, i + 1) for i in range(fragment.blocks)]
    assert spans[0][0] == 0 and spans[-1][1] == elements
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert all(stop - start == block for start, stop in spans[:-1])
    assert 0 < spans[-1][1] - spans[-1][0] <= block
    assert fragment.span(fragment.blocks, fragment.blocks) == (elements, elements), "an empty slice at the end"


# Rank slices and cells


@given(BLOCKS, WORLD)
def test_rank_slices_partition_the_blocks(blocks: int, world: int) -> None:
    slices = [rank_blocks(blocks, rank, world) for rank in range(world)]
    assert [b for first, last in slices for b in range(first, last)] == list(range(blocks))
    lengths = [last - first for first, last in slices]
    assert max(lengths) - min(lengths) <= 1, "as equal as whole blocks allow"


@given(BLOCKS, st.lists(WORLD, min_size=1, max_size=4))
def test_cells_refine_every_members_slices(blocks: int, worlds: list[int]) -> None:
    found = cells(blocks, worlds, ownership([1.0] * len(worlds)))
    assert [b for cell in found for b in range(cell.first, cell.last)] == list(range(blocks))
    for cell in found:
        assert cell.first < cell.last and len(cell.ranks) == len(worlds)
        for rank, world in zip(cell.ranks, worlds, strict=True):
            first, last = rank_blocks(blocks, rank, world)
            assert first <= cell.first and cell.last <= last
        owned = [cell.owned(member) for member in range(len(worlds))]
        assert [b for first, last in owned for b in range(first, last)] == list(range(cell.first, cell.last))
        shares = [last - first for first, last in owned]
        assert max(shares) - min(shares) <= 1, "an equal share of every cell"
    assert all(a.ranks != b.ranks for a, b in pairwise(found)), "no cut that no member has"


def test_golden_cells() -> None:
    """Ten blocks in regions of 4, 1 and 3 ranks."""
    found = cells(10, [4, 1, 3], ownership([1.0] * 3))
    assert [(c.first, c.last, c.ranks) for c in found] == [
        (0, 2, (0, 0, 0)),
        (2, 3, (1, 0, 0)),
        (3, 5, (1, 0, 1)),
        (5, 6, (2, 0, 1)),
        (6, 7, (2, 0, 2)),
        (7, 10, (3, 0, 2)),
    ]
    assert [found[-1].owned(m) for m in range(3)] == [(7, 8), (8, 9), (9, 10)]
    assert [found[0].owned(m) for m in range(3)] == [(0, 1), (1, 1), (1, 2)]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 8))
def test_chunks_cut_a_run(first: int, length: int, size: int) -> None:
    found = chunks(first, first + length, size)
    assert [b for a, z in found for b in range(a, z)] == list(range(first, first + length))
    assert all(z - a == size for a, z in found[:-1]) and all(0 < z - a <= size for a, z in found)


# Digests


@given(st.integers(1, 300), st.integers(1, 40), WORLD, st.integers(0, 2**32 - 1))
def test_digest_does_not_depend_on_who_computed_it(elements: int, block: int, world: int, seed: int) -> None:
    fragment = fragment_of(elements, block)
    flat = torch.from_numpy(np.random.default_rng(seed).normal(size=elements).astype("f4"))
    whole = block_digests(flat, block)
    assert len(whole) == 32 * fragment.blocks
    parts = []
    for rank in range(world):
        start, stop = fragment.span(*rank_blocks(fragment.blocks, rank, world))
        parts.append(block_digests(flat[start:stop], block))
    assert b"".join(parts) == whole
    raw = flat.numpy().astype("<f4").tobytes()
    hashes = [blake3(raw[i : i + 4 * block]).digest() for i in range(0, len(raw), 4 * block)]
    assert digest(whole) == blake3(b"".join(hashes)).hexdigest()
    at = seed % elements
    flat[at] += 1
    other = block_digests(flat, block)
    changed = [i for i in range(fragment.blocks) if other[32 * i : 32 * i + 32] != whole[32 * i : 32 * i + 32]]
    assert changed == [at // block], "one element, one block"


def test_digest_sees_the_bits_not_the_values() -> None:
    zero = torch.zeros(3)
    assert block_digests(zero, 2) != block_digests(-zero, 2)
    assert block_digests(torch.empty(0), 2) == b""
    strided = torch.arange(6.0).view(3, 2).t()[0]
    assert block_digests(strided, 2) == block_digests(torch.tensor([0.0, 2.0, 4.0]), 2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("elements", [1, 256, 512, 513, 1024, 2000, 2304])
def test_encoded_digests_do_not_depend_on_who_computed_them(codec: str, elements: int) -> None:
    averaging = Averaging([fragment_of(elements, 512)], CODECS[codec])
    blocks = averaging.blocks(0)
    data = averaging.encode(0, torch.from_numpy(np.random.default_rng(0).normal(size=elements).astype("f4")))
    whole = averaging.digests(0, 0, blocks, data)
    assert len(whole) == 32 * blocks
    for world in (1, 2, 3, 7):
        parts = []
        for rank in range(world):
            first, last = rank_blocks(blocks, rank, world)
            begin, end = averaging.size(0, 0, first), averaging.size(0, 0, last)
            assert end - begin == averaging.size(0, first, last)
            parts.append(averaging.digests(0, first, last, data[begin:end]))
        assert b"".join(parts) == whole
