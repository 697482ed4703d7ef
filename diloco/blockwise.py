"""What all codecs share: cutting flat tensors into blocks, and the dense codecs' way of laying out a block.

A flat tensor is rows of whole blocks, and maybe a short block. Rows are worked on in pieces of a few, so that these stay in
a core's cache; the sizes of pieces are the shapes that are compiled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from diloco.kernels import Kernel
from diloco.rounding import block_keys

PIECES = (4, 2, 1)
"""Blocks that are worked on together, as many as there are: 4 are 1 MiB of fp32. One alone runs eager."""

Terms = tuple[Tensor, Tensor | None, Tensor | None]
"""(minuend, subtrahend, residual), fp32 of one shape: minuend - subtrahend + residual is encoded. None is left out."""


@dataclass(frozen=True)
class Rows:
    """Blocks of one length in a flat tensor: elements from `start`, bytes from `begin`."""

    first: int
    count: int
    length: int
    start: int
    begin: int
    size: int
    """Bytes of a block."""

    def cut(self, flat: Tensor) -> Tensor:
        """fp32 [n] -> [count, length]."""
        return flat[self.start : self.start + self.count * self.length].view(self.count, self.length)

    def cut_bytes(self, data: Tensor) -> Tensor:
        """uint8 [bytes] -> [count, size]."""
        return data[self.begin : self.begin + self.count * self.size].view(self.count, self.size)


class Codec(ABC):
    """Turns fp32 blocks into bytes and back. The bytes of a block do not depend on its neighbours, so encoded blocks are
    cut and joined like plain arrays. Decoding rounds at most once per operation: the same bits on every machine."""

    name: str
    gathers = False
    """Sparse: contributions are gathered and summed when decoded, never encoded again."""

    @abstractmethod
    def block_size(self, length: int) -> int:
        """Bytes of one block of `length` > 0 elements."""

    @abstractmethod
    def encode_rows(self, terms: Terms, keys: Tensor | None, rows: Tensor) -> None:
        """[r, n] each -> rows, uint8 [r, block_size(n)]. keys: int32 [r, 2] if `rounds_stochastically`."""

    @abstractmethod
    def decode_rows(self, rows: Tensor, out: Tensor) -> None:
        """uint8 [r, block_size(n)] -> out, fp32 [r, n]."""

    @abstractmethod
    def accumulate_rows(self, rows: Tensor, weight: Tensor, total: Tensor) -> float:
        """total += weight * decoded. weight: fp32 scalar; total: fp32 [r, n]. Returns the sum of the squares of what is
        decoded, not finite if any of it is not."""

    @abstractmethod
    def scales(self, rows: Tensor, length: int) -> Tensor:
        """What is not finite if a number that was encoded is not. rows: uint8 [r, block_size(length)]."""

    rounds_stochastically = False

    def size(self, elements: int, block: int) -> int:
        """Bytes of `elements` encoded from a block boundary on: whole blocks and, maybe, a short one."""
        whole, rest = divmod(elements, block)
        return (whole * self.block_size(block) if whole else 0) + (self.block_size(rest) if rest else 0)

    def encode(self, flat: Tensor, block: int, seed: int = 0, first: int = 0) -> Tensor:
        """fp32 [n] that starts at a block boundary -> uint8 [size(n)]. seed, first: see `encode_into`."""
        out = torch.empty(self.size(flat.numel(), block), dtype=torch.uint8)
        self.encode_into(out, (flat, None, None), block, seed, first)
        return out

    def encode_into(self, out: Tensor, terms: Terms, block: int, seed: int = 0, first: int = 0) -> None:
        """[n] each, from a block boundary on -> out, uint8 [size(n)]. Stochastic rounding is a function of seed, the
        blocks' indices from `first` on, and the values."""
        for part in self.rows(terms[0].numel(), block):
            keys = block_keys(seed, first + part.first, part.count) if self.rounds_stochastically else None
            self.encode_rows(each(terms, part.cut), keys, part.cut_bytes(out))

    def decode(self, data: Tensor, elements: int, block: int) -> Tensor:
        """uint8 [size(elements)] -> fp32 [elements]."""
        out = torch.empty(elements)
        for part in self.rows(elements, block):
            self.decode_rows(part.cut_bytes(data), part.cut(out))
        return out

    def accumulate(self, total: Tensor, data: Tensor, weight: float, block: int) -> float:
        """total += weight * decode(data), a product and a sum that round one after the other. total: fp32 [n]. Returns
        decode(data)'s squared norm, not finite if any of it is not."""
        factor = torch.tensor(weight, dtype=torch.float32)
        parts = self.rows(total.numel(), block)
        return sum(self.accumulate_rows(part.cut_bytes(data), factor, part.cut(total)) for part in parts)

    def finite(self, data: Tensor, elements: int, block: int) -> bool:
        """Whether all that was encoded is finite."""
        parts = self.rows(elements, block)
        return all(bool(self.scales(part.cut_bytes(data), part.length).isfinite().all()) for part in parts)

    @abstractmethod
    def prepare(self, block: int, feedback: bool) -> None:
        """Compiles what it pays for, for whole blocks of this size. feedback: contributions have residuals. Raises
        RuntimeError or OSError if it cannot be."""

    def rows(self, elements: int, block: int) -> Iterator[Rows]:
        """The whole blocks, and the short one."""
        whole, rest = divmod(elements, block)
        size = self.block_size(block) if whole else 0
        if whole:
            yield Rows(0, whole, block, 0, 0, size)
        if rest:
            yield Rows(whole, 1, rest, whole * block, whole * size, self.block_size(rest))


