"""A run under fire: the schedule's faults, done at their moments and undone, while everything is watched and checked."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from diloco.errors import ConfigError
from launch.wan import HUB, Lab
from tests.chaos import schedule as plan
from tests.chaos.checker import Deadline
from tests.chaos.fleet import LEAVE_SECONDS, Fleet, Unit
from tests.chaos.schedule import Fault
from tests.chaos.watch import Moments, Watch

ROUND_SECONDS, PLACE_SECONDS = 90.0, 240.0
"""Without a round of anybody; without one that holds the work of a region that no fault touches."""
MOMENT_SECONDS = 12.0
"""How long a fault waits for its moment before it happens anyway."""
SLOWED = 0.1
LOOK, SELDOM, PROBE = 0.05, 0.4, 0.002
"""Seconds between two looks at everything, the same while a moment is waited for, and between two looks at whether it has
come."""


@dataclass
class Tally:
    """What was done."""

    faults: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    moments: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    """Faults whose moment did not come: they happened then."""
    idle: int = 0
    """Faults that met nobody: their place was down."""

    @property
    def all(self) -> int:
        return sum(self.faults.values())


class Drill:
    def __init__(self, lab: Lab, fleet: Fleet, say: Callable[[str], None]) -> None:
        self.lab, self.fleet, self.random, self.say = lab, fleet, Random(0), say
        self.watch, self.tally = Watch(fleet.run), Tally()
        self.moments = Moments(self.watch, lab, self._joining)
        self.violations: list[str] = []
        self.began = time.monotonic()
        self.rounds = Deadline("a round", ROUND_SECONDS)
        self.places = {place: Deadline(f"a round with {place}", PLACE_SECONDS) for place in fleet.units}
        self._undo: list[tuple[float, int, str, Callable[[], None]]] = []
        self._touched: dict[str, float] = {}
        """Place -> until when a fault touches it."""
        self._before = dict.fromkeys(fleet.units, (0, 0))
        """Place -> (start, how many of its region's starts had become members before)."""
        self._looked = 0.0

    # Watching

    def look(self, every: float = LOOK) -> None:
        """Looks after the regions, undoes what is due, reads what is new and checks it; not more often than `every` seconds."""
        now = time.monotonic()
        if now - self._looked < every:
            return
        self._looked = now
        while self._undo and self._undo[0][0] <= now:
            _, _, what, undo = heapq.heappop(self._undo)
            self.say(f"        {what}")
            undo()
        for text in self.fleet.tend():
            self.wrong(text)
        self._judge(self.watch.look(), now)
        while self.watch.checker.violations:
            self.wrong(self.watch.checker.violations.pop(0))

    def wrong(self, text: str) -> None:
        self.violations.append(text)
        self.say(f"VIOLATION {text}")

    def _judge(self, entries: list[dict[str, Any]], now: float) -> None:
        rounds = [entry for entry in entries if entry["kind"] == "round"]
        able = any(self.joined(unit) and not unit.frozen for unit in self.fleet.units.values())
        self._deadline(self.rounds, bool(rounds), able and bool(self.watch.checker.rounds), now)
        used = {answer["member"] for entry in rounds for answer in entry["answers"]}
        for place, unit in self.fleet.units.items():
            free = self._touched.get(place, 0.0) < now and (self.joined(unit) or now > self.fleet.dark_until)
            self._deadline(self.places[place], self.watch.members.get(unit.name) in used, free, now)

    def _deadline(self, deadline: Deadline, happened: bool, possible: bool, now: float) -> None:
        if happened:
            deadline.happened(now)
        elif possible:
            deadline.waited(now)
        else:
            deadline.excused(now)
        while deadline.missed:
            self.wrong(deadline.missed.pop())

    def joined(self, unit: Unit) -> bool:
        """This start of it became a member."""
        have = self.watch.joined.get(unit.name, 0)
        if self._before[unit.place][0] != unit.starts:
            self._before[unit.place] = unit.starts, have
        return unit.up and have > self._before[unit.place][1]

    def _joining(self) -> list[str]:
        return [unit.place for unit in self.fleet.units.values() if unit.up and not self.joined(unit)]

    def until(self, what: Callable[[], bool], seconds: float, every: float = LOOK) -> bool:
        """Looks on until `what()` is true. False: `seconds` have passed, or something is wrong."""
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline or self.violations:
                return False
            self.look(every)
            time.sleep(PROBE)
        return True

    # Faults

    def run(self, faults: Sequence[Fault], seconds: float) -> None:
        """All of them, from the time at which every region has joined; up to the first violation."""
        begin = time.monotonic()
        for fault in faults:
            if self.violations:
                return
            self.until(lambda at=begin + fault.at: time.monotonic() >= at, seconds)  # type: ignore[misc]
            self.inflict(fault)
        self.until(lambda: time.monotonic() >= begin + seconds and not self._undo, seconds)

    def inflict(self, fault: Fault) -> None:
        """Waits for the fault's moment, and does it."""
        units = [self.fleet.units[place] for place in fault.places]
        pids = [unit.pids() for unit in units]
        probe = self.moments.probe(fault.moment, fault.places[0] if fault.places else "")
        met = self.until(probe, MOMENT_SECONDS, every=SELDOM)
        begin = time.monotonic()
        self.until(lambda: time.monotonic() >= begin + fault.after, 1.0, every=SELDOM)
        down = fault.kind in plan.OF_PROCESSES and not units[0].up
        if down or not self._do(fault, units, pids):
            self.tally.idle += 1
            return
        self.tally.faults[fault.kind] = self.tally.faults.get(fault.kind, 0) + 1
        self.tally.restarts += fault.restarts
        self.tally.missed += not met
        if met:
            self.tally.moments[fault.moment] = self.tally.moments.get(fault.moment, 0) + 1
        state = self.watch.checker.state
        self.say(f"{fault}{'' if met else ' (which did not come)'}, after {state.rounds if state else 0} rounds")

    def _do(self, fault: Fault, units: list[Unit], pids: list[list[int]]) -> bool:
        """False: there was nobody to do it to."""
        lasts, met = fault.lasts, True
        if fault.kind == plan.KILL:
            units[0].kill(lasts, pids[0] if set(pids[0]) >= set(units[0].pids()) else None)
        elif fault.kind == plan.RANK:
            met = units[0].kill_one(self.random)
        elif fault.kind == plan.HELPER:
            met = units[0].kill_helper(self.random)
        elif fault.kind == plan.LEAVE:
            units[0].leave(lasts, fault.renamed)
        elif fault.kind == plan.LIGHTHOUSE:
            self.fleet.lighthouse.kill(lasts)
        elif fault.kind == plan.FREEZE:
            units[0].freeze(pids[0])
            self.later(lasts, f"{units[0].place} goes on", units[0].thaw)
        elif fault.kind == plan.SLOW:
            self.lab.slow(fault.places[0], SLOWED)
            self.later(lasts, f"{fault.places[0]} is as fast as before", lambda: self.lab.unslow(fault.places[0]))
        else:
            self._cut(fault)
        for place in fault.places if met else ():
            self._touched[place] = max(self._touched.get(place, 0.0), time.monotonic() + lasts)
        return met

    def _cut(self, fault: Fault) -> None:
        """A link; or a side from all others and the lighthouse."""
        pairs = [fault.places]
        if fault.kind == plan.PARTITION:
            others = [place for place in [*self.fleet.units, HUB] if place not in fault.places]
            pairs = list(product(fault.places, others))
        for pair in pairs:
            self.lab.cut(*pair)
        if fault.kind == plan.PARTITION:
            self.fleet.dark_until = max(self.fleet.dark_until, time.monotonic() + fault.lasts + 15.0)
        self.later(fault.lasts, f"{'-'.join(fault.places)} connected again", lambda: self._restore(pairs))

    def _restore(self, pairs: list[tuple[str, ...]]) -> None:
        for pair in pairs:
            with suppress(ConfigError):
                self.lab.restore(*pair)

    def later(self, seconds: float, what: str, undo: Callable[[], None]) -> None:
        heapq.heappush(self._undo, (time.monotonic() + seconds, len(self._undo) + self.tally.all, what, undo))


def gather(drill: Drill, what: str, seconds: float = PLACE_SECONDS) -> None:
    """Until a round holds the work of every region, and all have reported on it alike."""
    wanted: list[int] = []

    def together() -> bool:
        members = {drill.watch.members.get(unit.name) for unit in drill.fleet.units.values()}
        if all(drill.joined(unit) for unit in drill.fleet.units.values()):
            wanted.extend(drill.watch.checker.common(members))
        return any(drill.watch.checker.reported(seq) >= members for seq in wanted[-8:])

    if not drill.until(together, seconds) and not drill.violations:
        drill.wrong(f"{what}: no round with all {len(drill.fleet.units)} regions within {seconds:g} s")


def dismiss(drill: Drill) -> None:
    """Every region is asked to leave; what is left of the run must add up."""
    units = list(drill.fleet.units.values())
    for unit in units:
        if unit.up:
            unit.leave(1e6)
    deadline = time.monotonic() + LEAVE_SECONDS + 10.0
    while any(unit.up for unit in units) and time.monotonic() < deadline:
        drill.look()
        time.sleep(PROBE)
    drill.look(every=0.0)
    drill.watch.finish()
    drill.look(every=0.0)
    state = drill.watch.checker.state
    if state is None:
        return drill.wrong("there is no journal")
    names = {unit.name for unit in units}
    if here := [member.id for member in state.members.values() if member.region in names]:
        drill.wrong(f"{', '.join(here)} left, and the journal does not say so")
    returned = sum(r.stop - r.start for r in state.ledger.pool)
    leased = sum(lease.left for member in state.members.values() for lease in member.leases)
    if state.ledger.cursor != state.ledger.applied + state.ledger.dropped + returned + leased:
        drill.wrong("the ledger does not add up")


def write_log(path: Path, began: float) -> Callable[[str], None]:
    """A line for people, with its time, on the console and in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        line = f"{time.monotonic() - began:7.1f} s  {text}"
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")

    return say
