"""Top-k + 2 bits: of every chunk of 4096 elements the 64 largest, as in Covenant-72B (arXiv 2603.08163) and SparseLoCo
(arXiv 2508.15706). Meant for error feedback, which keeps what was not sent.

A chunk's bytes: the smaller and the larger magnitude (bf16, together what one fp32 scale takes), the k indices in rising
order (12 bits), the k values (2 bits: the sign, and which of the two magnitudes). 116 bytes for 4096 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from diloco.blockwise import Codec, Terms, difference, in_pieces, squared_norm

CHUNK = 4096
K = 64
"""Elements kept of a whole chunk; of a short one the same share, rounded up."""
GROUPS = 512
"""The K largest of a chunk lie in those K of these strided groups that have the largest maxima, so most are not sorted."""
LLOYD = 3
"""Refinements of the two magnitudes."""


class TopK(Codec):
    """116 / 4096 = 0.0283 bytes per parameter. A chunk of n elements keeps k = ceil(n / 64) of them and takes
    4 + ceil(3 k / 2) + ceil(k / 4) bytes."""

    name = "topk"
    gathers = True

    def block_size(self, length: int) -> int:
        whole, rest = divmod(length, CHUNK)
        return whole * chunk_size(CHUNK) + (chunk_size(rest) if rest else 0)

    def encode_rows(self, terms: Terms, keys: Tensor | None, rows: Tensor) -> None:
        in_pieces(self._encode, *terms, rows)

    def _encode(self, minuend: Tensor, subtrahend: Tensor | None, residual: Tensor | None, rows: Tensor) -> None:
        for chunks, data in self._chunks(difference(minuend, subtrahend, residual), rows):
            data.copy_(encode_chunks(chunks.reshape(-1, chunks.shape[2])).view(data.shape))

    def prepare(self, block: int, feedback: bool) -> None:
        """Nothing: most of the time goes into `topk`, a library call in either case."""

    def decode_rows(self, rows: Tensor, out: Tensor) -> None:
        for chunks, data in self._chunks(out, rows):
            chunks.zero_().scatter_(2, *decode_chunks(data, chunks.shape[2]))

    def accumulate_rows(self, rows: Tensor, weight: Tensor, total: Tensor) -> float:
        """Touches what was sent only: to the others it would add 0, of which a total that began at 0 shows nothing."""
        squares = 0.0
        for chunks, data in self._chunks(total, rows):
            index, values = decode_chunks(data, chunks.shape[2])
            squares += squared_norm(values.view(-1))
            chunks.scatter_(2, index, chunks.gather(2, index).add_(values.mul_(weight)))
        return squares

    def scales(self, rows: Tensor, length: int) -> Tensor:
        parts = [data[..., :4].reshape(-1) for _, data in self._chunks(torch.empty(rows.shape[0], length), rows)]
        return torch.cat(parts).view(torch.bfloat16)

    def _chunks(self, flat: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of blocks [r, n] and their bytes [r, size] by chunks: [r, c, 4096] and [r, c, 116], then a short one's."""
        whole, rest = divmod(flat.shape[1], CHUNK)
        cut, size = whole * CHUNK, whole * chunk_size(CHUNK)
        parts = []
        if whole:
            shape = (flat.shape[0], whole, -1)
            parts.append((flat[:, :cut].view(shape), rows[:, :size].view(shape)))
        if rest:
            parts.append((flat[:, cut:].unsqueeze(1), rows[:, size:].unsqueeze(1)))
        return parts


