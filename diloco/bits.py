"""The bits of rounds: had from one's own exchange, fetched by who took no part in it, served to who asks."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ckpt.checkpoint import DamagedError, verify
from ckpt.store import StoreError
from diloco.fragments import digest
from diloco.merging import progress, rebase
from diloco.parallel import on_rank_0
from diloco.planes import Bits
from elastic.pulse import ENTRIES
from elastic.recovery import fetch

if TYPE_CHECKING:
    from diloco.trainer import Trainer

AGAIN = 0.5
"""Seconds between two looks for bits that nobody had."""


def find_bits(trainer: Trainer, entry: dict[str, Any]) -> Bits | None:
    """A committed round's, in this rank's slice, however long that takes: who has been cut off finds bits dropped that newer
    checkpoints hold, and no member to ask. None: a newer state of the fragment was taken instead, or this region is asked to
    leave. Collective."""
    while True:
        try:
            return bits_of(trainer, entry)
        except OSError as error:
            reason = str(error)
        source = on_rank_0(trainer.region, lambda: _newer(trainer, entry, reason))  # noqa: B023
        if source == ["leaving"]:
            trainer.behind = True
            return None
        if source and leap(trainer, entry, source):
            return None


def _newer(trainer: Trainer, entry: dict[str, Any], reason: str) -> list[str]:
    """Rank 0: where parameters are that hold the round already: a member's endpoints, or a checkpoint's prefix alone. Nowhere:
    after a little wait, which is progress."""
    control, checkpoints = trainer.links.control, trainer.links.checkpoints
    if control is not None:
        control.pulse.out(ENTRIES)
        if control.leaving:
            return ["leaving"]
    fragment, seq = entry["fragment"], entry["seq"]
    for donor in _others(trainer):
        try:
            pieces = fetch(trainer.links.node, [donor], trainer.fragments[fragment].blocks, "theta", fragment, 0, 1)
        except OSError:
            continue
        if pieces[0].base >= seq:
            return list(donor)
    with suppress(OSError, DamagedError):  # the store is away, or this checkpoint was pruned just now
        for manifest in checkpoints.candidates():
            if manifest["seq"] >= seq and manifest["epoch"] == trainer.state.epoch:
                verify(checkpoints.store, manifest)
                return [manifest["prefix"]]
    print(f"{trainer.links.member}: {reason}; trying again", flush=True)
    time.sleep(AGAIN)
    return []


def leap(trainer: Trainer, entry: dict[str, Any], source: list[str]) -> bool:
    """Over rounds whose bits are not kept any more: a fragment's theta and moments as a member or a checkpoint has them, and
    what this region did since its own theta on top. False: that did not give one state; look again. Collective."""
    f, bases, flats = entry["fragment"], {-1}, list[Tensor]()
    stored = source[0].startswith("checkpoints/")
    try:
        if stored:
            bases, flats = trainer.links.checkpoints.load_fragment(source[0], f, trainer.planes)
        else:
            bases, flats = fetch_fragment(trainer, [tuple(source)], f)
    except (OSError, DamagedError) as error:
        print(f"{trainer.links.member}: {error}", flush=True)
    said = trainer.region.gather_bytes(json.dumps(sorted(bases)).encode())
    everyone = {base for data in said for base in json.loads(data)}
    if len(everyone) != 1 or (base := everyone.pop()) < entry["seq"]:
        return False
    if trainer.snapshots.pop(f, None) is None:
        trainer.clock.missed()
    mine = progress(trainer.shards.read(f), trainer.planes.theta[f])
    trainer.planes.load(f, base, *flats)
    trainer.shards.write(f, rebase(trainer.planes.theta[f], mine))
    trainer.links.exchanger.decided((entry["epoch"], f, entry["base"]))
    if trainer.region.rank == 0:
        where = f"checkpoint {source[0]}" if stored else "a member that is ahead"
        print(f"{trainer.links.member}: fragment {f} as of entry {base} from {where}", flush=True)
    return True


def fetch_fragment(trainer: Trainer, donors: list[tuple[str, ...]], f: int) -> tuple[set[int], list[Tensor]]:
    """This rank's slices of theta and moments, and the seqs of the last rounds in their blocks: not to be used if they are
    several. Raises OSError."""
    blocks, own = trainer.fragments[f].blocks, trainer.planes.slices[f]
    fetched = [fetch(trainer.links.node, donors, blocks, plane, f, *own) for plane in trainer.planes.names]
    flats = [torch.cat([torch.empty(0), *(p.data.view(torch.float32) for p in pieces)]) for pieces in fetched]
    return {piece.base for pieces in fetched for piece in pieces}, flats


def _others(trainer: Trainer) -> list[tuple[str, ...]]:
    return [m.endpoints for m in trainer.state.members.values() if m.id != trainer.links.member]


def bits_of(trainer: Trainer, entry: dict[str, Any]) -> Bits:
    """A committed round's, in this rank's slice. Raises OSError if nobody has them. Collective."""
    held = trainer.links.exchanger.result(entry["attempt"])
    data = fetch_bits(trainer, entry) if held is None else held
    return Bits(entry["fragment"], len(entry["answers"]), data)


def fetch_bits(trainer: Trainer, entry: dict[str, Any]) -> Tensor:
    """Those of a round that this region took no part in: from a member, else from the store. Raises OSError. Collective."""
    f, members = entry["fragment"], len(entry["answers"])
    donors = _others(trainer)
    blocks, (first, last) = trainer.fragments[f].blocks, trainer.planes.slices[f]
    bits: Tensor | None
    try:
        pieces = fetch(trainer.links.node, donors, blocks, f"bits/{entry['seq']}", f, first, last)
        bits = torch.cat([torch.empty(0, dtype=torch.uint8), *(piece.data for piece in pieces)])
    except OSError:
        bits = _stored(trainer, entry, first, last)
    digests = b"" if bits is None else trainer.averaging.digests(f, first, last, bits, members)
    whole = digest(b"".join(trainer.region.gather_bytes(digests)))
    if bits is None or whole != entry["digest"]:
        raise OSError(f"the bits of journal entry {entry['seq']} are neither with a member nor in the store")
    return bits


def _stored(trainer: Trainer, entry: dict[str, Any], first: int, last: int) -> Tensor | None:
    """On this rank; the others go on to agree, whatever the store says here."""
    size = partial(trainer.averaging.result_size, entry["fragment"], members=len(entry["answers"]))
    try:
        return trainer.links.checkpoints.load_bits(entry["attempt"], first, last, size)
    except StoreError as error:
        print(f"{trainer.links.member}: {error}", flush=True)
        return None


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
