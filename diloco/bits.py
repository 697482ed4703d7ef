"""The bits of rounds: had from one's own exchange, fetched by who took no part in it, served to who asks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diloco.fragments import digest
from diloco.planes import Bits
from elastic.recovery import fetch

if TYPE_CHECKING:
    from diloco.trainer import Trainer


def bits_of(trainer: Trainer, entry: dict[str, Any]) -> Bits:
    """A committed round's, in this rank's slice. Raises OSError if nobody has them. Collective."""
    held = trainer.links.exchanger.result(entry["attempt"])
    data = fetch_bits(trainer, entry) if held is None else held
    return Bits(entry["fragment"], len(entry["answers"]), data)


def fetch_bits(trainer: Trainer, entry: dict[str, Any]) -> Tensor:
    """Those of a round that this region took no part in: from a member, else from the store. Raises OSError. Collective."""
    f, members = entry["fragment"], len(entry["answers"])
    donors = [m.endpoints for m in trainer.state.members.values() if m.id != trainer.links.member]
    blocks, (first, last) = trainer.fragments[f].blocks, trainer.planes.slices[f]
    bits: Tensor | None
    try:
        pieces = fetch(trainer.links.node, donors, blocks, f"bits/{entry['seq']}", f, first, last)
        bits = torch.cat([torch.empty(0, dtype=torch.uint8), *(piece.data for piece in pieces)])
    except OSError:
        size = partial(trainer.averaging.result_size, f, members=members)
        bits = trainer.links.checkpoints.load_bits(entry["attempt"], first, last, size)
    digests = b"" if bits is None else trainer.averaging.digests(f, first, last, bits, members)
    whole = digest(b"".join(trainer.region.gather_bytes(digests)))
    if bits is None or whole != entry["digest"]:
        raise OSError(f"the bits of journal entry {entry['seq']} are neither with a member nor in the store")
    return bits


def serve_blocks(trainer: Trainer, plane: str, fragment: int, first: int, last: int) -> tuple[int, Tensor] | None:
    """What other members fetch: (seq of the last round in it, data) of blocks of theta or momentum, or of the bits of a
    recent round; None if this rank does not have them. Any thread."""
    if not plane.startswith("bits/"):
        return trainer.planes.read(plane, fragment, first, last)
    seq = int(plane.removeprefix("bits/"))
    bits, mine = trainer.planes.bits.get(seq), trainer.planes.slices[fragment]
    if bits is None or bits.fragment != fragment or not mine[0] <= first <= last <= mine[1]:
        return None
    size = partial(trainer.averaging.result_size, fragment, members=bits.members)
    begin = size(mine[0], first)
    return seq, bits.data[begin : begin + size(first, last)]
