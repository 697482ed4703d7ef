"""Contributions and results: the same bytes whoever reads what first, residuals that lose nothing, sums in member order."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.averaging import Averaging
from diloco.codec import BUILDERS, CodecConfig, build_codec
from diloco.fragments import Fragment, Slot, block_digests
from elastic.exchange import NORM_SLACK
from tests import reference

BLOCK = 512
ELEMENTS = 36 * BLOCK + 100
CASES = [(name, "nearest") for name in BUILDERS] + [("int8", "stochastic"), ("int4", "stochastic")]
each_case = pytest.mark.parametrize(("codec", "rounding"), CASES)
seeds = st.integers(0, 2**32 - 1)


def averaging_of(codec: str, rounding: str = "nearest", elements: int = ELEMENTS, decay: float = 1.0) -> Averaging:
    fragment = Fragment(0, (Slot("x", (elements,), 0),), BLOCK)
    return Averaging([fragment], build_codec(CodecConfig(codec, rounding)), decay)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def same_bits(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def slice_of(averaging: Averaging, first: int, last: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """theta, local parameters and residual of the blocks [first, last)."""
    theta, local, residual = normal(seed, 3, averaging.elements(0, first, last))
    return theta, local, residual * 0.1


# A contribution


@each_case
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 37), (3, 37), (5, 21), (36, 37), (4, 4)])
def test_contribution_is_the_encoded_difference(
    codec: str, rounding: str, feedback: bool, first: int, last: int
) -> None:
    averaging = averaging_of(codec, rounding)
    theta, local, residual = slice_of(averaging, first, last)
    contribution = averaging.contribution(0, first, last, theta, local, residual if feedback else None, seed=7)
    delta = (theta - local + residual if feedback else theta - local).numpy()
    assert same_bits(contribution.read(first, last), reference.encode(codec, delta, BLOCK, rounding, 7, first))
    assert contribution.squares().dtype == torch.float64
    whole = torch.from_numpy(delta).double().square().sum().item()
    assert contribution.squares().item() == pytest.approx(whole, rel=1e-12)


@each_case
@given(cuts=st.lists(st.tuples(st.integers(2, 37), st.integers(2, 37)), max_size=6))
@settings(deadline=None)
def test_what_is_read_first_changes_nothing(codec: str, rounding: str, cuts: list[tuple[int, int]]) -> None:
    averaging = averaging_of(codec, rounding)
    theta, local, residual = slice_of(averaging, 2, 37)
    whole = averaging.contribution(0, 2, 37, theta, local, residual, 3).read(2, 37)
    contribution = averaging.contribution(0, 2, 37, theta, local, residual, 3)
    for a, b in [(min(cut), max(cut)) for cut in cuts] + [(2, 37)]:
        begin = averaging.size(0, 2, a)
        assert same_bits(contribution.read(a, b), whole[begin : begin + averaging.size(0, a, b)])


class Counting(Averaging):
    """Waits in the codec until `parties` threads are in it, and counts how often each block is encoded."""

    def watch(self, parties: int) -> None:
        self.together, self.seen, encode = threading.Barrier(parties), list[int](), self.codec.encode_into

        def encode_into(out: Tensor, terms: tuple, block: int, seed: int, first: int) -> None:
            self.seen += range(first, first - (-terms[0].numel() // block))
            self.together.wait(20)
            encode(out, terms, block, seed, first)

        self.codec.encode_into = encode_into  # type: ignore[method-assign]


def test_threads_encode_in_parallel_and_every_block_once() -> None:
    """Four threads read everything: each encodes a chunk while the others do, and all get all bytes."""
    averaging = Counting(averaging_of("int8", elements=16 * BLOCK).fragments, build_codec(CodecConfig("int8")))
    theta, local, _ = slice_of(averaging, 0, 16)
    expected = averaging.encode(0, theta - local)
    averaging.watch(4)
    contribution = averaging.contribution(0, 0, 16, theta, local)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: contribution.read(0, 16), range(4)):
            assert same_bits(got, expected)
    assert sorted(averaging.seen) == list(range(16))


def test_bytes_stay_when_the_inputs_change() -> None:
    averaging = averaging_of("int8")
    theta, local, _ = slice_of(averaging, 0, 37)
    contribution = averaging.contribution(0, 0, 37, theta, local)
    before = contribution.read(0, 37).clone()
    local.zero_()
    assert same_bits(contribution.read(0, 37), before)


@each_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_leave(codec: str, rounding: str, bad: float) -> None:
    averaging = averaging_of(codec, rounding)
    theta, local, _ = slice_of(averaging, 0, 37)
    local[20 * BLOCK + 5] = bad
    contribution = averaging.contribution(0, 0, 37, theta, local)
    assert not contribution.squares().isfinite()
    assert contribution.read(0, 20).numel() == averaging.size(0, 0, 20), "other blocks are fine"
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="blocks 20 to 20 of fragment 0 are not finite"):
            contribution.read(20, 21)


@each_case
@pytest.mark.parametrize("small", [0.0, 0.1, 0.49, 0.51])
def test_rounding_adds_little_to_a_norm(codec: str, rounding: str, small: float) -> None:
    """Values that int4 rounds by most: one of 7 in every group, and around half a step. The exchange takes up to NORM_SLACK."""
    averaging = averaging_of(codec, rounding)
    flat = torch.full((averaging.elements(0, 0, 37),), small)
    flat[::64] = 7.0
    contribution = averaging.contribution(0, 0, 37, flat, torch.zeros_like(flat), seed=3)
    _, (sent,) = averaging.reduce(0, 0, 37, [contribution.read(0, 37)], [0.5])
    assert sent == pytest.approx(averaging.decode(0, 0, 37, contribution.read(0, 37)).square().sum().item(), rel=1e-4)
    assert math.sqrt(sent) < 0.95 * NORM_SLACK * math.sqrt(contribution.squares().item())


def test_squares_of_huge_numbers_do_not_overflow() -> None:
    averaging = averaging_of("none")
    flat = torch.full((averaging.elements(0, 0, 37),), 1e30)
    _, (sent,) = averaging.reduce(0, 0, 37, [averaging.encode(0, flat)], [1e-30])
    assert sent == pytest.approx(1e60 * flat.numel(), rel=1e-4)


# Error feedback


@each_case
@given(seed=seeds)
@settings(deadline=None)
def test_what_was_sent_and_the_residual_are_all_there_was(codec: str, rounding: str, seed: int) -> None:
    """Over four rounds: the sum of the decoded contributions + the residual = the sum of the deltas, to fp32 rounding."""
    averaging = averaging_of(codec, rounding, 3 * BLOCK + 100)
    residual = torch.zeros(averaging.elements(0, 0, 4))
    sent, deltas = torch.zeros_like(residual), torch.zeros_like(residual)
    for round in range(4):
        theta, local, _ = slice_of(averaging, 0, 4, seed + round)
        contribution = averaging.contribution(0, 0, 4, theta, local, residual, round)
        sent += averaging.decode(0, 0, 4, contribution.read(0, 4))
        deltas += theta - local
        contribution.update_residual()
    torch.testing.assert_close(sent + residual, deltas, rtol=0, atol=2e-5)
    assert codec == "none" or residual.any()


@each_case
def test_residual_equals_the_reference(codec: str, rounding: str) -> None:
    """e <- decay * ((delta + e) - decoded), one rounding each; also if it was never read; bytes stay as they were."""
    averaging = averaging_of(codec, rounding, decay=0.95)
    theta, local, residual = slice_of(averaging, 0, 37)
    wanted = (theta - local).numpy() + residual.numpy()
    data = reference.encode(codec, wanted, BLOCK, rounding, 5)
    contribution = averaging.contribution(0, 0, 37, theta, local, residual, 5)
    contribution.update_residual()
    expected = (wanted - reference.decode(codec, data, len(wanted), BLOCK)) * np.float32(0.95)
    assert np.array_equal(residual.numpy(), expected)
    assert same_bits(contribution.read(0, 37), data)


# Results


def parts_of(averaging: Averaging, members: int, first: int, last: int) -> list[Tensor]:
    n = averaging.elements(0, first, last)
    return [averaging.encode(0, normal(10 + m, n), first) for m in range(members)]


@pytest.mark.parametrize("codec", BUILDERS)
@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize(("first", "last"), [(0, 37), (3, 37), (5, 21), (36, 37), (4, 4)])
def test_result_is_the_weighted_mean(codec: str, members: int, first: int, last: int) -> None:
    """Several runs long and from any block on, the last one short: against numpy, and joined of pieces."""
    averaging, weights = averaging_of(codec), [1000.0 + 37 * m for m in range(members)]
    parts, n = parts_of(averaging, members, first, last), averaging.elements(0, first, last)
    result = averaging.reduce(0, first, last, parts, weights)[0]
    assert result.numel() == averaging.result_size(0, first, last, members)
    mean = reference.weighted_mean([reference.decode(codec, p.numpy(), n, BLOCK) for p in parts], weights)
    if not averaging.gathers:
        mean = reference.decode(codec, reference.encode(codec, mean, BLOCK), n, BLOCK)
    runs = [torch.empty(0), *averaging.decode_runs(0, first, last, result, weights)]
    assert same_bits(torch.cat(runs), mean + np.float32(0) if averaging.gathers else mean)
    middle = (first + last) // 2
    pieces = [
        averaging.reduce(
            0, a, b, [p[averaging.size(0, first, a) :][: averaging.size(0, a, b)] for p in parts], weights
        )[0]
        for a, b in ((first, middle), (middle, last))
    ]
    assert same_bits(torch.cat(pieces), result)


def test_only_sparse_codecs_gather() -> None:
    assert [name for name in BUILDERS if averaging_of(name).gathers] == ["topk"]


@pytest.mark.parametrize("members", [1, 3])
def test_sparse_result_holds_the_contributions_block_by_block(members: int) -> None:
    averaging = averaging_of("topk", elements=2 * BLOCK + 100)
    parts, size = parts_of(averaging, members, 0, 3), averaging.size(0, 0, 1)
    result = averaging.reduce(0, 0, 3, parts, [1.0] * members)[0]
    cuts = [(0, size), (size, 2 * size), (2 * size, averaging.size(0, 0, 3))]
    assert same_bits(result, torch.cat([part[a:b] for a, b in cuts for part in parts]))
    digests = averaging.digests(0, 0, 3, result, members)
    assert digests == b"".join(block_digests(torch.cat([p[a:b] for p in parts]), 10**6) for a, b in cuts)
    cut = averaging.result_size(0, 0, 1, members)
    assert averaging.digests(0, 1, 3, result[cut:], members) == digests[32:]


def test_a_stochastic_mean_does_not_depend_on_how_it_is_cut() -> None:
    averaging = averaging_of("int4", "stochastic")
    parts = parts_of(averaging, 2, 0, 37)
    whole = averaging.reduce(0, 0, 37, parts, [1.0, 2.0])[0]
    cut = averaging.size(0, 0, 5)
    rest = averaging.reduce(0, 5, 37, [part[cut:] for part in parts], [1.0, 2.0])[0]
    assert same_bits(rest, whole[cut:])
