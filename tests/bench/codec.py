"""Compression on one core, as a share of what `copy_` of the same fp32 tensor reaches in the same run.

python -m tests.bench.codec [--repeat N] [--elements N]     about three minutes; pypiquant: pip install '.[bench]'
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from diloco.averaging import RUN
from diloco.blockwise import Codec
from diloco.codec import BUILDERS, CodecConfig, build_codec
from diloco.fragments import BLOCK
from tests.bench._table import Row, at_least, show

WORK = RUN * BLOCK
"""Elements of a call: what the averaging works on."""
TARGET = 50
"""Percent of a copy, for int8 compiled."""
CASES = [(name, "nearest") for name in BUILDERS] + [("int8", "stochastic"), ("int4", "stochastic")]
COMPILED = ("int8", "int4")
Action = Callable[[], object]


class Tensors:
    """A pseudo-gradient's worth of numbers, and what is made of them."""

    def __init__(self, elements: int) -> None:
        torch.manual_seed(0)
        self.delta, self.theta = torch.randn(elements) * 1e-3, torch.randn(elements)
        self.local = self.theta - self.delta
        self.out = torch.zeros(elements)
        self.data = torch.zeros(4 * elements, dtype=torch.uint8)
        self.cuts = [slice(at, min(at + WORK, elements)) for at in range(0, elements, WORK)]


def actions(codec: Codec, t: Tensors) -> dict[str, Action]:
    size = codec.size(WORK, BLOCK)
    data = [t.data[i * size :][: codec.size(t.delta[cut].numel(), BLOCK)] for i, cut in enumerate(t.cuts)]
    work = list(zip(t.cuts, data, strict=True))

    def quantize() -> None:
        for cut, part in work:
            codec.encode_into(part, (t.delta[cut], None, None), BLOCK)

    def quantize_difference() -> None:
        for cut, part in work:
            codec.encode_into(part, (t.theta[cut], t.local[cut], None), BLOCK)

    def accumulate() -> None:
        for cut, part in work:
            codec.accumulate(t.out[cut], part, 0.5, BLOCK)

    return {"quantize": quantize, "quantize a difference": quantize_difference, "dequantize, accumulate": accumulate}


def shares(actions: dict[str, Action], t: Tensors, repeat: int) -> dict[str, float]:
    """Percent of a copy's speed: the median over repetitions, each with a copy of its own beside it. CPU time, so that
    who else uses the machine counts little."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeat + 1):
        for name, action in actions.items():
            copy = seconds(lambda: t.out.copy_(t.delta))
            taken = seconds(action)
            if turn:  # the first one warms up
                found[name].append(100 * copy / taken)
    return {name: median(values) for name, values in found.items()}


def seconds(action: Action) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def rows_of(name: str, rounding: str, t: Tensors, repeat: int) -> Iterator[Row]:
    codec = build_codec(CodecConfig(name, rounding))
    label = f"{name} {rounding}" if name in COMPILED else name
    if rounding == "nearest":
        yield Row(f"{label}: size", codec.size(t.delta.numel(), BLOCK) / t.delta.numel(), "B/param")
    for action, share in shares(actions(codec, t), t, repeat).items():
        yield Row(f"{label}, eager: {action}", share, "% of copy")
    if name not in COMPILED:
        return
    begin = time.perf_counter()
    codec.prepare(BLOCK, False)
    yield Row(f"{label}: compiling (less if cached)", time.perf_counter() - begin, "s")
    for action, share in shares(actions(codec, t), t, repeat).items():
        told = Row(f"{label}, compiled: {action}", share, "% of copy")
        wanted = label == "int8 nearest" and "difference" not in action
        yield at_least(told.case, share, told.unit, TARGET) if wanted else told


def pypiquant(t: Tensors, repeat: int) -> Iterator[Row]:
    """One scale for each call's elements, against one per group here. Nothing if it is not installed."""
    try:
        import piquant
    except ImportError:
        print("pypiquant: not installed")
        return
    context, single = piquant.Context(1), piquant.DataType.F32
    for bits, kind in ((8, piquant.DataType.UINT8), (4, piquant.DataType.UINT4)):

        def pointers(bits: int = bits) -> Iterator[tuple[int, int, int, int]]:
            for cut in t.cuts:
                n = t.delta[cut].numel()
                yield t.delta[cut].data_ptr(), t.data[cut.start * bits // 8 :].data_ptr(), t.out[cut].data_ptr(), n

        def quantize(kind: object = kind, pointers: Callable = pointers) -> None:
            for source, data, _, n in pointers():
                scale, zero = context.compute_quant_params_ptr_float32(source, kind, n)
                mode = piquant.RoundMode.NEAREST
                context.quantize_ptr(source, single, data, kind, n, scale=scale, zero_point=zero, round_mode=mode)

        def accumulate(kind: object = kind, pointers: Callable = pointers) -> None:
            for _, data, out, n in pointers():
                context.dequantize_ptr(
                    data, kind, out, single, n, scale=1e-4, zero_point=8, reduce_op=piquant.ReduceOp.ADD
                )

        named = {"quantize": quantize, "dequantize, accumulate": accumulate}
        for action, share in shares(named, t, repeat).items():
            yield Row(f"pypiquant uint{bits}: {action}", share, "% of copy")


def pin() -> None:
    """To one core, and one thread."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def throughput(t: Tensors) -> Row:
    taken = median(seconds(lambda: t.out.copy_(t.delta)) for _ in range(9))
    return Row("copy_ of fp32", t.delta.nbytes / taken / 1e9, "GB/s")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.codec", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=7, help="the median is of so many, 7")
    parser.add_argument("--elements", type=int, default=50_000_000, help="fp32 numbers, 50 million")
    options = parser.parse_args(arguments)
    pin()
    t = Tensors(options.elements)
    rows = [throughput(t)]
    for name, rounding in CASES:
        rows += rows_of(name, rounding, t, options.repeat)
    rows += pypiquant(t, options.repeat)
    return show("codec", rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
