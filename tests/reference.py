"""Slow, obvious numpy versions of the arithmetic that regions must agree on, bit for bit.

Everything is float32, one rounding per operation and in the order written, so equality with the fast code is exact.
Nothing here imports torch or the project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
F = np.float32
GROUP = 256


def encode(codec: str, flat: Floats, block: int, rounding: str = "nearest", seed: int = 0, first: int = 0) -> Bytes:
    """fp32 [n] from a block boundary on, the blocks from index `first` on -> bytes."""
    parts = [np.empty(0, np.uint8)]
    for number, start in enumerate(range(0, len(flat), block)):
        x = flat[start : start + block]
        noise = uniform(seed, first + number, x) if rounding == "stochastic" else None
        parts.append(ENCODE[codec](x, noise))
    return np.concatenate(parts)


def decode(codec: str, data: Bytes, elements: int, block: int) -> Floats:
    """bytes -> fp32 [elements]."""
    parts, at = [np.empty(0, F)], 0
    for i in range(0, elements, block):
        n = min(block, elements - i)
        size = SIZE[codec](n)
        parts.append(DECODE[codec](data[at : at + size], n))
        at += size
    assert at == len(data)
    return np.concatenate(parts)


def groups(elements: int, group: int = GROUP) -> int:
    return (elements + group - 1) // group


# Codecs: one block each. noise: None, or a number in [0, 1) for each element


def none_encode_block(x: Floats, noise: None) -> Bytes:
    return np.frombuffer(x.tobytes(), np.uint8)


def none_decode_block(data: Bytes, elements: int) -> Floats:
    return np.frombuffer(data.tobytes(), F)


def bf16_encode_block(x: Floats, noise: None) -> Bytes:
    return bf16(x).view(np.uint8)


def bf16_decode_block(data: Bytes, elements: int) -> Floats:
    return from_bf16(data)


def round_to_levels(x: Floats, scale: np.float32, limit: int, noise: Floats | None) -> NDArray[np.int64]:
    quotient = x / scale if scale > 0 else x
    whole = np.rint(quotient) if noise is None else np.floor(quotient + noise)
    return np.clip(whole, -limit, limit).astype(np.int64)


def int8_encode_block(x: Floats, noise: Floats | None) -> Bytes:
    """The scales of all groups (fp32, little endian), then the values of all elements (int8)."""
    scales, values = [], []
    for i in range(0, len(x), GROUP):
        group = x[i : i + GROUP]
        scale = F(np.abs(group).max() / F(127))
        scales.append(scale)
        values.append(
            round_to_levels(group, scale, 127, None if noise is None else noise[i : i + GROUP]).astype(np.int8)
        )
    return np.concatenate([np.array(scales, "<f4").view(np.uint8), np.concatenate(values).view(np.uint8)])


def int8_decode_block(data: Bytes, elements: int) -> Floats:
    head = 4 * groups(elements)
    scales = np.frombuffer(data[:head].tobytes(), "<f4")
    values = np.frombuffer(data[head:].tobytes(), np.int8).astype(F)
    return np.concatenate([values[g * GROUP : (g + 1) * GROUP] * scales[g] for g in range(len(scales))])


def int4_encode_block(x: Floats, noise: Floats | None) -> Bytes:
    """The scales of all groups (bf16, rounded up), then 32 bytes a group: element i + 8 and, times 16, i + 32's + 8."""
    scales, values = [], []
    for i in range(0, len(x), 64):
        group = np.concatenate([x[i : i + 64], np.zeros(64, F)])[:64]
        wide = F(np.abs(group).max() / F(7))
        top = int(wide.view(np.uint32)) >> 16
        if (top << 16) != int(wide.view(np.uint32)):
            top += 1
        scales.append(top)
        scale = np.array([top << 16], np.uint32).view(F)[0]
        mine = None if noise is None else np.concatenate([noise[i : i + 64], np.zeros(64, F)])[:64]
        level = round_to_levels(group, scale, 7, mine)
        values += [(level[e] + 8) + 16 * (level[e + 32] + 8) for e in range(32)]
    return np.concatenate([np.array(scales, "<u2").view(np.uint8), np.array(values, np.uint8)])


