"""Slow, obvious numpy versions of the arithmetic that regions must agree on, bit for bit.

Everything is float32, one rounding per operation and in the order written, so equality with the fast code is exact.
Nothing here imports torch or the project.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
F = np.float32
GROUP = 256


def encode(codec: str, flat: Floats, block: int) -> Bytes:
    """fp32 [n] from a block boundary on -> bytes."""
    if codec == "none":
        return np.frombuffer(flat.tobytes(), np.uint8)
    parts = [int8_encode_block(flat[i : i + block]) for i in range(0, len(flat), block)]
    return np.concatenate([np.empty(0, np.uint8), *parts])


def decode(codec: str, data: Bytes, elements: int, block: int) -> Floats:
    """bytes -> fp32 [elements]."""
    if codec == "none":
        return np.frombuffer(data.tobytes(), F)
    parts, at = [np.empty(0, F)], 0
    for i in range(0, elements, block):
        n = min(block, elements - i)
        size = 4 * groups(n) + n
        parts.append(int8_decode_block(data[at : at + size], n))
        at += size
    assert at == len(data)
    return np.concatenate(parts)


def groups(elements: int) -> int:
    return (elements + GROUP - 1) // GROUP


def int8_encode_block(x: Floats) -> Bytes:
    """The scales of all groups (fp32, little endian), then the values of all elements (int8)."""
    scales, values = [], []
    for i in range(0, len(x), GROUP):
        group = x[i : i + GROUP]
        scale = F(np.abs(group).max() / F(127))
        quotient = group / scale if scale > 0 else group
        scales.append(scale)
        values.append(np.clip(np.rint(quotient), -127, 127).astype(np.int8))
    return np.concatenate([np.array(scales, "<f4").view(np.uint8), np.concatenate(values).view(np.uint8)])


def int8_decode_block(data: Bytes, elements: int) -> Floats:
    head = 4 * groups(elements)
    scales = np.frombuffer(data[:head].tobytes(), "<f4")
    values = np.frombuffer(data[head:].tobytes(), np.int8).astype(F)
    return np.concatenate([values[g * GROUP : (g + 1) * GROUP] * scales[g] for g in range(len(scales))])


def weighted_mean(contributions: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """sum(w * d) / sum(w), in the order given."""
    total = contributions[0] * F(weights[0])
    for contribution, weight in zip(contributions[1:], weights[1:], strict=True):
        total = total + contribution * F(weight)
    return total / F(sum(weights))


def nesterov(theta: Floats, momentum: Floats, g: Floats, lr: float, mu: float) -> tuple[Floats, Floats]:
    """m <- mu * m + g; theta <- theta - lr * (g + mu * m). Returns new theta, new momentum."""
    momentum = F(mu) * momentum + g
    return theta - F(lr) * (F(mu) * momentum + g), momentum


def diloco_round(
    theta: Floats,
    momentum: Floats,
    locals: Sequence[Floats],
    weights: Sequence[float],
    lr: float,
    mu: float,
    codec: str,
    block: int,
) -> tuple[Floats, Floats]:
    """One outer step of one whole fragment. locals: the members' parameters, fp32 [n] each, in member order; weights:
    their tokens. Every member's delta is encoded once, the mean is encoded once, everyone uses the decoded bytes.
    Returns new theta, new momentum."""

    def through_the_wire(x: Floats) -> Floats:
        return decode(codec, encode(codec, x, block), len(x), block)

    deltas = [through_the_wire(theta - local) for local in locals]
    gradient = through_the_wire(weighted_mean(deltas, weights))
    return nesterov(theta, momentum, gradient, lr, mu)
