"""AdamW's moments for who joins: a member's main loop copies them between its inner steps, a part at a time, once somebody has
asked; a joiner fetches the copy.

The parts are of consecutive steps. That is harmless: each element's two moments are of one step, and AdamW treats elements
apart. They say nothing about the run's state, so nothing but their being numbers is checked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diloco.checkpoints import MOMENTS, moment
from diloco.fetching import RANGE, place
from diloco.inner import Inner
from diloco.parallel import on_rank_0
from diloco.shards import Shards
from elastic.fetching import Transfer, Want
from elastic.ranges import Range
from elastic.recovery import NOTHING, Donor, Lines, base_of
from elastic.wire import NONSENSE

if TYPE_CHECKING:
    from diloco.trainer import Trainer

PARTS = 16
"""Steps between which the moments are copied: a part costs a step less than a percent."""
DROP = PARTS
"""What comes after the parts: the copy is not wanted any more."""
FRESH = PARTS
"""Turns of the main loop after which a copy is too old for who asks now."""
KEPT = 60.0
"""Seconds after the last look at it that a copy is kept for."""
PATIENCE = 60.0
"""Seconds that a joiner waits for a member's copy."""
MOVED = "another joiner has had a newer copy made"
TRIES = 3
"""How often a joiner begins anew when somebody else has had a newer copy made."""


class Lender:
    """This rank's slice of the moments, for joiners. `copy` and `due` are the main loop's, the rest any thread's. Copies are
    numbered from 1, alike on all ranks: their number is the `base` of `elastic.recovery`, and 0 that of who has none."""

    def __init__(self, shards: Shards, inner: Inner) -> None:
        self.shards, self.inner = shards, inner
        self._lock = threading.Lock()
        self._copies: list[list[Tensor]] = []
        """Of each fragment; none: there is no whole copy."""
        self._number, self._updates = 0, 0
        self._wanted, self._part, self._looked, self._age = False, 0, 0.0, 0
        self._making: list[list[Tensor]] = []
        self._empty = True
        """There has been no step: nobody need wait for that."""

    def due(self) -> int:
        """The part to copy now, DROP, or -1 if there is nothing to do. Rank 0 decides, once in each turn of its loop."""
        self._empty = self._empty and not self.inner.updates
        with self._lock:
            self._age += 1
            if self._wanted or self._part:
                return self._part
            return DROP if self._copies and time.monotonic() - self._looked > KEPT else -1

    def copy(self, part: int, idle: bool = False) -> None:
        """Part 0 begins a new copy; DROP ends the one that there is. idle: the loop has nothing better to do, so the other parts
        are copied, too. Collective."""
        for one in range(part, PARTS if idle and part != DROP else part + 1):
            self._copy(one)

    def _copy(self, part: int) -> None:
        if part == DROP:
            with self._lock:
                self._copies = []
            return
        if part == 0:
            spans = [self.shards.span(f) for f in range(len(self.shards.fragments))]
            self._making = [[torch.empty(stop - start) for _ in MOMENTS] for start, stop in spans]
            self.inner.materialise()
        for f, names in self._names(part).items():
            for name, out in zip(MOMENTS, self._making[f], strict=True):
                self.shards.read(f, moment(self.inner, name), out, only=names)
        last = part == PARTS - 1
        with self._lock:
            self._part, self._wanted = (0 if last else part + 1), False
            if last:
                self._copies, self._making = self._making, []
                self._number, self._age, self._looked = self._number + 1, 0, time.monotonic()
                self._updates = self.inner.updates

    def _names(self, part: int) -> dict[int, set[str]]:
        """Fragment -> parameters of a part, the same on every rank: about one in `PARTS` elements."""
        total, at, found = sum(f.elements for f in self.shards.fragments), 0, dict[int, set[str]]()
        for fragment in self.shards.fragments:
            for slot in fragment.slots:
                if at * PARTS // total == part:
                    found.setdefault(fragment.index, set()).add(slot.name)
                at += slot.stop - slot.start
        return found

    def read(self, fragment: int, first: int, last: int) -> tuple[int, Tensor] | None:
        """(number, the blocks [first, last) of one moment after the other, fp32) of the copy; (0, nothing) if there is none
        yet. Who asks for no blocks begins: he is told the number to wait for. None: not this rank's."""
        a, b = self.shards.blocks(fragment)
        if not a <= first <= last <= b:
            return None
        with self._lock:
            if first == last:
                return self._begin(), torch.empty(0)
            if not self._copies:
                return 0, torch.empty(0)
            self._looked = time.monotonic()
            number, copies = self._number, self._copies[fragment]
        of = self.shards.fragments[fragment]
        (start, stop), origin = of.span(first, last), of.span(a, a)[0]
        return number, torch.cat([flat[start - origin : stop - origin] for flat in copies])

    def _begin(self) -> int:
        if self._empty:
            return NOTHING
        if self._copies and self._age <= FRESH:
            self._looked = time.monotonic()
            return self._number
        self._wanted = True
        return self._number + 1

    def updates(self) -> tuple[int, Tensor]:
        """(AdamW updates behind the copy, nothing)."""
        return self._updates, torch.empty(0)


