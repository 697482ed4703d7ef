"""The order in which samples are read: computed from their index, never stored.

Windows are cut into *blocks* of neighbours. An epoch is a permutation of the blocks, taken a *group* of them at a time, and
a permutation of the windows inside each group: a reader needs one group at hand, whatever the data's size. Data of
one group or less is one permutation of all windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 6
_GROUP_SALT = 0x67726F7570


@dataclass(frozen=True)
class Order:
    """Of `windows` windows in blocks of `block` and groups of `group`, a multiple of it; 0: one group of all."""

    windows: int
    block: int = 0
    group: int = 0

    def window(self, i: int, seed: int) -> int:
        """Where position i goes, a bijection of range(windows). The blocks' remainder is a block that always comes last.
        Raises ValueError unless 0 <= i < windows."""
        if not self.group or self.windows <= self.group:
            return permute(i, self.windows, seed)
        start = i - i % self.group
        size = min(self.group, self.windows - start)
        j = start + permute(i - start, size, splitmix(seed ^ splitmix(_GROUP_SALT + start)))
        slot, inside = divmod(j, self.block)
        blocks = self.windows // self.block
        return (permute(slot, blocks, seed) if slot < blocks else slot) * self.block + inside

    def windows_of(self, i: np.ndarray, seed: int) -> np.ndarray:
        """int64 [n]: `window` of n positions at once."""
        if not self.group or self.windows <= self.group:
            return permute_all(i, self.windows, seed)
        starts = i - i % self.group
        found = np.empty_like(i)
        for start in np.unique(starts).tolist():
            mine = starts == start
            size, own = min(self.group, self.windows - start), splitmix(seed ^ splitmix(_GROUP_SALT + start))
            found[mine] = start + permute_all(i[mine] - start, size, own)
        slots, inside = np.divmod(found, self.block)
        blocks = self.windows // self.block
        slots[slots < blocks] = permute_all(slots[slots < blocks], blocks, seed)
        return slots * self.block + inside


def permute_all(i: np.ndarray, n: int, seed: int) -> np.ndarray:
    """int64: `permute` of all of i at once; n is below 2 ** 62. Raises ValueError."""
    if len(i) and not (i.min() >= 0 and i.max() < n):
        raise ValueError(f"[{i.min()}, {i.max()}] is not in range({n})")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(splitmix(seed + k)) for k in range(_FEISTEL_ROUNDS)]
    found = _feistel_all(i.astype(np.uint64), half, keys)
    while (outside := found >= n).any():
        found[outside] = _feistel_all(found[outside], half, keys)
    return found.astype(np.int64)


def _feistel_all(i: np.ndarray, half: int, keys: Sequence[np.uint64]) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = i >> bits, i & mask
    for key in keys:
        left, right = right, left ^ (_splitmix_all(right ^ key) & mask)
    return left << bits | right


def _splitmix_all(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def permute(i: int, n: int, seed: int) -> int:
    """Where i goes in a seeded permutation of range(n): a balanced Feistel network over the smallest even
    number of bits that holds n, walked until it lands below n again (cycle walking, Black and Rogaway 2002),
    four tries at the most on average. Integers only, so the same on every machine. Raises ValueError unless 0
    <= i < n."""
    if not 0 <= i < n:
        raise ValueError(f"{i} is not in range({n})")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [splitmix(seed + k) for k in range(_FEISTEL_ROUNDS)]
    i = _feistel(i, half, keys)
    while i >= n:
        i = _feistel(i, half, keys)
    return i


def _feistel(i: int, half: int, keys: Sequence[int]) -> int:
    mask = (1 << half) - 1
    left, right = i >> half, i & mask
    for key in keys:
        left, right = right, left ^ (splitmix(right ^ key) & mask)
    return left << half | right


def splitmix(x: int) -> int:
    """splitmix64 (Steele, Lea and Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31
