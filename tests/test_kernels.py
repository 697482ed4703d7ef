"""Compiled arithmetic: every bit as eager, on every vector unit, from any thread; and eager where it cannot be compiled."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diloco.averaging import Averaging
from diloco.blockwise import PIECES
from diloco.codec import COMPILE_FROM, Codec, CodecConfig, build_codec, compiles
from diloco.fragments import Fragment, Slot
from diloco.kernels import Kernel
from tests import reference

ROOT = Path(__file__).parent.parent
BLOCK = 512
WHOLE = (3 * PIECES[0] + PIECES[1]) * BLOCK
"""Four pieces that run compiled."""
N = WHOLE + BLOCK + 77
"""And then a block and a short one that do not."""
CASES = [("int8", "nearest"), ("int8", "stochastic"), ("int4", "nearest"), ("int4", "stochastic")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def compiled(request: pytest.FixtureRequest) -> tuple[Codec, Codec, str]:
    """(compiled with and without residual, eager, rounding)"""
    name, rounding = request.param
    codec = build_codec(CodecConfig(name, rounding))
    for feedback in (False, True):
        codec.prepare(BLOCK, feedback)
    return codec, build_codec(CodecConfig(name, rounding)), rounding


def floats(seed: int, count: int = N) -> np.ndarray:
    """Any finite bits: subnormal, huge, zeros of both signs, and groups of one size."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    exponent = np.repeat(rng.integers(0, 254, -(-count // 64)), 64)[:count].astype(np.uint32)
    same_size = np.repeat(rng.integers(0, 2, -(-count // 512)), 512)[:count]
    x = np.where(same_size, bits & 0x807FFFFF | exponent << 23, bits).astype(np.uint32).view(np.float32)
    x = np.where(np.isfinite(x), x, 0).astype(np.float32)
    return x * rng.choice([1, 1, 0, -0.0], count).astype(np.float32)


def everything(codec: Codec, arrays: list[np.ndarray], weight: float, seed: int) -> list[Tensor]:
    a, b, e = (torch.from_numpy(x) for x in arrays)
    found = []
    for terms in ((a, None, None), (a, b, None), (a, b, e)):
        data = torch.empty(codec.size(N, BLOCK), dtype=torch.uint8)
        codec.encode_into(data, terms, BLOCK, seed, 5)
        total = b.clone()
        squares = torch.tensor(codec.accumulate(total, data, weight, BLOCK), dtype=torch.float64)
        decoded = codec.decode(data, N, BLOCK)
        assert squares.item() == pytest.approx(decoded.double().square().sum().item(), rel=1e-6)
        found += [data, decoded, total, squares]
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e9))
@settings(max_examples=40, deadline=None)
def test_compiled_equals_eager(compiled: tuple[Codec, Codec, str], seed: int, weight: float) -> None:
    """Every bit of what is encoded, decoded and accumulated."""
    codec, eager, _ = compiled
    arrays = [floats(seed + i) * np.float32(0.25) for i in range(3)]  # sums stay finite
    for got, expected in zip(
        everything(codec, arrays, weight, seed), everything(eager, arrays, weight, seed), strict=True
    ):
        assert same_bits(got, expected)


def test_compiled_equals_the_reference(compiled: tuple[Codec, Codec, str]) -> None:
    codec, _, rounding = compiled
    x = floats(1)
    data = codec.encode(torch.from_numpy(x), BLOCK, 9)
    assert data.numpy().tobytes() == reference.encode(codec.name, x, BLOCK, rounding, 9).tobytes()
    assert (
        codec.decode(data, N, BLOCK).numpy().tobytes() == reference.decode(codec.name, data.numpy(), N, BLOCK).tobytes()
    )


def test_compiled_code_is_what_runs(compiled: tuple[Codec, Codec, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the eager functions taken away, whole pieces still work and others do not."""
    codec, x = compiled[0], torch.from_numpy(floats(2))
    pieces = x[:WHOLE]
    expected = codec.encode(pieces, BLOCK)
    for kernel in (codec.encode_kernel, codec.decode_kernel, codec.accumulate_kernel):  # type: ignore[attr-defined]
        monkeypatch.setattr(kernel, "function", None)
    assert same_bits(codec.encode(pieces, BLOCK), expected)
    codec.accumulate(torch.zeros(WHOLE), expected, 1.0, BLOCK)
    large = 3 * PIECES[0] * BLOCK
    codec.decode(expected[: codec.size(large, BLOCK)], large, BLOCK)
    with pytest.raises(TypeError):
        codec.encode(x, BLOCK)


def test_threads_may_call_it_at_the_same_time(compiled: tuple[Codec, Codec, str]) -> None:
    """In the middle of a no_grad, an inference mode and another number of threads, too."""
    codec, eager, _ = compiled
    arrays, found = [floats(i) * np.float32(0.25) for i in range(3)], dict[int, bool]()
    expected = everything(eager, arrays, 3.0, 4)

    def work(k: int) -> None:
        with [torch.no_grad, torch.inference_mode, torch.enable_grad][k % 3]():
            results = [everything(codec, arrays, 3.0, 4) for _ in range(20)]
        found[k] = all(same_bits(a, b) for result in results for a, b in zip(result, expected, strict=True))

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == dict.fromkeys(range(6), True)


def test_a_compiler_that_changes_a_bit_is_not_used() -> None:
    def differs(x: Tensor, out: Tensor) -> None:
        out.copy_(x * (2.0 if torch.compiler.is_compiling() else 3.0))

    kernel, x, out = Kernel(differs), torch.ones(4), torch.zeros(4)
    with pytest.raises(RuntimeError, match="compiled, differs gives other bits"):
        kernel.prepare(x, out)
    kernel(x, out)
    assert out.tolist() == [3.0] * 4


def averaging(codec: str = "int8") -> Averaging:
    return Averaging([Fragment(0, (Slot("x", (N,), 0),), BLOCK)], build_codec(CodecConfig(codec)))


def digest(warm: bool) -> str:
    """Of everything that two codecs make of one input. With warm, prints what that says."""
    found = hashlib.sha256()
    for name, rounding in (CASES[0], CASES[-1]):
        codec = build_codec(CodecConfig(name, rounding))
        if warm:
            print(repr(Averaging(averaging().fragments, codec).warm(False)))
        for tensor in everything(codec, [floats(i) * np.float32(0.25) for i in range(3)], 3.7, 4):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


PROGRAM = "from tests.test_kernels import digest; print(digest(True))"


def start(program: str, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=170)
    assert process.returncode == 0
    return out.splitlines()


def test_same_bits_whatever_the_cpu_can() -> None:
    """Compiled for no vector unit, and for AVX2 with FMA; eager likewise. Here it is what there is."""
    running = [
        start(f"import torch._inductor.config as c\nc.cpp.simdlen = {simdlen}\n{PROGRAM}", ATEN_CPU_CAPABILITY=isa)
        for isa, simdlen in (("default", 1), ("avx2", 256))
    ]
    for process in running:
        assert lines_of(process) == ["None", "None", digest(False)]


def test_no_compiler_is_one_sentence_and_eager(tmp_path: Path) -> None:
    """With a cache of its own, or what others compiled would be found."""
    *said, found = lines_of(start(PROGRAM, CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)))
    assert len(said) == 2 and all("runs eager, compiling it failed: " in line for line in said), said
    assert found == digest(False)


@pytest.mark.parametrize("codec", ["none", "bf16", "topk"])
def test_what_gains_nothing_is_not_compiled(codec: str) -> None:
    assert averaging(codec).warm(True) is None


def test_auto_compiles_large_shares() -> None:
    share = [1, COMPILE_FROM - 1, COMPILE_FROM]
    found = {how: [compiles(CodecConfig(compile=how), n) for n in share] for how in ("auto", "always", "never")}
    assert found == {"auto": [False, False, True], "always": [True] * 3, "never": [False] * 3}
