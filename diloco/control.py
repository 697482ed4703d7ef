"""Rank 0's part of a region: what its ranks do next. Rank 0 decides, everyone obeys the same order."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from diloco.fold import State
from diloco.journal import Journal
from elastic import rounds
from elastic.coordinator import Coordinator
from elastic.journaling import Standing
from elastic.pulse import ENTRIES, SNAPSHOT, STEP, Pulse


@dataclass
class Order:
    """What the ranks of a region do next: entries are applied first, then the snapshot, then the inner step."""

    entries: list[str] = field(default_factory=list)
    ask: tuple[int, int, int] | None = None
    """(fragment, epoch, base): snapshot it and contribute."""
    step: bool = False
    lend: int = -1
    """Part of AdamW's moments to copy for a joiner, before the step; -1: none."""
    end: str = ""
    """Why the loop ends; empty: it goes on."""
    clean: bool = True
    """The end is one that was wanted."""

    @property
    def idle(self) -> bool:
        """Whatever the region waits for, it has nothing to do meanwhile."""
        return not self.step and not self.entries and self.ask is None

    def encode(self) -> bytes:
        """Empty for a plain inner step, the common case."""
        return b"" if self == Order(step=True) else json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(data: bytes) -> Order:
        if not data:
            return Order(step=True)
        order = Order(**json.loads(data))
        if order.ask:
            fragment, epoch, base = order.ask
            order.ask = (fragment, epoch, base)
        return order


class RunLedger:
    """The journal as elastic.coordinator needs it. patience: seconds, elastic.start_patience."""

    def __init__(self, journal: Journal, patience: float = 0.0) -> None:
        self.journal = journal
        self.away = False
        """The store did not answer when it was last asked."""
        self._rounds_at_start, self._patient_until = self.state.rounds, time.monotonic() + patience

    @property
    def state(self) -> State:
        assert self.journal.state is not None
        return self.journal.state

    def read(self) -> list[bytes]:
        with self._noticing():
            return self.journal.read()

    def append(self, fields: dict[str, Any]) -> bool:
        with self._noticing():
            return self.journal.append(fields)

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.away = True
            raise
        self.away = False

    def standing(self) -> Standing:
        state = self.state
        bases = tuple(fragment.base for fragment in state.fragments)
        members, stopped = tuple(sorted(state.members)), state.stopped is not None
        return Standing(
            rounds.View(state.seq, state.epoch, bases, members, stopped, self._first(), state.rules, state.paused),
            {m.id: m.endpoints[0] for m in state.members.values()},
            {m.id: m.data for m in state.members.values()},
            state.weights,
        )

    def _first(self) -> bool:
        """The next round is to have elastic.start_regions: the first of all, and for a while the first since this start, when
        all may be starting again. One that is lost for good must not be waited for."""
        patient = self.state.rounds == self._rounds_at_start and time.monotonic() < self._patient_until
        return (self.state.rounds == 0 and self.state.epoch == 0) or patient

    def closing(self) -> dict[str, Any] | None:
        reason = self.state.finished
        return {"kind": "stop", "reason": reason} if reason and self.state.stopped is None else None


@dataclass(frozen=True)
class Status:
    """Where the main loop stands; rank 0 decides by it."""

    since: int
    """Inner steps since this region's last boundary."""
    overdue: int
    """Boundaries that are due whatever `since` says."""
    ages: Mapping[int, int]
    """Fragment in flight -> inner steps since it was snapshotted."""
    samples: int
    """Samples left in this member's leases."""
    work: Sequence[int]
    """Inner steps that each fragment's next contribution would hold."""


@dataclass(frozen=True)
class Limits:
    """Of this region."""

    batch: int
    """Samples of an inner step."""
    overlap: int
    """Inner steps after a snapshot that need not wait for its round."""
    local: int
    """The same while there is nobody to sync with, or the store is away."""


def expelled(region: str) -> str:
    """The sentence for a region that is out of the run."""
    return (
        f"{region} is expelled from this run: take it in again with python -m diloco.journal admit RUN {region}, or give "
        "region.name another name"
    )