@dataclass(frozen=True)
class Loan:
    """A member that has the moments copied, and the number of the copy."""

    donor: Donor
    number: int


def ask_for_moments(trainer: Trainer, donors: Sequence[Donor]) -> Loan | None:
    """Has one member copy its moments, the first that answers. Collective."""

    def ask() -> list[int]:
        for i, donor in enumerate(donors):
            if (number := _base_of(trainer, donor, "moments")) > 0:
                return [i, number]
        return []

    found = on_rank_0(trainer.region, ask)
    return Loan(donors[found[0]], found[1]) if found else None


def take_moments(trainer: Trainer, loan: Loan | None) -> bool:
    """AdamW's moments as the member copied them. False: they are not to be had, and stay fresh. Collective."""
    spans = [trainer.shards.span(f) for f in range(len(trainer.fragments))]
    flats = [[torch.empty(stop - start) for _ in MOMENTS] for start, stop in spans]
    why = "no member answers"
    for _ in range(TRIES):
        if loan is None:
            break
        why = _together(trainer, _fetch(trainer, loan, flats))
        updates = on_rank_0(trainer.region, partial(_base_of, trainer, loan.donor, "updates"))
        if not why and updates >= 0:
            _load(trainer, flats, updates)
            return True
        loan = ask_for_moments(trainer, [loan.donor]) if why in ("", MOVED) else None
    if trainer.region.rank == 0:
        print(f"{trainer.links.member}: no inner state from a peer: {why}", flush=True)
    return False


def _together(trainer: Trainer, reason: str) -> str:
    """Some rank's reason, the same on all; empty: nobody has one."""
    return max(map(bytes.decode, trainer.region.gather_bytes(reason.encode())))


def _load(trainer: Trainer, flats: Sequence[Sequence[Tensor]], updates: int) -> None:
    for f, moments in enumerate(flats):
        for name, flat in zip(MOMENTS, moments, strict=True):
            trainer.shards.write(f, flat, moment(trainer.inner, name))
    trainer.inner.set_updates(updates)


def _base_of(trainer: Trainer, donor: Donor, plane: str) -> int:
    """NOTHING if it does not answer, or has none."""
    try:
        return base_of(trainer.links.node, donor, plane, 0)
    except (OSError, *NONSENSE):
        return NOTHING


def _fetch(trainer: Trainer, loan: Loan, flats: Sequence[Sequence[Tensor]]) -> str:
    """Into `flats`. Returns why not."""
    fragments, slices = trainer.fragments, trainer.planes.slices
    wants = [
        Want(f.index, f.blocks, *own, loan.number) for f, own in zip(fragments, slices, strict=True) if own[0] < own[1]
    ]

    def check(one: Range, data: bytearray) -> bool:
        start, stop = fragments[one.fragment].span(one.first, one.last)
        if len(data) != 4 * len(MOMENTS) * (stop - start):
            return False
        first, second = torch.frombuffer(data, dtype=torch.float32).view(len(MOMENTS), -1)
        return bool(first.isfinite().all() and second.isfinite().all() and (second >= 0).all())

    def put(one: Range, data: bytearray) -> None:
        place(fragments[one.fragment], slices[one.fragment], flats[one.fragment], one, data)

    size, lines = max(1, RANGE // (4 * len(MOMENTS) * fragments[0].block)), Lines(trainer.links.node)
    try:
        return (
            MOVED if Transfer(lines, [loan.donor], "moments", wants, size, check, put, patience=PATIENCE).run() else ""
        )
    except OSError as error:
        return str(error)
    finally:
        lines.close()
