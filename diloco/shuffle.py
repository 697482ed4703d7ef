"""The order in which samples are read: computed from their index, never stored. Pure.

Windows are cut into *blocks* of neighbours. An epoch is a permutation of the blocks, taken a *group* of them at a time, and
a permutation of the windows inside each group: a reader needs one group at hand, whatever the data's size. Data of
one group or less is one permutation of all windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
