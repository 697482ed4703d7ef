"""How the flat planes of a checkpoint map to the parameters of its model, from what its manifest says.

`layout` is a list of fragments, each a list of slots {name, shape, start}: the parameter's elements, row-major, begin at
`start` of the fragment. With `model` ({target, args, seq_len}) that is all an export needs: no training code.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from ckpt.checkpoint import MANIFEST, DamagedError
from ckpt.format import FormatError, field, is_count, is_list, require, spans_of
from ckpt.reading import Reader
from ckpt.store import Store

THETA = "theta"
BLOCK = 1 << 22
"""Elements read at a time (16 MiB)."""


@dataclass(frozen=True)
class Slot:
    """A parameter's place: elements [start, stop) of a fragment, row-major."""

    name: str
    shape: tuple[int, ...]
    fragment: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


def encode_layout(fragments: Sequence[Sequence[tuple[str, Sequence[int]]]]) -> list[list[dict[str, Any]]]:
    """What a manifest says of fragments of parameters (name, shape), which follow each other without a gap."""
    layout = []
    for parameters in fragments:
        start, slots = 0, []
        for name, shape in parameters:
            slots.append({"name": name, "shape": list(shape), "start": start})
            start += prod(shape)
        layout.append(slots)
    return layout


def slots_of(manifest: dict[str, Any]) -> list[Slot]:
    """The slots of a manifest, fragment by fragment. FormatError unless they are there, well formed and fill θ."""
    layout = field(manifest, "layout", is_list, "a body")
    slots = [slot for f, fragment in enumerate(layout) for slot in _fragment(f, fragment)]
    names = {slot.name for slot in slots}
    require(len(names) == len(slots), "names a parameter twice in its layout")
    filled, held = dict[int, int](), dict[int, int]()
    for slot in slots:
        filled[slot.fragment] = slot.stop
    for span in spans_of(manifest):
        if span.plane == THETA:
            held[span.fragment] = span.stop
    require(filled == held, f"has a layout of {filled} elements by fragment, but {held} of them in {THETA}")
    return slots


def _fragment(index: int, value: Any) -> Iterator[Slot]:
    require(is_list(value), f"has fragment {index} of its layout as no list")
    end = 0
    for entry in value:
        name = field(entry, "name", _is_parameter, f"a slot of fragment {index}")
        shape = field(entry, "shape", _is_shape, f"the slot of {name}")
        slot = Slot(name, tuple(shape), index, field(entry, "start", is_count, f"the slot of {name}"))
        require(slot.start == end, f"has {name} at element {slot.start} of fragment {index}, not at {end}")
        end = slot.stop
        yield slot


def _is_parameter(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable()


def _is_shape(value: Any) -> bool:
    return is_list(value) and all(map(is_count, value)) and is_count(prod(value))


class Theta:
    """θ of a checkpoint by parameter; what is read is verified."""

    def __init__(self, store: Store, manifest: dict[str, Any]):
        """`manifest` is from load_manifest; DamagedError if its layout is missing or malformed."""
        self._reader = Reader(store, manifest)
        try:
            self.slots = {slot.name: slot for slot in slots_of(manifest)}
        except FormatError as error:
            raise DamagedError(f"{store.url}: {manifest['prefix']}/{MANIFEST} is damaged: it {error}") from error

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter, fp32 [stop - start]; DamagedError if a part is missing."""
        slot = self.slots[name]
        return self._reader.read(THETA, slot.fragment, slot.start + start, slot.start + stop)

    def blocks(self, name: str, granule: int = 1) -> Iterator[Tensor]:
        """A parameter's elements in order, flat, in runs of whole granules of about BLOCK elements."""
        for start, stop in runs(prod(self.slots[name].shape), granule):
            yield self.read(name, start, stop)


def runs(elements: int, granule: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) of runs of whole granules, of at most BLOCK elements if a granule fits in; none of no elements."""
    step = max(BLOCK // granule, 1) * granule
    for start in range(0, elements, step):
        yield start, min(start + step, elements)


class ThetaDigest:
    """A digest of θ that depends on names, shapes and fp32 bits only: not on fragments, shards or the order of parameters."""

    def __init__(self) -> None:
        self._hashes = defaultdict[tuple[str, tuple[int, ...]], Any](hashlib.sha256)

    def update(self, name: str, shape: Sequence[int], flat: Tensor) -> None:
        """The next elements of a parameter, contiguous fp32 on the CPU."""
        self._hashes[name, tuple(shape)].update(flat.numpy().data)

    def hexdigest(self) -> str:
        """sha256, hex, over the parameters by name."""
        parameters = sorted([name, list(shape), each.hexdigest()] for (name, shape), each in self._hashes.items())
        return hashlib.sha256(json.dumps(parameters).encode()).hexdigest()
