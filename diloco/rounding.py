"""Stochastic rounding whose noise is a pure function of seed, block, element and value: a retry gives the same bytes.

Noise comes from a counter-based generator (as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
built of murmur3's 32-bit finalizer, in int32 arithmetic that wraps around. The value is hashed too, so that a mean that
is rounded with the same seed in every round does not meet the same noise in every round.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 2**64 - 1


def block_keys(seed: int, first: int, count: int) -> Tensor:
    """int32 [count, 2]: the generator's keys for the blocks first, first + 1, ..."""
    words = [_splitmix(_splitmix(seed & MASK) ^ block) for block in range(first, first + count)]
    return torch.tensor([[_signed(word), _signed(word >> 32)] for word in words], dtype=torch.int32).view(count, 2)


def stochastic(quotient: Tensor, value: Tensor, keys: Tensor) -> Tensor:
    """fp32 [r, g, n] rounded down or up, up with the probability of its fraction (to 2^-17 at most, what fp32 adds
    exactly below 128). value: fp32 of that shape; keys: int32 [r, 2]."""
    rows, groups, length = value.shape
    index = torch.arange(groups * length, dtype=torch.int32, device=value.device).view(1, groups, length)
    h = (index * _signed(0x9E3779B1) + keys[:, 0].view(rows, 1, 1)) ^ value.view(torch.int32)
    h = (h ^ _shift(h, 16)) * _signed(0x85EBCA6B)
    h = h ^ keys[:, 1].view(rows, 1, 1)
    h = (h ^ _shift(h, 13)) * _signed(0xC2B2AE35)
    h = h ^ _shift(h, 16)
    return torch.floor(quotient + (h & 0xFFFFFF).float() * 2.0**-24)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros moving in."""
    return (x >> bits) & (2 ** (32 - bits) - 1)


def _signed(word: int) -> int:
    """The int32 with the low 32 bits of `word`."""
    return (word + 2**31) % 2**32 - 2**31


def _splitmix(x: int) -> int:
    """splitmix64 (Steele, Lea and Flood, OOPSLA 2014): one step from state x."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
