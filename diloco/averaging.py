"""What the exchange computes on encoded blocks: contributions, their weighted mean in member order, digests.

A dense codec's mean is encoded once by the block's owner. Of a sparse one all contributions are gathered, and everyone
sums them in member order when decoding: encoding the mean again would drop most of it (SparseLoCo, arXiv 2508.15706).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diloco.blockwise import Codec, each
from diloco.fragments import Fragment, block_digests
from elastic.plan import CHUNK, NotFinite, chunks

RUN = 16
"""Blocks (4 MiB of fp32) that are worked on at a time, so that temporaries do not grow with the fragment."""


class Contribution:
    """One rank's encoded blocks [first, last) of minuend - subtrahend (+ residual), made when they are first read.

    minuend, subtrahend, residual: fp32 [n] on CPU, the slice's elements; the first two must not change while this lives.
    data: where the bytes go, uint8.
    seed: of stochastic rounding. Bytes are a function of (seed, block, the block's elements), so a retry sends the same.
    """

    def __init__(
        self,
        averaging: Averaging,
        fragment: int,
        first: int,
        last: int,
        minuend: Tensor,
        subtrahend: Tensor,
        residual: Tensor | None = None,
        seed: int = 0,
        data: Tensor | None = None,
    ) -> None:
        self.averaging, self.fragment, self.first, self.last = averaging, fragment, first, last
        self.minuend, self.subtrahend, self.residual, self.seed = minuend, subtrahend, residual, seed
        self._data = averaging.zeros(averaging.size(fragment, first, last), dtype=torch.uint8) if data is None else data
        self._todo, self._doing = set(range(first, last)), set[int]()
        self._changed = threading.Condition()

    def read(self, first: int, last: int) -> Tensor:
        """uint8: the bytes of the blocks [first, last), the same ever after. Any number of threads may read at a time.
        Raises FloatingPointError if the blocks hold a number that is not finite."""
        for a, b in self._claim(first, last):
            done = False
            try:
                self._encode(a, b)
                done = True
            finally:
                self._release(a, b, done)
        with self._changed:
            self._changed.wait_for(lambda: not self._doing.intersection(range(first, last)))
            failed = self._todo.intersection(range(first, last))
        return self.read(first, last) if failed else self._bytes(first, last)

    def shared(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What `Averaging.rebuild` makes the same contribution of in another process, which sees the same memory: all
        tensors have to be in memory that can be shared."""
        fields = {"fragment": self.fragment, "first": self.first, "last": self.last, "seed": self.seed}
        residual = [] if self.residual is None else [self.residual]
        return fields, [self._data, self.minuend, self.subtrahend, *residual]

    def filled(self) -> None:
        """The other process has encoded all blocks."""
        with self._changed:
            self._todo.clear()

    def squares(self) -> Tensor:
        """fp64 scalar: sum of the squares of what is encoded."""
        total = torch.zeros((), dtype=torch.float64)
        for a, b in chunks(self.first, self.last, RUN):
            delta = self._cut(self.minuend, a, b) - self._cut(self.subtrahend, a, b)
            if self.residual is not None:
                delta += self._cut(self.residual, a, b)
            total += delta.double().square_().sum()
        return total

    def update_residual(self) -> None:
        """e <- decay * ((delta + e) - decode(encode(delta + e))), in place: what this contribution, now used, left out.
        Call it once, at the end: a later `read` gives the old bytes still."""
        assert self.residual is not None
        for a, b in chunks(self.first, self.last, RUN):
            sent = self.averaging.decode(self.fragment, a, b, self.read(a, b))
            error = self._cut(self.residual, a, b)
            error.add_(self._cut(self.minuend, a, b) - self._cut(self.subtrahend, a, b)).sub_(sent)
            error.mul_(self.averaging.decay)

    def _claim(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs of at most CHUNK blocks in [first, last) that nobody has encoded or is encoding; now the caller is."""
        at = first
        while at < last:
            with self._changed:
                stop = at
                while stop < min(last, at + CHUNK) and stop in self._todo and stop not in self._doing:
                    stop += 1
                self._doing.update(range(at, stop))
            if stop > at:
                yield at, stop
            at = max(stop, at + 1)

    def _release(self, first: int, last: int, done: bool) -> None:
        with self._changed:
            self._doing.difference_update(range(first, last))
            if done:
                self._todo.difference_update(range(first, last))
            self._changed.notify_all()

    def _encode(self, first: int, last: int) -> None:
        codec, block, data = (
            self.averaging.codec,
            self.averaging.fragments[self.fragment].block,
            self._bytes(first, last),
        )
        terms = each((self.minuend, self.subtrahend, self.residual), lambda flat: self._cut(flat, first, last))
        codec.encode_into(data, terms, block, self.seed, first)
        if not codec.finite(data, terms[0].numel(), block):
            raise FloatingPointError(f"blocks {first} to {last - 1} of fragment {self.fragment} are not finite")

    def _cut(self, flat: Tensor, first: int, last: int) -> Tensor:
        start, stop = self.averaging.fragments[self.fragment].span(first, last)
        return flat[start - self._start : stop - self._start]

    @property
    def _start(self) -> int:
        return self.averaging.fragments[self.fragment].span(self.first, self.first)[0]

    def _bytes(self, first: int, last: int) -> Tensor:
        begin = self.averaging.size(self.fragment, self.first, first)
        return self._data[begin : begin + self.averaging.size(self.fragment, first, last)]


class Averaging:
    """`elastic.exchange.Arithmetic` for these fragments and this codec. decay: of the error-feedback residual; zeros: makes
    what contributions are encoded into."""

    def __init__(
        self,
        fragments: Sequence[Fragment],
        codec: Codec,
        decay: float = 1.0,
        zeros: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        self.fragments, self.codec, self.decay, self.zeros = fragments, codec, decay, zeros

    @property
    def gathers(self) -> bool:
        """Results hold all members' contributions, per block one after the other, instead of their encoded mean."""
        return self.codec.gathers

    def blocks(self, fragment: int) -> int:
        return self.fragments[fragment].blocks

    def elements(self, fragment: int, first: int, last: int) -> int:
        start, stop = self.fragments[fragment].span(first, last)
        return stop - start

    def size(self, fragment: int, first: int, last: int) -> int:
        """Encoded bytes of the blocks [first, last) of one contribution."""
        return self.codec.size(self.elements(fragment, first, last), self.fragments[fragment].block)

    def result_size(self, fragment: int, first: int, last: int, members: int) -> int:
        """Bytes of the blocks [first, last) of a result."""
        return self.size(fragment, first, last) * (members if self.gathers else 1)

    def contribution(
        self,
        fragment: int,
        first: int,
        last: int,
        minuend: Tensor,
        subtrahend: Tensor,
        residual: Tensor | None = None,
        seed: int = 0,
    ) -> Contribution:
        """This rank's blocks [first, last) of minuend - subtrahend (+ residual); see `Contribution`."""
        return Contribution(self, fragment, first, last, minuend, subtrahend, residual, seed)

    def rebuild(self, fields: dict[str, Any], tensors: Sequence[Tensor]) -> Contribution:
        """From what `Contribution.shared` gave."""
        data, minuend, subtrahend, *rest = tensors
        residual = rest[0] if rest else None
        return Contribution(self, **fields, minuend=minuend, subtrahend=subtrahend, residual=residual, data=data)

    def warm(self, feedback: bool) -> str | None:
        """Compiles the codec's arithmetic, seconds the first time on a machine; before any thread uses it. Returns why it
        stays eager, None if it does not. feedback: contributions have residuals."""
        try:
            self.codec.prepare(self.fragments[0].block, feedback)
        except (RuntimeError, OSError) as error:
            return f"{self.codec.name} runs eager, compiling it failed: {str(error).strip().splitlines()[0]}"
        return None

    def encode(self, fragment: int, flat: Tensor, first: int = 0) -> Tensor:
        """fp32 [n], the blocks from `first` on -> uint8."""
        return self.codec.encode(flat, self.fragments[fragment].block, first=first)

    def decode(self, fragment: int, first: int, last: int, data: Tensor) -> Tensor:
        """uint8 of the blocks [first, last) of one contribution, or of a dense result -> fp32."""
        return self.codec.decode(data, self.elements(fragment, first, last), self.fragments[fragment].block)

    def decode_runs(
        self, fragment: int, first: int, last: int, data: Tensor, weights: Sequence[float] = (1.0,)
    ) -> Iterator[Tensor]:
        """The averaged pseudo-gradient of the blocks [first, last) in pieces, fp32, from first to last.
        data: the result's bytes; weights: the members', in order (a dense result has used them already)."""
        for a, b in chunks(first, last, RUN):
            begin = self.result_size(fragment, first, a, len(weights))
            part = data[begin : begin + self.result_size(fragment, a, b, len(weights))]
            if self.gathers:
                yield self._mean(fragment, a, b, self._split(fragment, a, b, part, len(weights)), weights)[0]
            else:
                yield self.decode(fragment, a, b, part)

    def reduce(
        self, fragment: int, first: int, last: int, parts: Sequence[Tensor], weights: Sequence[float]
    ) -> tuple[Tensor, list[float]]:
        """The result's bytes of the blocks [first, last), and the squared norm of each part. parts: the members' bytes of
        these blocks, uint8, in order. Dense: the encoded weighted mean. Sparse: all parts, per block one after the other.
        Raises NotFinite."""
        mean, squares = self._mean(fragment, first, last, parts, weights)
        for index, square in enumerate(squares):
            if not math.isfinite(square):
                raise NotFinite(index)
        if self.gathers:
            return self._interleave(fragment, first, last, parts), squares
        data = self.encode(fragment, mean, first)
        if not self._finite(fragment, first, last, data):
            raise NotFinite(-1)
        return data, squares

    def _finite(self, fragment: int, first: int, last: int, data: Tensor) -> bool:
        """Of one contribution, or of a dense result."""
        return self.codec.finite(data, self.elements(fragment, first, last), self.fragments[fragment].block)

    def digests(self, fragment: int, first: int, last: int, data: Tensor, members: int = 1) -> bytes:
        """32 bytes for each of the blocks [first, last), of their bytes in a result of so many members."""
        if first == last:
            return b""
        stride = self.result_size(fragment, first, first + 1, members)  # all but a fragment's last block have this size
        return block_digests(data, stride)

    def _mean(
        self, fragment: int, first: int, last: int, parts: Sequence[Tensor], weights: Sequence[float]
    ) -> tuple[Tensor, list[float]]:
        """fp32: sum(w * part) / sum(w) in member order, with the bits of `diloco.outer.weighted_mean`; and the parts' squared
        norms."""
        start = 0.0 if self.gathers else -0.0  # -0 + x is x, whatever x; sparse codecs pass over what is not there
        total = torch.full((self.elements(fragment, first, last),), start)
        block, each = self.fragments[fragment].block, zip(parts, weights, strict=True)
        squares = [self.codec.accumulate(total, part, weight, block) for part, weight in each]
        return total.div_(torch.tensor(sum(weights), dtype=torch.float32)), squares

    def _interleave(self, fragment: int, first: int, last: int, parts: Sequence[Tensor]) -> Tensor:
        shape, cut = self._whole(fragment, first, last)
        rows = torch.stack([part[:cut].view(shape) for part in parts], 1)
        return torch.cat([rows.view(-1), *(part[cut:] for part in parts)])

    def _split(self, fragment: int, first: int, last: int, data: Tensor, members: int) -> list[Tensor]:
        """The opposite of `_interleave`."""
        (blocks, size), cut = self._whole(fragment, first, last)
        rows, rest = data[: members * cut].view(blocks, members, size), data[members * cut :].view(members, -1)
        return [torch.cat([rows[:, m].reshape(-1), rest[m]]) for m in range(members)]

    def _whole(self, fragment: int, first: int, last: int) -> tuple[tuple[int, int], int]:
        """((blocks, bytes of each), bytes) of those of the blocks [first, last) that are not short."""
        of = self.fragments[fragment]
        blocks = self.elements(fragment, first, last) // of.block
        size = self.codec.size(of.block, of.block)
        return (blocks, size), blocks * size
