"""Who holds and who reduces which blocks: pure functions of the members' shapes and rates, the same for everyone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

CHUNK = 4
"""Blocks that are worked on, or fetched, at a time: 256 Ki elements of the standard block."""
WHOLE = 1 << 20
"""What ownership shares add up to."""
ALIKE = 0.8
"""Rates from this part of the highest on count as equal to it: a share reacts to a difference of rates several times as
strongly, so taking measuring noise for one costs more than it brings."""


def rank_blocks(blocks: int, rank: int, world: int) -> tuple[int, int]:
    """Blocks [first, last) of `rank` among `world`: contiguous, possibly none, as equal as whole blocks allow."""
    return blocks * rank // world, blocks * (rank + 1) // world


@dataclass(frozen=True)
class Cell:
    """Blocks [first, last) that lie in a single rank's slice in every member: `ranks[k]` in member k."""

    first: int
    last: int
    ranks: tuple[int, ...]
    shares: tuple[int, ...]
    """Of the members, of `WHOLE`."""

    def owned(self, member: int) -> tuple[int, int]:
        """The blocks of this cell that `member` reduces: its share of every cell, so that all its ranks have the same
        part of the work."""
        before = sum(self.shares[:member])
        return self._cut(before), self._cut(before + self.shares[member])

    def _cut(self, share: int) -> int:
        """The nearest block."""
        return self.first + ((self.last - self.first) * share + WHOLE // 2) // WHOLE


def cells(blocks: int, worlds: Sequence[int], shares: Sequence[int]) -> tuple[Cell, ...]:
    """The common refinement of the rank slices of members with `worlds` ranks each, in block order."""
    cuts = sorted({cut for w in worlds for r in range(w) for cut in rank_blocks(blocks, r, w)})
    return tuple(Cell(a, b, tuple(_holder(a, blocks, w) for w in worlds), tuple(shares)) for a, b in pairwise(cuts))


def _holder(block: int, blocks: int, world: int) -> int:
    return next(r for r in range(world) if rank_blocks(blocks, r, world)[1] > block)


def chunks(first: int, last: int, size: int = CHUNK) -> list[tuple[int, int]]:
    """[first, last) cut into runs of at most `size` blocks."""
    return [(at, min(at + size, last)) for at in range(first, last, size)]


def ownership(rates: Sequence[float]) -> tuple[int, ...]:
    """Each member's share of the blocks to reduce, of `WHOLE`, for the shortest exchange. rates: the lower of its up and
    down rate, bytes/s; 0: not known, counted as the median of the others.

    With N encoded bytes a contribution, an owner of the share o among K members sends and receives N (1 - o) for parts and
    N o (K - 1) for sums: N (1 + (K - 2) o) each way. So two members may share as they like, and among more the smallest
    maximum of (1 + (K - 2) o) / rate is where the fast ones end together and who is slower than that owns nothing.
    """
    known = sorted(rate for rate in rates if rate > 0)
    if not known or len(rates) < 3:
        return _quantize([1.0] * len(rates))
    filled = [rate if rate > 0 else known[len(known) // 2] for rate in rates]
    return _quantize(_level([max(filled) if rate > ALIKE * max(filled) else rate for rate in filled]))


def _level(rates: Sequence[float]) -> list[float]:
    """Shares o >= 0 of sum 1 with the smallest maximum of (1 + (K - 2) o) / rate."""
    spread = len(rates) - 2
    for count in range(1, len(rates) + 1):  # the `count` fastest own something; who comes next would only wait
        fast = sorted(rates, reverse=True)[:count]
        time = (spread + count) / sum(fast)
        if count == len(rates) or time * sorted(rates, reverse=True)[count] <= 1:
            break
    return [max(time * rate - 1, 0.0) for rate in rates]


def _quantize(shares: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers of sum `WHOLE` in these proportions."""
    total = sum(shares)
    cuts = [round(WHOLE * part / total) for part in accumulate(shares)]
    return tuple(b - a for a, b in pairwise([0, *cuts]))


def exchange_seconds(nbytes: float, rates: Sequence[float], shares: Sequence[int]) -> float:
    """What the most loaded direction takes: N (1 + (K - 2) o) / rate. nbytes: of one encoded contribution."""
    spread = len(rates) - 2
    return max(nbytes * (1 + spread * share / WHOLE) / rate for rate, share in zip(rates, shares, strict=True))


class NotFinite(FloatingPointError):
    """A part that decodes to a number that is not finite. index: whose, in the order of the parts; -1: their mean."""

    def __init__(self, index: int) -> None:
        super().__init__(f"part {index} is not finite")
        self.index = index