def kept(length: int) -> int:
    return -(-length * K // CHUNK)


def chunk_size(length: int) -> int:
    k = kept(length)
    return 4 + -(-3 * k // 2) + -(-k // 4)


def encode_chunks(x: Tensor) -> Tensor:
    """fp32 [c, n], n <= 4096 -> uint8 [c, chunk_size(n)]."""
    index = largest(x, kept(x.shape[1]))
    values = x.gather(1, index)
    low, high, above = two_levels(values.abs().double())
    levels = torch.cat([low, high], 1).to(torch.bfloat16).view(torch.uint8)
    return torch.cat([levels, pack12(index), pack2(above + 2 * (values < 0))], 1)


def decode_chunks(data: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """uint8 [r, c, chunk_size(length)] -> (indices below length: int64 [r, c, k], values: fp32 [r, c, k]). Of indices
    that are not different, as only a broken peer sends them, the last counts."""
    k = kept(length)
    cut = 4 + -(-3 * k // 2)
    index, code = unpack12(data[..., 4:cut], k), unpack2(data[..., cut:], k)
    levels = data[..., :4].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    magnitude = levels.gather(2, code & 1)
    return index.clamp_(max=length - 1), torch.where(code < 2, magnitude, -magnitude)


def largest(x: Tensor, k: int) -> Tensor:
    """Indices, rising, of the k largest magnitudes of each row: fp32 [c, n] -> int64 [c, k]. Not-a-number is the largest;
    of equals those with the least (i mod GROUPS, i div GROUPS) count."""
    bits = x.view(torch.int32) & 0x7FFFFFFF  # in the order of the magnitudes
    index = torch.arange(x.shape[1])
    if x.shape[1] == CHUNK:
        grouped = bits.view(len(x), -1, GROUPS)
        order = grouped.amax(1).long() << 9 | GROUPS - 1 - index[:GROUPS]
        top = order.topk(k, 1, sorted=False).indices.unsqueeze(1)
        bits = grouped.gather(2, top.expand(-1, grouped.shape[1], -1)).flatten(1)
        index = (top + index[::GROUPS].unsqueeze(1)).flatten(1)
    place = (index & 511) << 3 | index >> 9  # (i mod GROUPS, i div GROUPS) as one number
    order = bits.long() << 12 | CHUNK - 1 - place
    place = CHUNK - 1 - (order.topk(k, 1, sorted=False).values & 4095)
    return (place >> 3 | (place & 7) << 9).sort(1).values


def two_levels(magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(low, high: fp64 [c, 1], above: uint8 [c, k]): two numbers that stand for the magnitudes, fp64 [c, k], each the mean
    of its own, with nearly the least squared error (Lloyd's method, three times)."""
    threshold = magnitude.mean(1, keepdim=True)
    for _ in range(LLOYD):
        above = magnitude > threshold
        count = above.sum(1, keepdim=True)
        high = torch.where(above, magnitude, 0).sum(1, keepdim=True) / count.clamp(min=1)
        low = torch.where(above, 0, magnitude).sum(1, keepdim=True) / (magnitude.shape[1] - count).clamp(min=1)
        threshold = (low + high) / 2
    return low, high, above.to(torch.uint8)


def pack12(x: Tensor) -> Tensor:
    """Two numbers below 4096 in three bytes, the first in the low bits: int64 [c, k] -> uint8 [c, ceil(3 k / 2)]."""
    a, b = pad(x, (0, x.shape[1] % 2)).view(len(x), -1, 2).unbind(2)
    data = torch.stack([a & 255, a >> 8 | (b & 15) << 4, b >> 4], 2).to(torch.uint8).flatten(1)
    return data[:, : -(-3 * x.shape[1] // 2)]


def unpack12(data: Tensor, k: int) -> Tensor:
    """The opposite of `pack12`, of any number of dimensions."""
    a, b, c = pad(data, (0, -data.shape[-1] % 3)).long().unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([a | (b & 15) << 8, b >> 4 | c << 4], -1).flatten(-2)[..., :k]


def pack2(x: Tensor) -> Tensor:
    """Four numbers below 4 in a byte, the first in the low bits: uint8 [c, k] -> uint8 [c, ceil(k / 4)]."""
    a, b, c, d = pad(x, (0, -x.shape[1] % 4)).view(len(x), -1, 4).unbind(2)
    return a | b << 2 | c << 4 | d << 6


def unpack2(data: Tensor, k: int) -> Tensor:
    """The opposite of `pack2`, of any number of dimensions: int64."""
    return torch.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)[..., :k].long()
