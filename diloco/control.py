"""Rank 0's part of a region: what its ranks do next. Rank 0 decides, everyone obeys the same order."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from diloco.fold import State
from diloco.journal import Journal
from elastic import rounds
from elastic.coordinator import Coordinator


@dataclass
class Order:
    """What the ranks of a region do next: entries are applied first, then the snapshot, then the inner step."""

    entries: list[str] = field(default_factory=list)
    ask: tuple[int, int, int] | None = None
    """(fragment, epoch, base): snapshot it and contribute."""
    step: bool = False
    end: str = ""
    """Why the loop ends; empty: it goes on."""
    clean: bool = True
    """The end is one that was wanted."""

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
    """The journal as elastic.coordinator needs it."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._rounds_at_start = self.state.rounds

    @property
    def state(self) -> State:
        assert self.journal.state is not None
        return self.journal.state

    def read(self) -> list[bytes]:
        return self.journal.read()

    def append(self, fields: dict[str, Any]) -> bool:
        return self.journal.append(fields)

    def view(self) -> rounds.View:
        state = self.state
        bases = tuple(fragment.base for fragment in state.fragments)
        first = state.rounds == self._rounds_at_start
        return rounds.View(
            state.seq, state.epoch, bases, tuple(sorted(state.members)), state.stopped is not None, first
        )

    def endpoints(self) -> dict[str, tuple[str, ...]]:
        return {m.id: m.endpoints for m in self.state.members.values()}

    def weight(self, answer: dict[str, Any]) -> float:
        return self.state.weight(answer)

    def closing(self) -> dict[str, Any] | None:
        reason = self.state.finished
        return {"kind": "stop", "reason": reason} if reason and self.state.stopped is None else None


@dataclass
class Status:
    """Where the main loop stands; rank 0 decides by it."""

    since: int
    """Inner steps since this region's last boundary."""
    in_flight: bool
    """A snapshot was taken whose round is not decided yet."""
    samples: int
    """Samples left in this member's leases."""


class Control:
    """Turns the coordinator's commands and the loop's status into the next order."""

    def __init__(self, coordinator: Coordinator, member: str, batch: int, max_local_steps: int) -> None:
        self.coordinator, self.member, self.batch = coordinator, member, batch
        self.max_local_steps = max_local_steps
        self.leaving = ""
        """Set by a signal handler: why this region wants to leave."""
        self.waited = 0.0
        """Seconds in which the region neither trained nor evaluated."""
        self.alive_at = time.monotonic()
        self._told = False
        self._asks: list[rounds.Ask] = []
        self._due: tuple[int, int, int] | None = None
        """(fragment, base, epoch) of the boundary that the coordinator knows of."""

    def next(self, state: State, status: Status) -> Order:
        self.alive_at = time.monotonic()
        if self.leaving or state.stopped is not None:
            return Order(end=state.stopped or self.leaving)
        if self.member not in state.members:
            return Order(end=f"{self.member} is not a member any more: its region joined again, or its leases expired")
        self._announce(state, status)
        may_step = self._may_step(state, status)
        self._explain(state, waiting=not may_step)
        commands = self.coordinator.take(0.0 if may_step else 0.5)
        if not may_step:
            self.waited += time.monotonic() - self.alive_at
        self._asks += commands.asks
        if commands.halt is not None:
            return Order(end=commands.halt, clean=False)
        if commands.entries:
            return Order(entries=[data.decode() for data in commands.entries])
        return self._ask(state, status) or Order(step=may_step)

    def _explain(self, state: State, waiting: bool) -> None:
        """Says once why nothing happens: too few regions for a round, or for the run to begin."""
        begun = state.ledger.cursor > 0
        lonely = waiting and (not begun or self.coordinator.lonely())
        if lonely and not self._told:
            wanted = self.coordinator.machine.wanted() if begun else state.settings.start_regions
            here = ", ".join([self.member, *self.coordinator.connected()])
            print(f"{self.member}: waiting for {wanted} regions, here: {here}", flush=True)
        self._told = lonely

    def _announce(self, state: State, status: Status) -> None:
        """Tells the coordinator, once, that this region reached its boundary."""
        fragment = state.next_fragment
        base = state.fragments[fragment].base
        key = (fragment, base, state.epoch)
        due = status.since >= state.sync_interval or self._used_up(state, status)
        if due and not status.in_flight and self._due != key:
            self._due = key
            self.coordinator.post(rounds.Due(fragment, base))

    def _used_up(self, state: State, status: Status) -> bool:
        """No samples are left for another step, although the run has begun."""
        return state.ledger.cursor > 0 and status.samples < self.batch

    def _may_step(self, state: State, status: Status) -> bool:
        limit = state.sync_interval
        if state.settings.boundary == "first" and self.coordinator.lonely():
            limit += self.max_local_steps  # nobody to sync with: go on, contribute it all later
        return not status.in_flight and status.since < limit and status.samples >= self.batch

    def _ask(self, state: State, status: Status) -> Order | None:
        """The oldest snapshot that is wanted and may be taken now: at H steps, or after any with boundary=first; or when
        the leases are used up, as a region's are that was left out of several rounds."""
        needed = 1 if state.settings.boundary == "first" else state.sync_interval
        ready = status.since >= needed or self._used_up(state, status)
        while self._asks and ready and not status.in_flight:
            ask = self._asks.pop(0)
            if (ask.epoch, ask.base) == (state.epoch, state.fragments[ask.fragment].base):
                return Order(ask=(ask.fragment, ask.epoch, ask.base))
        return None
