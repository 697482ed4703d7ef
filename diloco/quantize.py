"""Dense codecs: fp32, bf16, and blockwise int8 and int4, as plain torch functions over [blocks, groups, group].

int8: one fp32 scale (absmax / 127) per 256 elements, as in INTELLECT-1's exchange (arXiv 2412.01152) but blockwise, so
that one outlier costs its own group only. int4: one bf16 scale (absmax / 7, rounded up so that nothing is clipped) per 64
elements, two values to a byte; the product of scale and value is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diloco.blockwise import Dense, difference
from diloco.kernels import Kernel
from diloco.rounding import stochastic


def levels(x: Tensor, scale: Tensor, limit: int, keys: Tensor | None) -> Tensor:
    """x / scale, whole numbers in [-limit, limit]: to the nearest, half to even, or stochastically with keys. (A scale that is
    subnormal is coarse enough for a quotient beyond the limit.)"""
    divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(2)
    quotient = x / divisor
    rounded = quotient.round() if keys is None else stochastic(quotient, x, keys)
    return rounded.clamp(-limit, limit)


def convert(
    minuend: Tensor, subtrahend: Tensor | None, residual: Tensor | None, keys: None, scales: None, values: Tensor
) -> None:
    values.copy_(difference(minuend, subtrahend, residual))


def unconvert(scales: None, values: Tensor, out: Tensor) -> None:
    out.copy_(values)


def quantize8(
    minuend: Tensor,
    subtrahend: Tensor | None,
    residual: Tensor | None,
    keys: Tensor | None,
    scales: Tensor,
    values: Tensor,
) -> None:
    x = difference(minuend, subtrahend, residual)
    scale = x.abs().amax(2) / 127
    values.copy_(levels(x, scale, 127, keys))
    scales.copy_(scale)


def dequantize8(scales: Tensor, values: Tensor, out: Tensor) -> None:
    out.copy_(values * scales.unsqueeze(2))


def dequantize8_accumulate(scales: Tensor, values: Tensor, weight: Tensor, total: Tensor, sums: Tensor) -> None:
    total.add_((values * scales.unsqueeze(2)) * weight)
    sums.copy_((values * values).sum(2))  # of 256 squares below 2^14: exact, in any order


def quantize4(
    minuend: Tensor,
    subtrahend: Tensor | None,
    residual: Tensor | None,
    keys: Tensor | None,
    scales: Tensor,
    values: Tensor,
) -> None:
    """A byte holds element i of a group in its low half and element i + 32 in its high half, each plus 8."""
    x = difference(minuend, subtrahend, residual)
    absmax = x.abs().amax(2)
    up = ((absmax / 7).view(torch.int32) + 0xFFFF) & -0x10000
    scale = up.view(torch.float32)
    level = levels(x, scale, 7, keys)
    half = x.shape[2] // 2
    values.copy_(level[:, :, :half] + level[:, :, half:] * 16 + 136)
    scales.copy_(scale)


def unpack4(values: Tensor) -> Tensor:
    high = (values * 0.0625).floor()
    return torch.cat([values - high * 16, high], 2) - 8


def dequantize4(scales: Tensor, values: Tensor, out: Tensor) -> None:
    out.copy_(unpack4(values) * scales.float().unsqueeze(2))


def dequantize4_accumulate(scales: Tensor, values: Tensor, weight: Tensor, total: Tensor, sums: Tensor) -> None:
    level = unpack4(values)
    total.add_((level * scales.float().unsqueeze(2)) * weight)
    sums.copy_((level * level).sum(2))


class NoCompression(Dense):
    """fp32 as it is: 4 bytes per parameter."""

    name = "none"
    value, packed = torch.float32, 4

    def __init__(self) -> None:
        self.encode_kernel, self.decode_kernel = Kernel(convert), Kernel(unconvert)

    def prepare(self, block: int, feedback: bool) -> None:
        """Nothing: copies are as fast eager."""


class Bf16(NoCompression):
    """Rounded to bf16, half to even: 2 bytes per parameter."""

    name = "bf16"
    value, packed = torch.bfloat16, 2


class Int8(Dense):
    """1 + 4 / 256 bytes per parameter: n elements of a block take n + 4 * ceil(n / 256)."""

    name = "int8"
    group, scale, value, packed = 256, torch.float32, torch.int8, 256

    def __init__(self, rounding: str = "nearest") -> None:
        self.rounds_stochastically = rounding == "stochastic"
        self.encode_kernel, self.decode_kernel = Kernel(quantize8), Kernel(dequantize8)
        self.accumulate_kernel = Kernel(dequantize8_accumulate)


class Int4(Dense):
    """(32 + 2) / 64 = 0.53125 bytes per parameter: n elements of a block take 34 * ceil(n / 64)."""

    name = "int4"
    group, scale, value, packed = 64, torch.bfloat16, torch.uint8, 32

    def __init__(self, rounding: str = "nearest") -> None:
        self.rounds_stochastically = rounding == "stochastic"
        self.encode_kernel, self.decode_kernel = Kernel(quantize4), Kernel(dequantize4)
        self.accumulate_kernel = Kernel(dequantize4_accumulate)
