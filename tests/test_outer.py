"""The outer step: exact against numpy, the same however it is cut, the same bits on CPUs with and without FMA."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.averaging import Averaging
from diloco.codec import CODECS
from diloco.fragments import Fragment, Slot
from diloco.outer import AdamW, adamw, nesterov, weighted_mean
from diloco.planes import Bits, Planes
from elastic.plan import cells, ownership, rank_blocks
from tests import reference

ROOT = Path(__file__).parent.parent
SIZES = (1, 3, 7, 8, 17, 31, 64, 255, 256, 257, 1000, 4099, 33333)
BLOCK = 512
LR, MU = 0.7, 0.9
seeds = st.integers(0, 2**32 - 1)
tokens = st.integers(0, 10**9)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same_bits(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def averaging_of(elements: int, codec: str) -> Averaging:
    return Averaging([Fragment(0, (Slot("x", (elements,), 0),), BLOCK)], CODECS[codec])


def one_round(
    theta: np.ndarray, momentum: np.ndarray, locals: np.ndarray, weights: list[float], codec: str
) -> tuple[np.ndarray, np.ndarray]:
    """The project's own round of a whole fragment."""
    averaging = averaging_of(len(theta), codec)
    blocks = averaging.blocks(0)
    before, m = torch.from_numpy(theta.copy()), torch.from_numpy(momentum.copy())
    parts = [averaging.encode(0, before - torch.from_numpy(local)) for local in locals]
    result = averaging.reduce(0, 0, blocks, parts, weights)[0]
    gradient = torch.cat(list(averaging.decode_runs(0, 0, blocks, result, weights)))
    nesterov(before, m, gradient, LR, MU)
    return before.numpy(), m.numpy()


# By hand


def test_golden_nesterov() -> None:
    """m = 0.5 * 2 + 1 = 2; theta = 10 - 0.25 * (1 + 0.5 * 2) = 9.5: exact in binary."""
    theta, momentum = torch.tensor([10.0]), torch.tensor([2.0])
    nesterov(theta, momentum, torch.tensor([1.0]), 0.25, 0.5)
    assert (theta.item(), momentum.item()) == (9.5, 2.0)


def test_golden_weighted_mean() -> None:
    """(3 * 1 + 1 * 5) / 4 = 2; a weight of zero counts for nothing."""
    parts = [torch.tensor([1.0, -4.0]), torch.tensor([5.0, 8.0]), torch.tensor([1e9, 1e9])]
    assert weighted_mean(parts, [3.0, 1.0, 0.0]).tolist() == [2.0, -1.0]
    assert parts[0].tolist() == [1.0, -4.0], "inputs stay"


@pytest.mark.parametrize("codec", CODECS)
def test_golden_round(codec: str) -> None:
    """Two members at 4 and 0 from theta 8, weights 1 and 3: deltas 4 and 8, mean 7; m = 7, step 0.5 * (7 + 0.5 * 7)."""
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    theta, momentum = reference.diloco_round(8 * one, zero, [4 * one, zero], [1.0, 3.0], 0.5, 0.5, codec, BLOCK)
    close = 0.01 if codec == "int4" else 1e-6
    assert momentum == pytest.approx(7.0, rel=close) and theta == pytest.approx(2.75, rel=3 * close)
    if codec == "none":
        assert (theta.item(), momentum.item()) == (2.75, 7.0)


def test_first_step_with_rate_one_and_no_momentum_is_the_mean() -> None:
    """One member, lr 1, mu 0: theta becomes the member's parameters, up to the rounding of theta - (theta - x)."""
    theta, local = normal(0, 1000), normal(1, 1000)
    new, _ = reference.diloco_round(theta, np.zeros_like(theta), [local], [5.0], 1.0, 0.0, "none", BLOCK)
    np.testing.assert_allclose(new, local, rtol=0, atol=1e-6)


# Against the reference


@given(st.integers(1, 300), st.integers(1, 5), seeds, st.data())
def test_weighted_mean_equals_the_reference(n: int, members: int, seed: int, data: st.DataObject) -> None:
    weights = [float(data.draw(tokens)) for _ in range(members - 1)] + [float(1 + data.draw(tokens))]
    parts = normal(seed, members, n)
    got = weighted_mean([torch.from_numpy(part) for part in parts], weights)
    assert same_bits(got, reference.weighted_mean(list(parts), weights))


@given(st.integers(1, 300), seeds, st.floats(0, 2), st.floats(0, 1))
def test_nesterov_equals_the_reference(n: int, seed: int, lr: float, mu: float) -> None:
    theta, momentum, gradient = normal(seed, 3, n)
    expected = reference.nesterov(theta, momentum, gradient, lr, mu)
    t, m, g = (torch.from_numpy(x.copy()) for x in (theta, momentum, gradient))
    nesterov(t, m, g, lr, mu)
    assert same_bits(t, expected[0]) and same_bits(m, expected[1])
    assert same_bits(g, gradient), "the gradient stays"