class Control:
    """Turns the coordinator's commands and the loop's status into the next order."""

    def __init__(
        self, coordinator: Coordinator, ledger: RunLedger, member: str, limits: Limits, hang_timeout: float = 4.5
    ) -> None:
        self.coordinator, self.ledger, self.member, self.limits = coordinator, ledger, member, limits
        self.pulse = Pulse(hang_timeout)
        self.leaving = ""
        """Set by a signal handler: why this region wants to leave."""
        self.waited = 0.0
        """Seconds in which the region neither trained nor evaluated."""
        self._told = self._paused = False
        self._asks: list[rounds.Ask] = []
        self._announced: tuple[int, int, int] | None = None
        """(fragment, epoch, base) of the boundary that the coordinator knows of."""

    def next(self, state: State, status: Status) -> Order:
        self.pulse.back()
        order = self._next(state, status)
        self.pulse.out(ENTRIES if order.entries else SNAPSHOT if order.ask else STEP if order.step else "")
        return order

    def _next(self, state: State, status: Status) -> Order:
        begin = time.monotonic()
        if self.leaving or state.stopped is not None:
            return Order(end=state.stopped or self.leaving)
        if self.member not in state.members:
            return self._out(state)
        fragment = None if state.paused else self._wanted(state, status)
        may_step = fragment is None and not state.paused and self._may_step(state, status)
        busy = may_step or fragment is not None
        self._explain(state, waiting=not busy)
        commands = self.coordinator.take(0.0 if busy else 0.5)
        if not busy:
            self.waited += time.monotonic() - begin
        self._asks += commands.asks
        if commands.halt is not None:
            return Order(end=commands.halt, clean=False)
        if commands.entries:
            return Order(entries=[data.decode() for data in commands.entries])
        if fragment is not None:
            return Order(ask=(fragment, state.epoch, state.fragments[fragment].base))
        return Order(step=may_step)

    def _out(self, state: State) -> Order:
        region = self.member.rpartition("_")[0]
        if region in state.expelled:
            return Order(end=expelled(region), clean=False)
        gone = f"{self.member} is not a member any more"
        if after := [member.id for member in state.members.values() if member.region == region]:
            return Order(end=f"{gone}: its region joined again, as {after[0]}")
        most = f"elastic.lease_rounds={state.settings.lease_rounds}"
        why = f"its leases expired, as more than {most} rounds were without it; a restart joins anew"
        return Order(end=f"{gone}: {why}", clean=False)  # torchrun starts it again

    def _explain(self, state: State, waiting: bool) -> None:
        """Says once why nothing happens: a pause, or too few regions for a round, or for the run to begin."""
        if state.paused != self._paused:
            self._paused = state.paused
            print(f"{self.member}: {'the run is paused, waiting' if state.paused else 'the run goes on'}", flush=True)
        if state.paused:
            return
        begun = state.ledger.handed > 0
        lonely = waiting and (not begun or self.coordinator.lonely())
        if lonely and not self._told:
            wanted = self.coordinator.machine.wanted() if begun else state.settings.start_regions
            here = ", ".join([self.member, *self.coordinator.connected()])
            print(f"{self.member}: waiting for {wanted} regions, here: {here}", flush=True)
        self._told = lonely

    # Boundaries

    def _wanted(self, state: State, status: Status) -> int | None:
        """The fragment to snapshot now. At this region's own boundary it is the one due, without asking anybody first: no
        other region and no store is on the path of an inner step. With boundary=first it may also be one that a peer asks
        for, after any step; the first in turn, if there are several."""
        asked = self._asked(state, status)
        due = self._due(state, status)
        if due is not None and due not in status.ages:
            self._announce(state, due)
            if due in asked or not self.coordinator.lonely():
                return due
        anytime = state.settings.boundary == "first" and (status.since > 0 or status.overdue > 0)
        return asked[0] if asked and anytime else None

    def _due(self, state: State, status: Status) -> int | None:
        """Whose boundary has come, if any's has: after H / fragments steps, or because the leases are used up, as a region's
        are that was left out of several rounds. Never without work, as it may be after a restart: a round of nothing but such
        contributions has no weight, and cannot be committed."""
        used_up = state.ledger.handed > 0 and status.samples < self.limits.batch and not status.ages
        here = status.overdue > 0 or status.since >= state.sync_interval or used_up
        fragment = state.next_fragment(status.ages.keys()) if here else None
        return fragment if fragment is not None and status.work[fragment] else None

    def _announce(self, state: State, fragment: int) -> None:
        """Tells the coordinator, once, that this region reached its boundary."""
        key = (fragment, state.epoch, state.fragments[fragment].base)
        if self._announced != key:
            self._announced = key
            self.coordinator.post(rounds.Due(fragment, key[2]))

    def _asked(self, state: State, status: Status) -> list[int]:
        """Fragments that a proposal waits for, in the order of their turns."""
        self._asks = [
            ask
            for ask in self._asks
            if (ask.epoch, ask.base) == (state.epoch, state.fragments[ask.fragment].base)
            and ask.fragment not in status.ages
        ]
        ready = {ask.fragment for ask in self._asks if status.work[ask.fragment]}
        return sorted(ready, key=lambda f: (state.fragments[f].rounds, f))

    def _may_step(self, state: State, status: Status) -> bool:
        oldest = max(status.ages.values(), default=-1)
        if status.samples < self.limits.batch:
            return False
        if self._cut_off(state):  # go on, and contribute it all later
            return max(status.since - state.sync_interval, oldest) < self.limits.local
        return oldest < self.limits.overlap and self._due(state, status) is None

    def _cut_off(self, state: State) -> bool:
        """No round can be committed, and this region need not keep to exactly H steps."""
        exact = state.settings.boundary == "steps" and self.limits.overlap == 0
        return not exact and (self.coordinator.lonely() or self.ledger.away)