def int4_decode_block(data: Bytes, elements: int) -> Floats:
    n = groups(elements, 64)
    scales, packed = from_bf16(data[: 2 * n]), data[2 * n :].reshape(n, 32).astype(np.int64)
    level = np.concatenate([packed % 16, packed // 16], 1) - 8
    return (level.astype(F) * scales[:, None]).reshape(-1)[:elements]


def topk_encode_block(x: Floats, noise: None) -> Bytes:
    return np.concatenate([topk_encode_chunk(x[i : i + 4096]) for i in range(0, len(x), 4096)])


def topk_encode_chunk(x: Floats) -> Bytes:
    """Two magnitudes (bf16), k indices (12 bits, rising), k codes (2 bits: large or small, then the sign)."""
    k = (len(x) + 63) // 64
    order = sorted(range(len(x)), key=lambda i: (-np.abs(x[i]), i % 512, i // 512))
    index = sorted(order[:k])
    magnitude = [abs(float(x[i])) for i in index]
    threshold = math.fsum(magnitude) / k
    for _ in range(3):
        high = [m for m in magnitude if m > threshold]
        low = [m for m in magnitude if m <= threshold]
        above = [m > threshold for m in magnitude]
        levels = [math.fsum(low) / max(len(low), 1), math.fsum(high) / max(len(high), 1)]
        threshold = sum(levels) / 2
    codes = [int(a) + 2 * int(x[i] < 0) for a, i in zip(above, index, strict=True)]
    bits = "".join(f"{i:012b}"[::-1] for i in index)
    bits += "0" * (-len(bits) % 8) + "".join(f"{c:02b}"[::-1] for c in codes)
    bits += "0" * (-len(bits) % 8)
    packed = [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)]
    return np.concatenate([bf16(np.array(levels, F)).view(np.uint8), np.array(packed, np.uint8)])


def topk_decode_block(data: Bytes, elements: int) -> Floats:
    out, at = np.zeros(elements, F), 0
    for i in range(0, elements, 4096):
        n = min(4096, elements - i)
        k, size = (n + 63) // 64, topk_chunk_size(n)
        chunk = data[at : at + size]
        levels = from_bf16(chunk[:4])
        cut = 4 + (3 * k + 1) // 2
        index, codes = numbers(chunk[4:cut], 12, k), numbers(chunk[cut:], 2, k)
        for place, code in zip(index, codes, strict=True):
            out[i + min(place, n - 1)] = levels[code % 2] * F(-1 if code > 1 else 1)
        at += size
    return out


def topk_chunk_size(n: int) -> int:
    k = (n + 63) // 64
    return 4 + (3 * k + 1) // 2 + (k + 3) // 4


def numbers(data: Bytes, bits: int, count: int) -> list[int]:
    """The first `count` numbers of so many bits, the low bits first."""
    text = "".join(f"{byte:08b}"[::-1] for byte in data)
    return [int(text[i * bits : (i + 1) * bits][::-1], 2) for i in range(count)]


def bf16(x: Floats) -> NDArray[np.uint16]:
    """The upper halves of the bits, rounded half to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bf16(data: Bytes) -> Floats:
    return (np.frombuffer(data.tobytes(), "<u2").astype(np.uint32) << 16).view(F)


ENCODE = {
    "none": none_encode_block,
    "bf16": bf16_encode_block,
    "int8": int8_encode_block,
    "int4": int4_encode_block,
    "topk": topk_encode_block,
}
DECODE = {
    "none": none_decode_block,
    "bf16": bf16_decode_block,
    "int8": int8_decode_block,
    "int4": int4_decode_block,
    "topk": topk_decode_block,
}
SIZE = {
    "none": lambda n: 4 * n,
    "bf16": lambda n: 2 * n,
    "int8": lambda n: n + 4 * groups(n),
    "int4": lambda n: 34 * groups(n, 64),
    "topk": lambda n: sum(topk_chunk_size(min(4096, n - i)) for i in range(0, n, 4096)),
}
"""Bytes of a block of n elements."""


def uniform(seed: int, block: int, x: Floats) -> Floats:
    """The noise of stochastic rounding, in [0, 1): a hash of seed, block, element and value."""
    key = splitmix(splitmix(seed % 2**64) ^ block)
    h = np.arange(len(x), dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(key % 2**32)
    h ^= x.view(np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h ^= np.uint32(key >> 32)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return (h & np.uint32(0xFFFFFF)).astype(F) * F(2.0**-24)


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


# Rounds


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


def adamw(
    theta: Floats, mean: Floats, variance: Floats, g: Floats, lr: float, decay: float, step: int, scale: float
) -> tuple[Floats, Floats, Floats]:
    """Betas 0.9 and 0.95, eps 1e-8; the gradient is scaled first. Returns new theta, mean, variance."""
    g = g * F(scale)
    mean = F(0.9) * mean + F(1 - 0.9) * g
    variance = F(0.95) * variance + F(1 - 0.95) * (g * g)
    denominator = np.sqrt(variance) / F(math.sqrt(1 - 0.95**step)) + F(1e-8)
    theta = theta * F(1 - lr * decay)
    return theta - mean * F(lr / (1 - 0.9**step)) / denominator, mean, variance


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
    their tokens. Every member's delta is encoded once, the mean is encoded once (topk: not at all), everyone uses the
    decoded bytes. Returns new theta, new momentum."""

    def through_the_wire(x: Floats) -> Floats:
        return decode(codec, encode(codec, x, block), len(x), block)

    deltas = [through_the_wire(theta - local) for local in locals]
    mean = weighted_mean(deltas, weights)
    gradient = mean + F(0) if codec == "topk" else through_the_wire(mean)  # no zero of a sparse sum is negative
    return nesterov(theta, momentum, gradient, lr, mu)
