"""Compression of pseudo-gradients: pure torch functions over whole blocks.

A codec turns fp32 blocks into bytes and back. The bytes of a block do not depend on its neighbours, so encoded blocks
are cut and joined like plain arrays. Decoding uses one rounding per operation and therefore gives the same bits on
every machine. int8: one fp32 scale (absmax / 127) per `GROUP` elements, round half to even, as in INTELLECT-1's
exchange (arXiv 2412.01152) but blockwise, so that one outlier costs its own group only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

GROUP = 256
"""Elements that share an int8 scale; divides the block size."""


@dataclass
class CodecConfig:
    """`codec=int8|none`."""

    name: str = "int8"


class Codec(Protocol):
    name: str

    def size(self, elements: int, block: int) -> int:
        """Bytes of `elements` encoded from a block boundary on."""
        ...

    def encode(self, flat: Tensor, block: int) -> Tensor:
        """fp32 [n] that starts at a block boundary -> uint8 [size(n)]."""
        ...

    def decode(self, data: Tensor, elements: int, block: int) -> Tensor:
        """uint8 [size(elements)] -> fp32 [elements]."""
        ...


class NoCompression:
    """fp32 as it is: 4 bytes per parameter."""

    name = "none"

    def size(self, elements: int, block: int) -> int:
        return 4 * elements

    def encode(self, flat: Tensor, block: int) -> Tensor:
        return flat.contiguous().view(torch.uint8).clone()

    def decode(self, data: Tensor, elements: int, block: int) -> Tensor:
        return data.clone().view(torch.float32)


class Int8:
    """Blockwise int8: 1 + 4 / GROUP bytes per parameter. A block is its scales (fp32), then its values (int8)."""

    name = "int8"

    def size(self, elements: int, block: int) -> int:
        return elements + 4 * -(-elements // GROUP)

    def encode(self, flat: Tensor, block: int) -> Tensor:
        whole = flat.numel() // block * block
        parts = [_encode_rows(flat[:whole].view(-1, block))] if whole else []
        if whole < flat.numel():
            parts.append(_encode_rows(flat[whole:].view(1, -1)))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)

    def decode(self, data: Tensor, elements: int, block: int) -> Tensor:
        whole = elements // block * block
        cut = self.size(whole, block)
        parts = [_decode_rows(data[:cut].view(whole // block, -1), block)] if whole else []
        if whole < elements:
            parts.append(_decode_rows(data[cut:].view(1, -1), elements - whole))
        return torch.cat(parts) if parts else torch.empty(0)


def _encode_rows(rows: Tensor) -> Tensor:
    """fp32 [r, n] -> uint8 [r * (4 * groups + n)]; the last group of a row may be short."""
    r, n = rows.shape
    groups = -(-n // GROUP)
    grouped = torch.nn.functional.pad(rows, (0, groups * GROUP - n)).view(r, groups, GROUP)
    scale = grouped.abs().amax(dim=2) / 127
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = (grouped / divisor.unsqueeze(2)).round_().clamp_(-127, 127).to(torch.int8).view(r, -1)[:, :n]
    return torch.cat([scale.contiguous().view(torch.uint8).view(r, -1), values.view(torch.uint8)], dim=1).view(-1)


def _decode_rows(rows: Tensor, n: int) -> Tensor:
    """uint8 [r, 4 * groups + n] -> fp32 [r * n]."""
    r, groups = rows.shape[0], -(-n // GROUP)
    scale = rows[:, : 4 * groups].clone(memory_format=torch.contiguous_format).view(torch.float32).view(r, groups, 1)
    values = rows[:, 4 * groups :].view(torch.int8).float()
    padded = torch.nn.functional.pad(values, (0, groups * GROUP - n)).view(r, groups, GROUP)
    return (padded * scale).view(r, -1)[:, :n].reshape(-1)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (NoCompression(), Int8())}
