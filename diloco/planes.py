"""A rank's slices in flat space, fp32 on the CPU, 1/W per rank: the global θ and the outer optimizer's moments, the region's
own error-feedback residual, and the last rounds' bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.fragments import Fragment, block_digests
from diloco.outer import AdamW, adamw, nesterov

Update = Callable[[int, int, Tensor], None]
"""(first element, end, gradient): steps the planes there, in place."""


@dataclass(frozen=True)
class Bits:
    """A committed round's encoded result in this rank's slice, uint8. members: how many contributed, which says how long the
    results of a sparse codec are."""

    fragment: int
    members: int
    data: Tensor


class Planes:
    """θ and moments of every fragment, in this rank's slice [first block, last block): Nesterov's momentum, or AdamW's two.

    `bases[f]` is the journal seq of the last round in fragment f's planes. Blocks are served to joiners from another
    thread, so a step and a read exclude each other: nobody gets a torn block.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        slices: Sequence[tuple[int, int]],
        error_feedback: bool = False,
        variance: bool = False,
        zeros: Callable[[int], Tensor] = torch.zeros,
    ) -> None:
        """zeros: makes a plane's tensors."""
        self.fragments, self.slices, self._new = fragments, slices, zeros
        self.theta, self.momentum = self._zeros(), self._zeros()
        self.variance = self._zeros() if variance else []
        """AdamW's second moment; `momentum` is its first then."""
        self.names = ("theta", "momentum", "variance") if variance else ("theta", "momentum")
        self.residual = self._zeros() if error_feedback else None
        """What compression has left out of this region's contributions so far."""
        self.bases = [-1] * len(fragments)
        """-1: not loaded yet."""
        self.bits: dict[int, Bits] = {}
        """seq -> result of the last rounds, for who missed them."""
        self._lock = threading.Lock()

    def _zeros(self) -> list[Tensor]:
        return [self._new(self._elements(f)) for f in range(len(self.fragments))]

    def _elements(self, fragment: int) -> int:
        start, stop = self.fragments[fragment].span(*self.slices[fragment])
        return stop - start

    def load(self, fragment: int, base: int, *flats: Tensor) -> None:
        """flats: this rank's slice of each plane, in the order of `names`."""
        with self._lock:
            for name, flat in zip(self.names, flats, strict=True):
                getattr(self, name)[fragment].copy_(flat)
            self.bases[fragment] = base

    def step(self, seq: int, bits: Bits, gradients: Iterable[Tensor], lr: float, mu: float) -> Tensor:
        """The outer step of round `seq`; its bits are kept for the last two rounds of every fragment. gradients: the
        averaged pseudo-gradient in pieces, one after the other. Returns the sum of its squares, an fp64 scalar."""
        theta, momentum = self.theta[bits.fragment], self.momentum[bits.fragment]

        def update(a: int, b: int, gradient: Tensor) -> None:
            nesterov(theta[a:b], momentum[a:b], gradient, lr, mu)

        return self._step(seq, bits, gradients, update)

    def step_adamw(self, seq: int, bits: Bits, gradients: Iterable[Tensor], by: AdamW) -> Tensor:
        """The same for averaged gradients. As usual, parameters of one dimension do not decay."""
        planes = [getattr(self, name)[bits.fragment] for name in self.names]
        fragment = self.fragments[bits.fragment]
        origin, _ = fragment.span(*self.slices[bits.fragment])

        def update(a: int, b: int, gradient: Tensor) -> None:
            for slot in fragment.slots:
                first, last = max(slot.start - origin, a), min(slot.stop - origin, b)
                if first < last:
                    theta, mean, variance = (plane[first:last] for plane in planes)
                    adamw(theta, mean, variance, gradient[first - a : last - a], by, decay=len(slot.shape) > 1)

        return self._step(seq, bits, gradients, update)

    def _step(self, seq: int, bits: Bits, gradients: Iterable[Tensor], update: Update) -> Tensor:
        fragment, squares, start = bits.fragment, torch.zeros((), dtype=torch.float64), 0
        with self._lock:
            for gradient in gradients:
                stop = start + gradient.numel()
                squares += gradient.double().square_().sum()
                update(start, stop, gradient)
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
            if plane not in self.names or not mine[0] <= first <= last <= mine[1] or self.bases[fragment] < 0:
                return None
            origin, _ = self.fragments[fragment].span(*mine)
            start, stop = self.fragments[fragment].span(first, last)
            return self.bases[fragment], getattr(self, plane)[fragment][start - origin : stop - origin].clone()