class Dense(Codec):
    """A block is the scales of its groups, if there are any, then its values, `packed` bytes a group. Where a value takes
    whole bytes, those of the last group end with its elements."""

    group = 1
    """Elements that share a scale."""
    scale: torch.dtype | None = None
    value: torch.dtype
    packed: int
    """Bytes of a group's values."""
    encode_kernel: Kernel
    """(minuend, subtrahend, residual, keys, scales, values): writes the last two."""
    decode_kernel: Kernel
    """(scales, values, out): writes out."""
    accumulate_kernel: Kernel
    """(scales, values, weight, total, sums): adds to total; writes the sum of the squares of a group's values to sums, unless
    there are no scales. Numbers are [r, groups, group], scales and sums [r, groups]; values that are bytes come as fp32."""

    def block_size(self, length: int) -> int:
        width = self.packed // self.group
        return self._head(length) + (width * length if width else self.packed * self._groups(length))

    def encode_rows(self, terms: Terms, keys: Tensor | None, rows: Tensor) -> None:
        length = terms[0].shape[1]
        target = rows if self._fits(rows, length) else self._buffer(rows.shape[0], length)
        in_pieces(self._encode, *each(terms, self._grouped), keys, *self._split(target, length))
        if target is not rows:
            rows.copy_(target[:, : rows.shape[1]])

    def decode_rows(self, rows: Tensor, out: Tensor) -> None:
        length = out.shape[1]
        if self._fits(rows, length):
            in_pieces(self._decode, *self._split(rows, length), self._grouped(out))
            return
        source = self._buffer(rows.shape[0], length)
        source[:, : rows.shape[1]] = rows
        padded = torch.empty(rows.shape[0], self._groups(length), self.group)
        in_pieces(self._decode, *self._split(source, length), padded)
        out.copy_(padded.flatten(1)[:, :length])

    def accumulate_rows(self, rows: Tensor, weight: Tensor, total: Tensor) -> float:
        scales, values = self._split(rows, total.shape[1]) if self._fits(rows, total.shape[1]) else (None, rows)
        if scales is not None:
            sums = torch.empty(scales.shape)
            in_pieces(self._accumulate, scales, values, weight, self._grouped(total), sums)
            return scales.double().square_().mul_(sums).sum().item()
        decoded = torch.empty_like(total)
        self.decode_rows(rows, decoded)
        squares = squared_norm(decoded.view(-1))
        total.add_(decoded.mul_(weight))
        return squares

    def scales(self, rows: Tensor, length: int) -> Tensor:
        head = self._head(length) or rows.shape[1]
        return rows[:, :head].clone(memory_format=torch.contiguous_format).view(self.scale or self.value)

    def prepare(self, block: int, feedback: bool) -> None:
        for count in PIECES[:-1]:
            numbers = [self._grouped(x) for x in samples(3, count, block)]
            keys = block_keys(0, 0, count) if self.rounds_stochastically else None
            scales, values = self._split(self._buffer(count, block), block)
            parts = scales, widened(values)
            self.encode_kernel.prepare(numbers[0], None, None, keys, *parts)
            self.encode_kernel.prepare(*numbers[:2], numbers[2] if feedback else None, keys, *parts)
            self.encode_kernel(numbers[0], None, None, keys, *parts)
            if count == PIECES[0]:  # what is decoded alone is long
                self.decode_kernel.prepare(*parts, numbers[1])
            self.accumulate_kernel.prepare(*parts, torch.tensor(0.1), numbers[1], torch.empty(values.shape[:2]))

    def _encode(
        self,
        minuend: Tensor,
        subtrahend: Tensor | None,
        residual: Tensor | None,
        keys: Tensor | None,
        scales: Tensor | None,
        values: Tensor,
    ) -> None:
        wide = torch.empty(values.shape, device=values.device) if is_byte(values) else values
        self.encode_kernel(minuend, subtrahend, residual, keys, scales, wide)
        if wide is not values:
            values.copy_(wide)

    def _decode(self, scales: Tensor | None, values: Tensor, out: Tensor) -> None:
        self.decode_kernel(scales, widened(values), out)

    def _accumulate(self, scales: Tensor, values: Tensor, weight: Tensor, total: Tensor, sums: Tensor) -> None:
        self.accumulate_kernel(scales, widened(values), weight, total, sums)

    def _groups(self, length: int) -> int:
        return -(-length // self.group)

    def _head(self, length: int) -> int:
        """Bytes of a block's scales."""
        return self._groups(length) * self.scale.itemsize if self.scale else 0

    def _fits(self, rows: Tensor, length: int) -> bool:
        """The bytes can be seen as scales and whole groups of values where they are."""
        width = (self.scale or self.value).itemsize
        places = (rows.data_ptr(), rows.storage_offset(), rows.stride(0))
        return length % self.group == 0 and not any(place % width for place in places)

    def _buffer(self, rows: int, length: int) -> Tensor:
        """Room for blocks with whole groups: uint8 [rows, ...]."""
        return torch.zeros(rows, self._head(length) + self.packed * self._groups(length), dtype=torch.uint8)

    def _grouped(self, x: Tensor) -> Tensor:
        """[r, n] -> [r, groups, group]; zeros where the last group has no elements."""
        x = pad(x, (0, -x.shape[1] % self.group)) if x.shape[1] % self.group else x
        return x.view(x.shape[0], -1, self.group)

    def _split(self, rows: Tensor, length: int) -> tuple[Tensor | None, Tensor]:
        """(scales [r, groups], values [r, groups, packed values]), both seen in rows."""
        groups, head = self._groups(length), self._head(length)
        values = rows[:, head:].view(self.value).view(rows.shape[0], groups, -1)
        return rows[:, :head].view(self.scale) if self.scale else None, values


def each(terms: Terms, function: Callable[[Tensor], Tensor]) -> Terms:
    minuend, subtrahend, residual = terms
    return (
        function(minuend),
        None if subtrahend is None else function(subtrahend),
        None if residual is None else function(residual),
    )


def difference(minuend: Tensor, subtrahend: Tensor | None, residual: Tensor | None) -> Tensor:
    """minuend - subtrahend + residual, in this order."""
    x = minuend if subtrahend is None else minuend - subtrahend
    return x if residual is None else x + residual


def squared_norm(flat: Tensor) -> float:
    """Of fp32 [n]: in fp64 where fp32 would overflow."""
    total = torch.dot(flat, flat)
    return (total if total.isfinite() else flat.double().square_().sum()).item()


def is_byte(values: Tensor) -> bool:
    return values.dtype.itemsize == 1


def widened(values: Tensor) -> Tensor:
    """Bytes as fp32, contiguous, which kernels read and write. On AVX2, inductor's code loads vectors of integers by way of
    the stack, which stalls (40 cycles for 8), and narrows them one by one; eager conversions run as fast as the cache."""
    return values.float() if is_byte(values) else values


def in_pieces(function: Callable[..., None], *arguments: Tensor | None) -> None:
    """Calls it with a few rows of all arguments at a time; what has no rows goes to all."""
    at, end = 0, max(x.shape[0] for x in arguments if x is not None and x.ndim)
    while at < end:
        stop = at + next(size for size in PIECES if size <= end - at)
        function(*(x if x is None or not x.ndim else x[at:stop] for x in arguments))
        at = stop


def samples(count: int, rows: int, length: int) -> list[Tensor]:
    """Numbers to compare arithmetic on: fp32 [rows, length] each, of all sizes, a quarter of them zero."""
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(-148, 120, (count, rows, length), generator=generator).float().exp2()
    size *= torch.rand(count, rows, length, generator=generator) < 0.75
    return list(torch.randn(count, rows, length, generator=generator) * size)