@given(st.integers(1, 300), seeds, st.floats(1e-5, 1), st.integers(1, 10_000), st.floats(0.01, 1))
def test_adamw_equals_the_reference(n: int, seed: int, lr: float, step: int, scale: float) -> None:
    theta, mean, variance, gradient = normal(seed, 4, n)
    variance = variance**2
    expected = reference.adamw(theta, mean, variance, gradient, lr, 0.1, step, scale)
    found = [torch.from_numpy(x.copy()) for x in (theta, mean, variance)]
    by = AdamW(lr, 0.9, 0.95, 1e-8, 0.1, step, scale)
    adamw(found[0], found[1], found[2], torch.from_numpy(gradient.copy()), by, decay=True)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_adamw_is_that_of_torch_up_to_rounding() -> None:
    """Three steps over slices that cut a matrix, which decays, and a vector, which does not."""
    matrix, vector = torch.randn(7, 5), torch.randn(9)
    fragment = Fragment(0, (Slot("m", (7, 5), 0), Slot("v", (9,), 35)), 4)
    planes = Planes([fragment], [(0, fragment.blocks)], variance=True)
    planes.load(0, 0, torch.cat([matrix.view(-1), vector]), torch.zeros(44), torch.zeros(44))
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for step in range(1, 4):
        matrix.grad, vector.grad = torch.randn(7, 5), torch.randn(9)
        flat = torch.cat([matrix.grad.view(-1), vector.grad])
        theirs.step()
        bits = Bits(0, 1, torch.empty(0, dtype=torch.uint8))
        pieces = [2 * piece for piece in flat.split(16)]
        planes.step_adamw(step, bits, pieces, AdamW(0.01, 0.9, 0.95, 1e-8, 0.1, step, scale=0.5))
    torch.testing.assert_close(planes.theta[0], torch.cat([matrix.view(-1), vector]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 17, 257, 512, 1800, 4099])
def test_trajectory_equals_the_reference(codec: str, members: int, n: int) -> None:
    """Five rounds in a row: rounding differences would pile up."""
    theta, momentum = normal(n, n), np.zeros(n, np.float32)
    mine = (theta, momentum)
    for round in range(5):
        locals = theta - 0.1 * normal(100 * n + round, members, n)
        weights = [float(50_000 + 997 * m * round) for m in range(members)]
        theta, momentum = reference.diloco_round(theta, momentum, list(locals), weights, LR, MU, codec, BLOCK)
        mine = one_round(*mine, locals, weights, codec)
        assert same_bits(mine[0], theta) and same_bits(mine[1], momentum)


# However it is cut


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("worlds", [[1, 1], [4, 1], [3, 2, 7]])
def test_reducing_cell_by_cell_is_reducing_the_whole(codec: str, worlds: list[int]) -> None:
    n = 11 * BLOCK + 77
    averaging, weights = averaging_of(n, codec), [1000.0 + m for m in range(len(worlds))]
    blocks = averaging.blocks(0)
    deltas = [torch.from_numpy(normal(m, n)) for m in range(len(worlds))]
    whole = averaging.reduce(0, 0, blocks, [averaging.encode(0, d) for d in deltas], weights)[0]
    found = []
    for cell in cells(blocks, worlds, ownership([1.0] * len(worlds))):
        for owner in range(len(worlds)):
            first, last = cell.owned(owner)
            if first < last:
                start, stop = averaging.fragments[0].span(first, last)
                assert averaging.elements(0, first, last) == stop - start
                parts = [averaging.encode(0, d[start:stop]) for d in deltas]
                found.append(averaging.reduce(0, first, last, parts, weights)[0])
    assert same_bits(torch.cat(found), whole)


