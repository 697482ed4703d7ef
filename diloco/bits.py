"""The bits of rounds: had from one's own exchange, fetched by who took no part in it, served to who asks."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ckpt.checkpoint import DamagedError
from ckpt.reading import verify
from ckpt.store import StoreError
from diloco.checkpoints import MOMENTS, go_back, save_bits, without_bits
from diloco.fetching import Fetch
from diloco.fold import State
from diloco.fragments import digest
from diloco.journal import Journal, say
from diloco.keeping import alone, save
from diloco.losing import Search
from diloco.merging import progress, rebase
from diloco.parallel import on_rank_0
from diloco.planes import Bits
from elastic.fetching import Transfer, Want
from elastic.plan import CHUNK
from elastic.pulse import ENTRIES
from elastic.ranges import Range
from elastic.recovery import Donor, Lines, base_of
from elastic.wire import MAX_PAYLOAD, NONSENSE

if TYPE_CHECKING:
    from diloco.trainer import Trainer

AGAIN = 0.5
"""Seconds between two looks for bits that nobody had."""


def find_bits(trainer: Trainer, entry: dict[str, Any]) -> Bits | None:
    """A committed round's, in this rank's slice, however long that takes. None: a rewind or the end of the run has made
    them needless, or this region is asked to leave. Collective."""
    data = trainer.links.exchanger.result(entry["attempt"])
    search = Search(entry["seq"], trainer.cfg.ckpt.lost_wait)
    journal = Journal(trainer.links.store)  # of its own: what the coordinator's reads, it passes on
    while data is None and (data := fetch_bits(trainer, entry)) is None:
        verdict = on_rank_0(trainer.region, lambda: _verdict(trainer, search, journal, entry["fragment"]))
        if isinstance(verdict, list) and leap(trainer, entry, verdict):
            return None
        if verdict == "over":
            trainer.behind = True
            return None
    return Bits(entry["fragment"], len(entry["answers"]), data)


def _verdict(trainer: Trainer, search: Search, journal: Journal, fragment: int) -> str | list[str]:
    """Rank 0: says in the journal what is to be said, and waits a little, which is progress. wait, over, or where parameters
    are that hold the round already: a member's endpoints, or a checkpoint's prefix alone."""
    links = trainer.links
    if links.control is not None:
        links.control.pulse.out(ENTRIES)
        if links.control.leaving:
            return "over"
    try:
        journal.read()
        assert journal.state is not None
        move = search.move(journal.state, time.monotonic())
        if move != "over" and (newer := _ahead(trainer, search.round, fragment)):
            return newer
        if move == "lost":
            say(journal, {"kind": "lost", "round": search.round, "member": links.member})
        elif move == "rewind":
            go_back(links.member, links.checkpoints, journal, "lost", without_bits(search.round))
    except StoreError as error:
        print(f"{links.member}: {error}; trying again", flush=True)
        move = "wait"
    time.sleep(AGAIN)
    return "over" if move == "over" else "wait"


def _ahead(trainer: Trainer, seq: int, fragment: int) -> list[str]:
    """Whose parameters hold round `seq`: a member that answers, or a checkpoint, for which bits are not kept. Nothing is lost
    then. Raises StoreError."""
    for donor in _others(trainer):
        with suppress(OSError, *NONSENSE):
            if base_of(trainer.links.node, donor, "planes", fragment) >= seq:
                return [donor.member, *donor.endpoints]
    checkpoints = trainer.links.checkpoints
    for manifest in checkpoints.candidates():
        if manifest["seq"] >= seq and manifest["epoch"] == trainer.state.epoch:
            with suppress(DamagedError):  # or pruned just now
                verify(checkpoints.store, manifest)
                return [manifest["prefix"]]
    return []


def leap(trainer: Trainer, entry: dict[str, Any], source: list[str]) -> bool:
    """Over rounds whose bits are not kept any more: a fragment's θ and moments as a member or a checkpoint has them, and what
    this region did since its own θ on top. False: that did not give one state; look again. Collective."""
    f, bases, flats = entry["fragment"], {-1}, list[Tensor]()
    stored = source[0].startswith("checkpoints/")
    try:
        if stored:
            bases, flats = trainer.links.checkpoints.load_fragment(source[0], f, trainer.planes)
        else:
            bases, flats = fetch_fragment(trainer, Donor(source[0], tuple(source[1:])), f)
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


def fetch_fragment(trainer: Trainer, donor: Donor, f: int) -> tuple[set[int], list[Tensor]]:
    """This rank's slices of θ and moments, and the seqs of the last rounds in their blocks, on any rank: not to be used if they
    are several. Collective. Raises OSError."""
    journal = Journal(trainer.links.store)
    entries: list[bytes] = []

    def look() -> tuple[list[bytes], State]:
        entries.extend(journal.read())
        assert journal.state is not None
        return entries, journal.state

    flats = [torch.empty_like(trainer.planes.theta[f]) for _ in trainer.planes.names]
    fetch = Fetch(trainer.links.node, trainer.region, trainer.planes, {f: flats})
    fetch.run([donor], look)
    trainer.unproven.update(fetch.words)
    return set(fetch.bases[f]), flats


def _others(trainer: Trainer) -> list[Donor]:
    return [Donor(m.id, m.endpoints) for m in trainer.state.members.values() if m.id != trainer.links.member]


def answer_lost(trainer: Trainer, seq: int) -> None:
    """Somebody cannot get a round's bits. If this region has them: `have`, and into the store with them, in the background. If
    it has parameters that hold them, its next checkpoint does instead, at once. Collective."""
    bits, attempt = trainer.planes.bits.get(seq), trainer.stored.get(seq)
    links, state = trainer.links, trainer.state
    if bits is None or attempt is None:
        if trainer.in_step and not trainer.behind:
            if trainer.region.rank == 0:
                _have(trainer, seq)
            save(trainer, alone(trainer), wait=True)
        return

    def upload() -> None:
        try:
            if trainer.region.rank == 0:
                _have(trainer, seq)
            save_bits(links.store, state.run, attempt, *trainer.planes.slices[bits.fragment], bits.data)
        except OSError as error:  # who needs them asks again
            print(f"{links.member}: the bits of journal entry {seq} were not stored: {error}", flush=True)

    threading.Thread(target=upload, name="upload", daemon=True).start()


def _have(trainer: Trainer, seq: int) -> None:
    say(Journal(trainer.links.store), {"kind": "have", "round": seq, "member": trainer.links.member})


def fetch_bits(trainer: Trainer, entry: dict[str, Any]) -> Tensor | None:
    """Those of a round that this region took no part in: from members, else from the store. None: from neither. Collective."""
    f, members = entry["fragment"], len(entry["answers"])
    first, last = trainer.planes.slices[f]
    bits: Tensor | None
    try:
        bits = from_members(trainer, entry, first, last)
    except OSError:
        bits = _stored(trainer, entry, first, last)
    digests = b"" if bits is None else trainer.averaging.digests(f, first, last, bits, members)
    whole = digest(b"".join(trainer.region.gather_bytes(digests)))
    if bits is None or whole != entry["digest"]:
        return None
    return bits


def from_members(trainer: Trainer, entry: dict[str, Any], first: int, last: int) -> Tensor:
    """Blocks [first, last) of the bits of a round, uint8, not checked yet. Raises OSError."""
    f, seq = entry["fragment"], entry["seq"]
    size = partial(trainer.averaging.result_size, f, members=len(entry["answers"]))
    bits = torch.empty(size(first, last), dtype=torch.uint8)

    def check(one: Range, data: bytearray) -> bool:
        return len(data) == size(one.first, one.last)

    def place(one: Range, data: bytearray) -> None:
        bits[size(first, one.first) : size(first, one.last)] = torch.frombuffer(data, dtype=torch.uint8)

    want = Want(f, trainer.fragments[f].blocks, first, last, base=seq)
    lines = Lines(trainer.links.node)
    try:
        Transfer(lines, _others(trainer), f"bits/{seq}", [want], CHUNK, check, place).run()
    finally:
        lines.close()
    return bits


def _stored(trainer: Trainer, entry: dict[str, Any], first: int, last: int) -> Tensor | None:
    size = partial(trainer.averaging.result_size, entry["fragment"], members=len(entry["answers"]))
    try:
        return trainer.links.checkpoints.load_bits(entry["attempt"], first, last, size)
    except StoreError as error:  # away, or pruned just now: the caller looks again
        print(f"{trainer.links.member}: {error}", flush=True)
        return None


def serve_blocks(trainer: Trainer, plane: str, fragment: int, first: int, last: int) -> tuple[int, Tensor] | None:
    """What other members fetch: (seq of the last round in it, data) of blocks of θ and moments, of their digests, or of the
    bits of a recent round; or of AdamW's own moments (`diloco.lending`). None if this rank does not have them, or they are
    too many for a frame. Any thread."""
    planes, of = trainer.planes, trainer.fragments[fragment]
    if plane == "planes":
        fits = 4 * of.block * (last - first) * len(planes.names) <= MAX_PAYLOAD
        return planes.read(fragment, first, last) if fits or last - first == 1 else None
    if plane == "digests":
        return planes.read_digests(fragment, first, last)
    if plane == "moments":
        fits = 4 * of.block * (last - first) * len(MOMENTS) <= MAX_PAYLOAD
        return trainer.lender.read(fragment, first, last) if fits or last - first == 1 else None
    if plane == "updates":
        return trainer.lender.updates()
    seq = int(plane.removeprefix("bits/"))
    bits, mine = planes.bits.get(seq), planes.slices[fragment]
    if bits is None or bits.fragment != fragment or not mine[0] <= first <= last <= mine[1]:
        return None
    size = partial(trainer.averaging.result_size, fragment, members=bits.members)
    begin = size(mine[0], first)
    return seq, bits.data[begin : begin + size(first, last)]
