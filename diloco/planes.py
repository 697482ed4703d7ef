"""A rank's slices in flat space, fp32 on the CPU, 1/W per rank: the global θ and the outer optimizer's moments, the region's
own error-feedback residual, and the last rounds' bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.fragments import Fragment, block_digests
from diloco.outer import AdamW, adamw, nesterov
from elastic.plan import CHUNK, chunks

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

    `bases[f]` is the journal seq of the last round in fragment f's planes. Blocks are served to joiners from other
    threads, so a step and a read exclude each other: nobody gets a torn block, or θ and moments of different rounds.
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
        self._ahead: list[dict[int, int]] = [{} for _ in fragments]
        """Block -> the last round in it, of those that came from a peer with newer ones than the rest: until the rest has
        caught up, rounds step the rest alone."""
        self._digests: dict[tuple[str, int], tuple[int, bytes]] = {}
        """(plane, fragment) -> (base, digests of this rank's blocks) that were computed last."""
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
            self._set_base(fragment, base)

    def forget(self, fragment: int) -> None:
        """Not loaded: what is written into the planes now is nobody's yet."""
        with self._lock:
            self._set_base(fragment, -1)

    def arrived(self, fragment: int, base: int, held: Sequence[int]) -> None:
        """All of this rank's blocks were written into the planes. held: the last round in each, not older than `base`."""
        with self._lock:
            self._set_base(fragment, base)
            first = self.slices[fragment][0]
            self._ahead[fragment] = {first + i: seq for i, seq in enumerate(held) if seq > base}

    def _set_base(self, fragment: int, base: int) -> None:
        self.bases[fragment] = base
        self._ahead[fragment].clear()
        for name in self.names:
            self._digests.pop((name, fragment), None)

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
                for a, b in self._behind(fragment, start, stop, seq):
                    update(a, b, gradient[a - start : b - start])
                start = stop
            assert start == self._elements(fragment)
            self.bases[fragment] = seq
            self._ahead[fragment] = {block: at for block, at in self._ahead[fragment].items() if at > seq}
            self.bits[seq] = bits
            for old in sorted(self.bits)[: -2 * len(self.fragments)]:
                del self.bits[old]
        return squares

    def forget_residual(self) -> None:
        for residual in self.residual or []:
            residual.zero_()

    def _behind(self, fragment: int, start: int, stop: int, seq: int) -> Iterator[tuple[int, int]]:
        """Runs of this rank's elements [start, stop), which are whole blocks, that do not hold round `seq` yet."""
        ahead, block = self._ahead[fragment], self.fragments[fragment].block
        if not ahead:
            yield start, stop
            return
        first = self.slices[fragment][0]
        for a in range(start, stop, block):
            if ahead.get(first + a // block, -1) < seq:
                yield a, min(a + block, stop)

    def digests(self, plane: str, fragment: int) -> bytes:
        """32 bytes for each of this rank's blocks; computed once a round. Any thread."""
        first, last = self.slices[fragment]
        known = self._digests.get((plane, fragment))
        while known is None or known[0] != self.bases[fragment]:
            base, found = self.bases[fragment], []
            for a, b in chunks(first, last, CHUNK):
                with self._lock:  # held for a copy of 1 MiB: the loop goes on between two
                    piece = self._cut(plane, fragment, a, b).clone()
                found.append(block_digests(piece, self.fragments[fragment].block))
                if self.bases[fragment] != base:
                    break
            else:
                known = self._digests[plane, fragment] = base, b"".join(found)
        return known[1]

    def read(self, fragment: int, first: int, last: int) -> tuple[int, Tensor] | None:
        """(base, fp32 copy of the blocks [first, last) of every plane, one plane after the other) for a joiner; None if they
        are not this rank's, or not loaded."""
        with self._lock:
            if not self._serves(fragment, first, last):
                return None
            return self.bases[fragment], torch.cat([self._cut(name, fragment, first, last) for name in self.names])

    def read_digests(self, fragment: int, first: int, last: int) -> tuple[int, Tensor] | None:
        """(base, uint8: 32 bytes for each of the blocks [first, last) of every plane, one plane after the other), or None."""
        own = self.slices[fragment][0]
        while self._serves(fragment, first, last):
            base = self.bases[fragment]
            found = b"".join(
                self.digests(name, fragment)[32 * (first - own) : 32 * (last - own)] for name in self.names
            )
            if self.bases[fragment] == base:
                return base, torch.frombuffer(bytearray(found), dtype=torch.uint8) if found else torch.empty(0)
        return None

    def _serves(self, fragment: int, first: int, last: int) -> bool:
        a, b = self.slices[fragment]
        return a <= first <= last <= b and self.bases[fragment] >= 0 and not self._ahead[fragment]

    def _cut(self, plane: str, fragment: int, first: int, last: int) -> Tensor:
        flat: Tensor = getattr(self, plane)[fragment]
        origin, _ = self.fragments[fragment].span(*self.slices[fragment])
        start, stop = self.fragments[fragment].span(first, last)
        return flat[start - origin : stop - origin]