@given(st.integers(1, 9), seeds)
@settings(max_examples=20)
def test_planes_step_alike_in_any_world(world: int, seed: int) -> None:
    """Slices stepped by ranks, joined, are the fragment stepped as a whole; so are the digests."""
    fragment = Fragment(0, (Slot("x", (1100,), 0),), 128)
    theta, momentum, gradient = normal(seed, 3, 1100)
    expected = reference.nesterov(theta, momentum, gradient, LR, MU)
    joined: dict[str, list[np.ndarray]] = {"theta": [], "momentum": []}
    digests = {"theta": b"", "momentum": b""}
    for rank in range(world):
        mine = rank_blocks(fragment.blocks, rank, world)
        start, stop = fragment.span(*mine)
        planes = Planes([fragment], [mine])
        planes.load(0, 4, torch.from_numpy(theta[start:stop]), torch.from_numpy(momentum[start:stop]))
        bits = Bits(0, 2, torch.empty(0, dtype=torch.uint8))
        planes.step(7, bits, [torch.from_numpy(gradient[start:stop])], LR, MU)
        assert planes.bases == [7]
        base, both = planes.read(0, *mine)  # type: ignore[misc]
        assert base == 7
        for (plane, parts), flat in zip(joined.items(), both.view(2, -1), strict=True):
            parts.append(flat.numpy())
            digests[plane] += planes.digests(plane, 0)
    assert same_bits(np.concatenate(joined["theta"]), expected[0])
    assert same_bits(np.concatenate(joined["momentum"]), expected[1])
    raw = expected[0].tobytes()
    hashes = [blake3(raw[i : i + 512]).digest() for i in range(0, len(raw), 512)]
    assert digests["theta"] == b"".join(hashes)


def test_planes_serve_their_own_blocks_only() -> None:
    fragment = Fragment(0, (Slot("x", (10,), 0),), 2)
    planes = Planes([fragment], [(1, 4)])  # elements 2 to 7
    assert planes.read(0, 1, 4) is None, "nothing is loaded yet"
    planes.load(0, 3, torch.arange(2.0, 8.0), torch.zeros(6))
    base, got = planes.read(0, 2, 4)  # type: ignore[misc]
    assert (base, got.tolist()) == (3, [4.0, 5.0, 6.0, 7.0, 0, 0, 0, 0])
    base, digests = planes.read_digests(0, 2, 4)  # type: ignore[misc]
    assert (
        base == 3 and digests.numpy().tobytes() == planes.digests("theta", 0)[32:] + planes.digests("momentum", 0)[32:]
    )
    got.zero_()
    assert planes.theta[0].tolist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "a copy"
    for first, last in ((0, 2), (3, 5), (3, 2)):
        assert planes.read(0, first, last) is None and planes.read_digests(0, first, last) is None


def test_planes_keep_the_bits_of_two_rounds_of_every_fragment() -> None:
    fragments = [Fragment(f, (Slot("x", (4,), 0),), 2) for f in range(2)]
    planes = Planes(fragments, [(0, 2)] * 2)
    for seq in range(1, 8):
        bits = Bits(seq % 2, 3, torch.full((4,), seq, dtype=torch.uint8))
        planes.step(seq, bits, [torch.zeros(4)], LR, MU)
    assert {seq: bits.fragment for seq, bits in planes.bits.items()} == {4: 0, 5: 1, 6: 0, 7: 1}
    assert planes.bits[6].data.tolist() == [6] * 4


# The same bits on every CPU


def arithmetic_digest() -> str:
    """sha256 over two rounds of many sizes, both codecs. Runs in the subprocesses too."""
    found = hashlib.sha256()
    for codec in CODECS:
        for n in SIZES:
            theta, momentum = normal(n, n), normal(n + 1, n)
            for round in range(2):
                weights = [float(50_000 + 997 * m * round) for m in range(3)]
                locals = theta - 0.1 * normal(n + 2 + round, 3, n)
                theta, momentum = one_round(theta, momentum, locals, weights, codec)
                found.update(theta.tobytes() + momentum.tobytes())
    for n in SIZES:
        planes = [torch.from_numpy(normal(n + k, n)) for k in range(4)]
        adamw(
            planes[0], planes[1], planes[2].square_(), planes[3], AdamW(1e-3, 0.9, 0.95, 1e-8, 0.1, 3, 0.7), decay=True
        )
        found.update(b"".join(plane.numpy().tobytes() for plane in planes[:3]))
    return found.hexdigest()


PROGRAM = """
import torch
from tests.test_outer import arithmetic_digest
print(torch.backends.cpu.get_cpu_capability(), arithmetic_digest())
"""


def test_same_bits_whatever_the_cpu_can() -> None:
    """With FMA and without: `default` has none, `avx2` and `avx512` do. What this CPU lacks is left out: asked for it, PyTorch
    runs it all the same, into an illegal instruction."""
    running, known = {}, ["default", "avx2", "avx512"]
    own = torch.backends.cpu.get_cpu_capability().lower()
    for capability in known[: known.index(own) + 1] if own in known else ["default"]:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROGRAM]
        running[capability] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found = {}
    for capability, process in running.items():
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{capability}: exit code {process.returncode}"
        name, digest = out.split()[-2:]
        found[name.lower()] = digest
    assert "default" in found
    if len(found) == 1:
        pytest.skip("this CPU has no vector unit that PyTorch knows of, so there is nothing to compare")
    assert set(found.values()) == {arithmetic_digest()}, found
