"""What the exchange computes on encoded blocks: decode, weighted mean in member order, encode once, digest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diloco.codec import GROUP, Codec
from diloco.fragments import Fragment, block_digests
from diloco.outer import weighted_mean
from elastic.plan import chunks

RUN = 16
"""Blocks (4 MiB of fp32) that are worked on at a time, so that temporaries do not grow with the fragment."""


class Averaging:
    """`elastic.exchange.Arithmetic` for these fragments and this codec."""

    def __init__(self, fragments: Sequence[Fragment], codec: Codec) -> None:
        assert all(f.block % GROUP == 0 for f in fragments), "a quantization group must not cross a block"
        self.fragments, self.codec = fragments, codec

    def blocks(self, fragment: int) -> int:
        return self.fragments[fragment].blocks

    def elements(self, fragment: int, first: int, last: int) -> int:
        start, stop = self.fragments[fragment].span(first, last)
        return stop - start

    def size(self, fragment: int, first: int, last: int) -> int:
        """Encoded bytes of the blocks [first, last)."""
        return self.codec.size(self.elements(fragment, first, last), self.fragments[fragment].block)

    def encode(self, fragment: int, flat: Tensor) -> Tensor:
        """fp32 [n] from a block boundary on -> uint8."""
        return self.codec.encode(flat, self.fragments[fragment].block)

    def decode(self, fragment: int, first: int, last: int, data: Tensor) -> Tensor:
        """uint8 of the blocks [first, last) -> fp32."""
        return self.codec.decode(data, self.elements(fragment, first, last), self.fragments[fragment].block)

    def encode_difference(
        self, fragment: int, first: int, last: int, minuend: Tensor, subtrahend: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(uint8 of minuend - subtrahend, sum of its squares: fp64 scalar). Both fp32, the blocks [first, last)."""
        data, squares = (
            torch.empty(self.size(fragment, first, last), dtype=torch.uint8),
            torch.zeros((), dtype=torch.float64),
        )
        for a, b in chunks(first, last, RUN):
            start, stop = self.elements(fragment, first, a), self.elements(fragment, first, b)
            delta = minuend[start:stop] - subtrahend[start:stop]
            squares += delta.double().square_().sum()
            data[self.size(fragment, first, a) : self.size(fragment, first, b)] = self.encode(fragment, delta)
        return data, squares

    def decode_runs(self, fragment: int, first: int, last: int, data: Tensor) -> Iterator[Tensor]:
        """What `decode` returns, in pieces from first to last."""
        for a, b in chunks(first, last, RUN):
            part = data[self.size(fragment, first, a) : self.size(fragment, first, b)]
            yield self.decode(fragment, a, b, part)

    def reduce(self, fragment: int, first: int, last: int, parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        mean = weighted_mean([self.decode(fragment, first, last, part) for part in parts], weights)
        return self.encode(fragment, mean)

    def digests(self, fragment: int, first: int, last: int, data: Tensor) -> bytes:
        """32 bytes for each of the blocks [first, last), of their encoded bytes."""
        if first == last:
            return b""
        stride = self.size(fragment, first, first + 1)  # every block but a fragment's last has this size
        return block_digests(data, stride)
