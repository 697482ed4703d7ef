"""Who holds and who reduces which blocks: pure functions of the members' shapes, the same for everyone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

CHUNK = 4
"""Blocks in one message of an exchange: 256 Ki elements of the standard block."""


def rank_blocks(blocks: int, rank: int, world: int) -> tuple[int, int]:
    """Blocks [first, last) of `rank` among `world`: contiguous, possibly none, as equal as whole blocks allow."""
    return blocks * rank // world, blocks * (rank + 1) // world


@dataclass(frozen=True)
class Cell:
    """Blocks [first, last) that lie in a single rank's slice in every member: `ranks[k]` in member k."""

    first: int
    last: int
    ranks: tuple[int, ...]

    def owned(self, member: int) -> tuple[int, int]:
        """The blocks of this cell that `member` reduces: an equal share, so that every rank has the same work."""
        n, k = self.last - self.first, len(self.ranks)
        return self.first + n * member // k, self.first + n * (member + 1) // k


def cells(blocks: int, worlds: Sequence[int]) -> tuple[Cell, ...]:
    """The common refinement of the rank slices of members with `worlds` ranks each, in block order."""
    cuts = sorted({cut for w in worlds for r in range(w) for cut in rank_blocks(blocks, r, w)})
    return tuple(Cell(a, b, tuple(_holder(a, blocks, w) for w in worlds)) for a, b in pairwise(cuts))


def _holder(block: int, blocks: int, world: int) -> int:
    return next(r for r in range(world) if rank_blocks(blocks, r, world)[1] > block)


def chunks(first: int, last: int, size: int = CHUNK) -> list[tuple[int, int]]:
    """[first, last) cut into runs of at most `size` blocks."""
    return [(at, min(at + size, last)) for at in range(first, last, size)]
