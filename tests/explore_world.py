"""What surrounds the round state machines, as a finite model for tests/explore.py.

A state is a tuple of small integers and tuples: a local state for every member, the messages under way on every link, the
head of the journal, creates that the store has not carried out yet, and what is left of each kind of fault. Everything
that happens to one member is a function of its local state and of the event, so it is computed once and remembered:
`Rounds` is pure, and no state machine is copied for a transition that was seen before, in whatever company.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from diloco import fold
from elastic import rounds
from elastic.rounds import Alarm, Rounds, View
from tests.rounds_world import settings

LOST, ARRIVED = 0, 1
"""What a side hears of a link itself; greater numbers are messages."""


class Violation(AssertionError):
    """The protocol was broken."""

    path: tuple[Any, ...] = ()
    """What happened last, if it was a fair schedule that led there."""


@dataclass(frozen=True)
class Scenario:
    """What is explored: all interleavings of at most so many faults of each kind."""

    name: str
    members: tuple[str, ...] = ("a", "b")
    fragments: int = 1
    rounds: int = 1
    """Of each fragment; then the run is over."""
    spare: tuple[str, ...] = ()
    """Members that join later. The region is the first letter, so `b2` is b restarted with its memory lost."""
    crashes: int = 0
    joins: int = 0
    cuts: int = 0
    """Links that break, with what is under way on them."""
    partitions: int = 0
    """A member loses all its links at once."""
    losses: int = 0
    repeats: int = 0
    """Messages that arrive twice, the second time behind all others."""
    stalls: int = 0
    """Exchanges that end for no reason that the others share, with another member blamed for it, or nobody."""
    unknown: int = 0
    """Creates without an answer: carried out, not carried out, or carried out some time later."""
    early: int = 0
    """Alarms for what is late that ring although it only is slow."""
    delays: int | None = None
    """How often something else may happen first than what a fair schedule has next; None: always, all interleavings."""
    lag: bool = False
    """The main loop takes its time to apply what its coordinator has read."""
    slow_reads: bool = False
    """Other members may act between the wish to read the journal and the reading."""
    ready: bool = False
    """All members reach their first boundary before any message arrives: three rival proposals."""
    highest: int = 6
    """Proposals with a higher number are not followed further (but must still come to an end under fair delivery)."""

    @property
    def faults(self) -> tuple[int, ...]:
        return tuple(getattr(self, kind) or 0 for kind in KINDS)


KINDS = ("crashes", "joins", "cuts", "partitions", "losses", "repeats", "stalls", "unknown", "early", "delays")


class Node(NamedTuple):
    """A prefix of the journal."""

    parent: int
    entry: dict[str, Any]
    state: fold.State
    produced: dict[tuple[str, int], int]
    """(member, fragment) -> how much of its work the rounds so far hold."""


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


class State(NamedTuple):
    locals: tuple[int, ...]
    """Per member; -1: has not joined."""
    links: tuple[tuple[int, ...], ...]
    """Messages under way from i to j, at i * members + j."""
    head: int
    late: tuple[tuple[int, Any], ...]
    """(node, action): creates that the store has yet to carry out."""
    left: tuple[int, ...]


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


class Table:
    """Numbers for things that are equal."""

    def __init__(self, first: int = 0) -> None:
        self.items: list[Any] = [None] * first
        self.numbers: dict[Any, int] = {}

    def number(self, key: Any, item: Any = None) -> int:
        known = self.numbers.get(key)
        if known is None:
            known = self.numbers[key] = len(self.items)
            self.items.append(key if item is None else item)
        return known


class World:
    """All that can happen in a scenario. make: the state machine that is explored."""

    def __init__(self, scenario: Scenario, make: Callable[[str], Rounds], member: type[Member] | None = None) -> None:
        self.scenario, self.make, self.member = scenario, make, member or Member
        self.names = scenario.members + scenario.spare
        self.index = {name: i for i, name in enumerate(self.names)}
        self.nodes, self.machines, self.locals, self.messages = Table(), Table(), Table(), Table(2)
        self.attempts: dict[str, rounds.Exchange] = {}
        self.prefixes: dict[int, set[int]] = {}
        self.stales: dict[tuple[int, int], bool] = {}
        self.memo: dict[tuple[int, Any], tuple[int, tuple[tuple[str, int], ...]]] = {}
        self.attempts_seen = 0
        """The highest number of a proposal that was exchanged."""

    # The journal

    def node(self, number: int) -> Node:
        node: Node = self.nodes.items[number]
        return node

    def create(self, parent: int, fields: dict[str, Any]) -> int:
        """The journal with one entry more. Which attempt a round came of does not matter any more once it is there."""
        key = (parent, frozen({k: v for k, v in fields.items() if k not in ("attempt", "digest")}))
        if key in self.nodes.numbers:
            return self.nodes.numbers[key]
        before, produced = (None, {}) if parent < 0 else (self.node(parent).state, dict(self.node(parent).produced))
        seq, prev = (0, "") if before is None else (before.seq + 1, before.hash)
        after = fold.fold(before, fold.canonical({**fields, "seq": seq, "prev": prev, "nonce": ""}) + b"\n")
        for answer in fields.get("answers", ()):
            place = (answer["member"], fields["fragment"])
            if produced.get(place, 0) != answer["made"] - answer["tokens"]:
                raise Violation(f"a contribution of {answer['member']} is lost or applied twice")
            produced[place] = answer["made"]
        node = self.nodes.number(key, Node(parent, fields, after, produced))
        self.prefixes[node] = {node, *self.prefixes.get(parent, ())}
        return node

    def begin(self) -> State:
        opening = {"kind": "open", "protocol": fold.PROTOCOL, "run": "r", "checkpoint": "c"}
        known = asdict(settings(self.scenario.fragments)) | {"ahead": 64}
        head = self.create(-1, opening | {"fingerprint": {"fragments": self.scenario.fragments}, "settings": known})
        for name in self.scenario.members:
            head = self.create(head, self.joining(name))
        everyone = frozenset(self.scenario.members)
        numbers = []
        for name in self.scenario.members:
            member = Member(self, self.newcomer(name, head), name)
            member.links = set(everyone - {name})
            member.feed(self.view(head))
            for other in sorted(member.links):
                member.feed(rounds.PeerSeen(other, everyone - {other}))
            numbers.append(member.pack()[0])
        count = len(self.names)
        numbers += [-1] * len(self.scenario.spare)
        return State(tuple(numbers), ((),) * count**2, head, (), self.scenario.faults)

    def joining(self, name: str) -> dict[str, Any]:
        return {"kind": "join", "member": name, "region": name[0], "endpoints": ["x:1"], "samples_per_step": 1}

    def newcomer(self, name: str, head: int) -> Local:
        machine = self.make(name)
        zeros, nothing = (0,) * self.scenario.fragments, (-1,) * self.scenario.fragments
        number = self.machines.number((name, frozen(vars(machine))), machine)
        return Local(True, number, head, head, nothing, zeros, zeros, nothing, (), (), (), frozenset(), ())

    def view(self, node: int) -> View:
        state = self.node(node).state
        bases = tuple(fragment.base for fragment in state.fragments)
        return View(state.seq, state.epoch, bases, tuple(sorted(state.members)), False, state.rounds == 0)

    def over(self, node: int, fragment: int) -> bool:
        """The scenario wants no more rounds of it."""
        return self.node(node).state.fragments[fragment].rounds >= self.scenario.rounds

    def follows(self, node: int, earlier: int) -> bool:
        """The journal up to `earlier` is a prefix of that up to `node`."""
        return earlier in self.prefixes[node]

    def check(self, s: State) -> None:
        """All members have read and applied prefixes of the one journal."""
        for i in self.alive(s):
            local = self.local(s.locals[i])
            if not self.follows(s.head, local.seen) or not self.follows(local.seen, local.main):
                raise Violation(f"two states at one seq: {self.names[i]} applied what is not in the journal")

    # One member's steps

    def local(self, number: int) -> Local:
        local: Local = self.locals.items[number]
        return local

    def step(self, i: int, number: int, event: tuple[Any, ...]) -> tuple[int, tuple[tuple[str, int], ...]]:
        """The member's local state after `event`, and what it sends."""
        key = (number, event)
        known = self.memo.get(key)
        if known is None:
            member = self.member(self, self.local(number), self.names[i])
            getattr(member, event[0])(*event[1:])
            known = self.memo[key] = member.pack()
        return known

    def act(self, s: State, i: int, event: tuple[Any, ...]) -> State:
        number, sent = self.step(i, s.locals[i], event)
        if not self.scenario.slow_reads:
            while (wish := self.local(number).pending) and isinstance(wish[0], rounds.Read):
                number, more = self.step(i, number, ("read", s.head))
                sent += more
        if number == s.locals[i] and not sent:
            return s
        s = s._replace(locals=(*s.locals[:i], number, *s.locals[i + 1 :]))
        s = self.send(s, i, sent) if sent else s
        return self.without_stale(s) if self.local(number).alive else self.bury(s, i, False)

    def without_stale(self, s: State) -> State:
        """Without messages that will change nothing, whenever they arrive: when they do need not be explored."""
        count, links = len(self.names), None
        for at, link in enumerate(s.links):
            if link and any(self.stale(s.locals[at % count], message) for message in link):
                links = links or list(s.links)
                links[at] = tuple(m for m in link if not self.stale(s.locals[at % count], m))
        return s if links is None else s._replace(links=tuple(links))

    def stale(self, number: int, message: int) -> bool:
        """About entries that the receiver has read, or about a round that it knows to be decided."""
        known = self.stales.get((number, message))
        if known is None:
            known = self.stales[number, message] = message > ARRIVED and self._stale(number, message)
        return known

    def _stale(self, number: int, message: int) -> bool:
        kind, what = self.messages.items[message]
        if kind == "sees" or number < 0 or not self.local(number).alive:
            return False
        view = self.view(self.local(number).seen)
        if what["type"] == "head":
            return bool(what["head"] <= view.seq)
        if what["type"] not in ("answer", "start", "held"):
            return False
        return bool(what["head"] <= view.seq and what["base"] < view.bases[what["fragment"]])

    def send(self, s: State, i: int, sent: tuple[tuple[str, int], ...]) -> State:
        links, count = list(s.links), len(self.names)
        for name, message in sent:
            j = self.index[name]
            there, back = i * count + j, j * count + i
            if LOST not in links[there] and LOST not in links[back] and self.knows(s, j, i, links[there]):
                links[there] = (*links[there], message)
        return s._replace(links=tuple(links))

    def knows(self, s: State, j: int, i: int, link: tuple[int, ...]) -> bool:
        """j has the link from i, or will have."""
        return ARRIVED in link or (s.locals[j] >= 0 and self.names[i] in self.local(s.locals[j]).links)

    # What happens to several

    def standing(self, s: State, i: int, j: int) -> bool:
        links = s.links[i * len(self.names) + j], s.links[j * len(self.names) + i]
        return LOST not in links[0] + links[1] and self.knows(s, j, i, links[0]) and self.knows(s, i, j, links[1])

    def cut(self, s: State, i: int, j: int, keep: bool = False) -> State:
        """Both sides will hear of it. keep: what i has sent still arrives."""
        links, count = list(s.links), len(self.names)
        links[i * count + j] = (*(links[i * count + j] if keep else ()), LOST)
        links[j * count + i] = (LOST,)
        return s._replace(links=tuple(links))

    def connect(self, s: State, i: int, j: int) -> State:
        links, count = list(s.links), len(self.names)
        links[i * count + j] = links[j * count + i] = (ARRIVED,)
        return s._replace(links=tuple(links))

    def bury(self, s: State, i: int, keep: bool) -> State:
        """A dead member: of its exchanges is left how they ended."""
        for j in self.others(s, i):
            if self.standing(s, i, j):
                s = self.cut(s, i, j, keep)
        links, count = list(s.links), len(self.names)
        for j in range(count):
            links[j * count + i] = ()
        old = self.local(s.locals[i])
        ended = tuple((a, "held" if how == "held" else "failed") for a, how in old.exchanges)
        corpse = Local(False, 0, 0, 0, (), (), (), (), (), (), (), frozenset(), ended)
        number = self.locals.number(corpse)
        return s._replace(locals=(*s.locals[:i], number, *s.locals[i + 1 :]), links=tuple(links))

    def join(self, s: State, i: int) -> State:
        """A process joins; its region's earlier member may still be alive, and will find out."""
        head = self.create(s.head, self.joining(self.names[i]))
        member = Member(self, self.newcomer(self.names[i], head), self.names[i])
        member.feed(self.view(head))
        s = s._replace(head=head, locals=(*s.locals[:i], member.pack()[0], *s.locals[i + 1 :]))
        for j in self.others(s, i):
            s = self.connect(s, i, j)
        return s

    def others(self, s: State, i: int) -> list[int]:
        return [j for j in self.alive(s) if j != i]

    def alive(self, s: State) -> list[int]:
        return [i for i, number in enumerate(s.locals) if number >= 0 and self.local(number).alive]

    # The store

    def store(self, s: State, i: int, how: str) -> State:
        """The store answers member i's oldest request. how: known, or (of a create) done, undone or late: no answer, and
        the entry was created, was not, or will be."""
        local = self.local(s.locals[i])
        action = local.pending[0]
        if isinstance(action, rounds.Read):
            return self.act(s, i, ("read", s.head))
        head = s.head
        valid = fold.invalid(self.node(local.seen).state, action.fields) is None
        if valid and how in ("known", "done"):
            s = self.created(s, local.seen, action)
        elif valid and how == "late":
            s = s._replace(late=tuple(sorted({*s.late, (local.seen, Fields(action.fields))}, key=repr)))
        won = s.head != head
        return self.act(s, i, ("answered", won, s.head) if how == "known" else ("unanswered", local.seen, head))

    def created(self, s: State, node: int, action: rounds.Append) -> State:
        """If nothing is there yet, the entry after `node` is created."""
        if s.head != node:
            return s
        attempt = action.fields["attempt"]
        for answer in action.fields["answers"]:
            local = self.local(s.locals[self.index[answer["member"]]])
            if dict(local.exchanges).get(attempt) != "held":
                raise Violation(f"a round is committed that {answer['member']} does not hold")
        return s._replace(head=self.create(node, action.fields))

    def land(self, s: State, late: tuple[int, Any]) -> State:
        s = s._replace(late=tuple(x for x in s.late if x != late))
        return self.created(s, late[0], rounds.Append(late[1].fields))


class Fields:
    """An entry's fields, hashable."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields, self.key = fields, json.dumps(fields, sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fields) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return self.key


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
