"""A rank's slices in flat space, fp32 on the CPU, 1/W per rank: the global θ and outer momentum, the region's own
error-feedback residual, and the last rounds' bits."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.fragments import Fragment, block_digests
from diloco.outer import nesterov

PLANES = ("theta", "momentum")


@dataclass(frozen=True)
class Bits:
    """A committed round's encoded result in this rank's slice, uint8. members: how many contributed, which says how long the
    results of a sparse codec are."""

    fragment: int
    members: int
    data: Tensor


class Planes:
    """θ and momentum of every fragment, in this rank's slice [first block, last block).

    `bases[f]` is the journal seq of the last round in fragment f's planes. Blocks are served to joiners from another
    thread, so a step and a read exclude each other: nobody gets a torn block.
    """

    def __init__(
        self, fragments: Sequence[Fragment], slices: Sequence[tuple[int, int]], error_feedback: bool = False
    ) -> None:
        self.fragments, self.slices = fragments, slices
        self.theta = [torch.zeros(self._elements(f)) for f in range(len(fragments))]
        self.momentum = [torch.zeros(self._elements(f)) for f in range(len(fragments))]
        self.residual = [torch.zeros(self._elements(f)) for f in range(len(fragments))] if error_feedback else None
        """What compression has left out of this region's contributions so far."""
        self.bases = [-1] * len(fragments)
        """-1: not loaded yet."""
        self.bits: dict[int, Bits] = {}
        """seq -> result of the last rounds, for who missed them."""
        self._lock = threading.Lock()

    def _elements(self, fragment: int) -> int:
        start, stop = self.fragments[fragment].span(*self.slices[fragment])
        return stop - start

    def load(self, fragment: int, base: int, theta: Tensor, momentum: Tensor) -> None:
        with self._lock:
            self.theta[fragment].copy_(theta)
            self.momentum[fragment].copy_(momentum)
            self.bases[fragment] = base

    def step(self, seq: int, bits: Bits, gradients: Iterable[Tensor], lr: float, mu: float) -> Tensor:
        """The outer step of round `seq`; its bits are kept for the last two rounds of every fragment. gradients: the
        averaged pseudo-gradient in pieces, one after the other. Returns the sum of its squares, an fp64 scalar."""
        fragment, squares, start = bits.fragment, torch.zeros((), dtype=torch.float64), 0
        with self._lock:
            for gradient in gradients:
                stop = start + gradient.numel()
                nesterov(self.theta[fragment][start:stop], self.momentum[fragment][start:stop], gradient, lr, mu)
                squares += gradient.double().square_().sum()
                start = stop
            assert start == self._elements(fragment)
            self.bases[fragment] = seq
            self.bits[seq] = bits
            for old in sorted(self.bits)[: -2 * len(self.fragments)]:
                del self.bits[old]
        return squares

    def forget_residual(self) -> None:
        for residual in self.residual or []:
            residual.zero_()

    def digests(self, plane: str, fragment: int) -> bytes:
        """32 bytes for each of this rank's blocks."""
        return block_digests(getattr(self, plane)[fragment], self.fragments[fragment].block)

    def read(self, plane: str, fragment: int, first: int, last: int) -> tuple[int, Tensor] | None:
        """(base, copy of the blocks [first, last)) for a joiner; None if they are not this rank's, or not loaded."""
        mine = self.slices[fragment]
        with self._lock:
            if plane not in PLANES or not mine[0] <= first <= last <= mine[1] or self.bases[fragment] < 0:
                return None
            origin, _ = self.fragments[fragment].span(*mine)
            start, stop = self.fragments[fragment].span(first, last)
            return self.bases[fragment], getattr(self, plane)[fragment][start - origin : stop - origin].clone()
