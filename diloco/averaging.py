"""What the exchange computes on encoded blocks: decode, weighted mean in member order, encode once, digest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diloco.codec import GROUP, Codec
from diloco.fragments import Fragment, block_digests
from diloco.outer import weighted_mean


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

    def reduce(self, fragment: int, first: int, last: int, parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        mean = weighted_mean([self.decode(fragment, first, last, part) for part in parts], weights)
        return self.encode(fragment, mean)

    def digests(self, fragment: int, first: int, last: int, data: Tensor) -> bytes:
        """32 bytes for each of the blocks [first, last), of their encoded bytes."""
        if first == last:
            return b""
        stride = self.size(fragment, first, first + 1)  # every block but a fragment's last has this size
        return block_digests(data, stride)
