"""Planes cut into shards of bounded size: what a save needs in memory beside the planes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ckpt.format import Piece

SHARD = 1 << 24
"""Elements in a file (64 MiB): a request that a store takes whole."""


def cut(plane: str, fragment: int, start: int, stop: int, flat: Tensor) -> Iterator[Piece]:
    """Elements [start, stop), fp32 [stop - start], as pieces that fit in a shard. Copies, so that none of them keeps
    `flat` in memory."""
    for a in range(start, stop, SHARD):
        b = min(a + SHARD, stop)
        yield Piece(plane, fragment, a, b, flat[a - start : b - start].clone())


def groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """The pieces of one shard after the other: as many as fit."""
    group: list[Piece] = []
    for piece in pieces:
        if group and sum(p.stop - p.start for p in [*group, piece]) > SHARD:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
