"""The flat layout: parameters grouped into fragments, fragments cut into blocks, blocks owned by ranks.

A fragment (Streaming DiLoCo, arXiv 2501.18512, section 2.2) is a group of parameters that is exchanged together. Its
*flat* form is the concatenation of its full, unsharded fp32 parameters in a fixed order, cut into blocks of `BLOCK`
elements (the last one short). Nothing here depends on a region's mesh, so regions of any shape agree on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from blake3 import blake3

BLOCK = 65536
"""Elements of a block: 256 KiB of fp32."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in its fragment: elements [start, stop) of the flat form, in row-major order."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class Fragment:
    """A group of parameters in flat form."""

    index: int
    slots: tuple[Slot, ...]
    block: int = BLOCK

    @property
    def elements(self) -> int:
        return self.slots[-1].stop

    @property
    def blocks(self) -> int:
        return -(-self.elements // self.block)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Elements [start, stop) of the blocks [first, last)."""
        return min(first * self.block, self.elements), min(last * self.block, self.elements)


def group_parameters(
    parameters: Sequence[tuple[str, tuple[int, ...]]], layers: dict[str, int], count: int, block: int = BLOCK
) -> tuple[Fragment, ...]:
    """Groups parameters into `count` fragments: layer i goes to fragment i mod count (strided), everything else,
    largest first, to the fragment that is smallest then. Inside a fragment the model's own order holds.

    parameters: (name, full shape) in the model's order, tied ones once; layers: name -> index of its layer.
    """
    chosen = {name: layers[name] % count for name, _ in parameters if name in layers}
    sizes = [0] * count
    for name, shape in parameters:
        if name in chosen:
            sizes[chosen[name]] += prod(shape)
    others = [(name, prod(shape)) for name, shape in parameters if name not in chosen]
    for name, size in sorted(others, key=lambda item: -item[1]):
        chosen[name] = sizes.index(min(sizes))
        sizes[chosen[name]] += size
    return tuple(
        Fragment(i, tuple(_slots((n, s) for n, s in parameters if chosen[n] == i)), block) for i in range(count)
    )


def _slots(parameters: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[Slot]:
    start = 0
    for name, shape in parameters:
        yield Slot(name, tuple(shape), start)
        start += prod(shape)


def block_digests(flat: torch.Tensor, block: int) -> bytes:
    """BLAKE3 of each block of a contiguous 1-D CPU tensor, concatenated: 32 bytes a block. `flat` starts at a block."""
    data = flat.contiguous().view(torch.uint8).numpy().data
    step = block * flat.element_size()
    return b"".join(blake3(data[i : i + step]).digest() for i in range(0, len(data), step))


def digest(digests: bytes) -> str:
    """The digest of a fragment from its blocks' digests in order: the same whoever computed which block."""
    return blake3(digests).hexdigest()
