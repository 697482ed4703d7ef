"""One member in tests/explore_world.py: what `elastic.coordinator` and the main loop do around its state machine."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from elastic import rounds
from elastic.rounds import Alarm, Rounds

if TYPE_CHECKING:
    from tests.explore_world import World

LOST, ARRIVED = 0, 1
"""What a side hears of a link itself; greater numbers are messages."""


class Violation(AssertionError):
    """The protocol was broken."""

    path: tuple[Any, ...] = ()
    """What happened last, if it was a fair schedule that led there."""


class Local(NamedTuple):
    """One member: its state machine, what its coordinator knows, its main loop."""

    alive: bool
    machine: int
    seen: int
    """Node that the coordinator has read up to."""
    main: int
    """Node that the main loop has applied."""
    flying: tuple[int, ...]
    """Per fragment: base of the snapshot in flight, or -1."""
    work: tuple[int, ...]
    """Per fragment: work done when it was last snapshotted."""
    used: tuple[int, ...]
    """Per fragment: work that committed rounds hold."""
    due: tuple[int, ...]
    """Per fragment: base of the last boundary that was announced."""
    asks: tuple[tuple[int, int], ...]
    alarms: tuple[tuple[str, Alarm], ...]
    pending: tuple[Any, ...]
    """Actions still to be carried out, a store request first."""
    links: frozenset[str]
    exchanges: tuple[tuple[str, str], ...]
    """(attempt, "runs", "held" or "failed") of rounds that are not decided yet."""


def frozen(value: Any) -> Any:
    """Hashable, equal for equal values."""
    if isinstance(value, dict):
        return tuple(sorted((k, frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    if isinstance(value, set):
        return frozenset(value)
    return frozen(vars(value)) if isinstance(value, rounds.Flight) else value


def fresh(value: Any) -> Any:
    """A copy of all that a state machine changes in place. Messages and views are never changed."""
    if isinstance(value, dict):
        return {k: fresh(v) for k, v in value.items()}
    if isinstance(value, list | set):
        return type(value)(value)
    if isinstance(value, rounds.Flight | Rounds):
        new = object.__new__(type(value))
        new.__dict__ = {k: fresh(v) for k, v in vars(value).items()}
        return new
    return value


class Member:
    """A local state taken apart, while one event is handled: what `elastic.coordinator` and the main loop would do."""

    def __init__(self, world: World, local: Local, name: str) -> None:
        self.world, self.name = world, name
        self.alive, self.seen, self.main = local.alive, local.seen, local.main
        self.number: int | None = local.machine
        self.machine: Rounds = world.machines.items[local.machine]
        self.flying, self.work, self.used, self.due = map(list, (local.flying, local.work, local.used, local.due))
        self.asks, self.alarms, self.links = set(local.asks), set(local.alarms), set(local.links)
        self.pending = deque(local.pending)
        self.exchanges = dict(local.exchanges)
        self.sent: list[tuple[str, int]] = []

    def pack(self) -> tuple[int, tuple[tuple[str, int], ...]]:
        world = self.world
        while self.pending and not isinstance(self.pending[0], rounds.Read | rounds.Append):
            self.perform(self.pending.popleft())
        self.forget_alarms()
        if self.number is None:
            self.number = world.machines.number((self.name, frozen(vars(self.machine))), self.machine)
        lists = map(tuple, (self.flying, self.work, self.used, self.due))
        sets = (tuple(sorted(self.asks)), tuple(sorted(self.alarms, key=repr)))
        local = Local(self.alive, self.number, self.seen, self.main, *lists, *sets, tuple(self.pending),
                      frozenset(self.links), tuple(sorted(self.exchanges.items())))  # fmt: skip
        return world.locals.number(frozen_local(local), local), tuple(self.sent)

    def forget_alarms(self) -> None:
        """Alarms that will change nothing, whenever they ring: about a decided round, a former attempt or proposal."""
        for kind, alarm in list(self.alarms):
            flight = self.machine.flights.get(alarm.fragment)
            if alarm.name == "minority":
                live = flight is not None and alarm.attempt == str(self.world.view(self.seen).seq)
            else:
                live = flight is not None and alarm.attempt in (flight.turn, flight.attempt)
            if not live:
                self.alarms.discard((kind, alarm))
                assert not fresh(self.machine).handle(alarm)

    def feed(self, event: rounds.Event) -> None:
        if self.number is not None:
            self.machine, self.number = fresh(self.machine), None
        self.pending.extend(self.machine.handle(event))

    def tell(self, other: str, what: tuple[str, Any]) -> None:
        if other in self.links:
            self.sent.append((other, self.world.messages.number(frozen(what), what)))

    def tell_view(self) -> None:
        for other in sorted(self.links):
            self.tell(other, ("sees", frozenset(self.links)))

    # Events of the coordinator

    def hear(self, sender: str, number: int) -> None:
        if number == ARRIVED:
            self.links.add(sender)
            self.tell_view()
        elif sender not in self.links:
            pass
        elif number == LOST:
            self.links.discard(sender)
            self.tell_view()
            self.feed(rounds.PeerGone(sender))
        else:
            kind, what = self.world.messages.items[number]
            self.feed(rounds.PeerSeen(sender, what) if kind == "sees" else rounds.Received(sender, what))

    def beat(self, other: str, sees: frozenset[str]) -> None:
        """What a peer says every second."""
        self.feed(rounds.PeerSeen(other, sees))

    def ring(self, kind: str, alarm: Alarm) -> None:
        self.alarms.discard((kind, alarm))
        self.feed(alarm)

    def poll(self, head: int) -> None:
        self.saw(head)
        self.feed(self.world.view(head))

    def read(self, head: int) -> None:
        self.pending.popleft()
        self.poll(head)

    def answered(self, won: bool, head: int) -> None:
        """The entry was created, or another one is there, or it would not have been valid: read on in any case."""
        self.pending.popleft()
        self.poll(head)
        if won:
            for other in sorted(self.links):
                self.tell(other, ("message", {"type": "head", "head": self.world.view(head).seq}))

    def unanswered(self, node: int, head: int) -> None:
        fields = self.pending.popleft().fields
        self.alarms.add(("retry", Alarm("append", fields["fragment"], fields["attempt"])))

    def ended(self, attempt: str, how: str, suspects: frozenset[str]) -> None:
        self.exchanges[attempt] = how
        if how == "held":
            self.feed(rounds.Exchanged(attempt, f"result of {attempt}"))
        else:
            self.feed(rounds.ExchangeFailed(attempt, suspects))

    def perform(self, action: rounds.Action) -> None:
        match action:
            case rounds.Send(other, message):
                self.tell(other, ("message", message))
            case rounds.Ask(fragment, _, base):
                self.asks.add((fragment, base))
            case rounds.Exchange():
                self.exchange(action)
            case rounds.Cancel(attempt):
                if self.exchanges.get(attempt) == "runs":
                    self.exchanges[attempt] = "failed"
            case rounds.SetAlarm(alarm, kind):
                if all(alarm != other for _, other in self.alarms):
                    self.alarms.add((kind, alarm))
            case rounds.Halt(reason):
                raise Violation(reason)

    def exchange(self, action: rounds.Exchange) -> None:
        state = self.world.node(self.seen).state
        if any(answer["member"] not in state.members for answer in action.answers):
            return self.feed(rounds.ExchangeFailed(action.attempt, frozenset()))
        if self.world.attempts.setdefault(action.attempt, action).answers != action.answers:
            raise Violation("one attempt, two lists of answers")
        if action.attempt in self.exchanges:
            raise Violation("an attempt is exchanged twice")
        flight = self.machine.flights[action.fragment]
        self.world.attempts_seen = max(self.world.attempts_seen, flight.number)
        self.exchanges[action.attempt] = "runs"

    def saw(self, head: int) -> None:
        self.seen = head
        bases = self.world.view(head).bases
        attempts = self.world.attempts
        for attempt in list(self.exchanges):
            if attempts[attempt].base != bases[attempts[attempt].fragment]:
                del self.exchanges[attempt]  # decided
        if not self.world.scenario.lag:
            self.advance()

    # The main loop

    def advance(self) -> None:
        """Applies what the coordinator has read."""
        path = []
        at = self.seen
        while at != self.main:
            path.append(at)
            at = self.world.node(at).parent
            if at < 0:
                raise Violation("two states at one seq")
        for at in reversed(path):
            self.merge(self.world.node(at).entry)
        self.main = self.seen
        self.alive = self.name in self.world.node(self.main).state.members
        bases = self.world.view(self.main).bases
        self.asks = {(fragment, base) for fragment, base in self.asks if base >= bases[fragment]}

    def merge(self, entry: dict[str, Any]) -> None:
        if entry["kind"] != "round":
            return
        f = entry["fragment"]
        mine = [answer for answer in entry["answers"] if answer["member"] == self.name]
        if self.flying[f] not in (-1, entry["base"]) or (mine and self.flying[f] < 0):
            raise Violation("a round with a contribution that was never given for it")
        if mine:
            if mine[0]["made"] != self.work[f]:
                raise Violation("two snapshots for one base")
            self.used[f] = self.work[f]
        self.flying[f] = -1

    def boundary(self, f: int) -> None:
        """What Control.next does: announces the boundary, and snapshots unasked if there is anybody to sync with."""
        base = self.world.view(self.main).bases[f]
        self.due[f] = base
        self.feed(rounds.Due(f, base))
        if len(self.links) + 1 >= self.machine.wanted():
            self.snapshot(f)

    def snapshot(self, f: int) -> None:
        state = self.world.node(self.main).state
        base = state.fragments[f].base
        self.asks.discard((f, base))
        self.flying[f] = base
        self.work[f] += 1
        lease = state.members[self.name].leases[0]
        claims = [[lease.id, lease.start + self.work[f]]]
        answer = {"tokens": self.work[f] - self.used[f], "made": self.work[f], "leases": claims}
        self.feed(rounds.Answered(f, 0, base, {**answer, "theta": f"t{base}", "momentum": "m"}))


def frozen_local(local: Local) -> Any:
    pending = tuple((type(a).__name__, frozen(vars(a))) for a in local.pending)
    return local._replace(pending=pending)
