"""A model of everything around several round state machines, for tests/test_rounds.py.

A `World` plays what surrounds `Rounds`: the coordinator's thread (one event at a time, blocked while the store answers),
links that keep their order until they break, exchanges that succeed here and fail there, and a main loop that reaches its
boundary, snapshots once and merges. Faults stop at `FAULTS` seconds; then rounds have to go on, with every member in them.
"""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from diloco import fold
from elastic import rounds
from elastic.rounds import Alarm, Received, Rounds, View

FAULTS = 5.0
"""Simulated seconds in which things break."""
PATIENCE = 60.0
"""Simulated seconds afterwards in which every member must have contributed to every fragment."""
DELAYS = {"soon": 0.02, "jitter": 0.2, "patience": 2.0, "minority": 2.0, "retry": 1.0, "resend": 2.0}
NAMES = "abcdefgh"


@dataclass
class Transfer:
    """An attempt's exchange: who takes part, who began, and how it ended for whom."""

    members: list[str]
    answers: tuple[Any, ...]
    started: set[str] = field(default_factory=set)
    over: dict[str, str] = field(default_factory=dict)


class Peer:
    """One member: its machine, the coordinator's queues, and its main loop."""

    def __init__(self, name: str, region: str, machine: Rounds, fragments: int, pace: float) -> None:
        self.id, self.region, self.machine, self.pace = name, region, machine, pace
        self.alive, self.blocked = True, False
        self.inbox: deque[Any] = deque()
        self.actions: deque[Any] = deque()
        self.links: dict[str, int] = {}
        self.alarms: set[Alarm] = set()
        self.seen = 0
        self.main_seen = 0
        self.asks: list[rounds.Ask] = []
        self.ready = [False] * fragments
        self.run_id = [0] * fragments
        self.in_flight: dict[int, tuple[int, int]] = {}
        self.due: dict[int, int] = {}
        self.work = [0] * fragments


class World:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now, self.count, self.events = 0.0, 0, 0
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.fragments = self.random.choice((1, 2))
        self.overlap = self.random.random() < 0.5  # fragments in flight side by side, or one at a time
        self.strict = seed % 10 == 0  # messages go through JSON
        self.min_regions = self.random.choice((1, 1, 2))
        self.raw: list[bytes] = []
        self.states: list[fold.State] = []
        self.peers: dict[str, Peer] = {}
        self.links: dict[tuple[str, str], int] = {}
        self.arrivals: dict[tuple[str, str], float] = {}
        self.generation = self.serial = 0
        self.transfers: dict[str, Transfer] = {}
        self.produced: dict[tuple[str, int], int] = {}
        self.slow_until = self.away_until = 0.0
        self.create(
            {
                "kind": "open",
                "protocol": fold.PROTOCOL,
                "run": "r",
                "checkpoint": "c",
                "fingerprint": {"fragments": self.fragments},
                "settings": asdict(settings(self.fragments)),
            },
            -1,
        )
        for _ in range(self.random.choice((1, 2, 3, 3, 4))):
            self.join(NAMES[self.serial])

    # Time

    def at(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.now + delay, self.count, action, arguments))

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Whether `done` came true before `until`."""
        while self.heap and self.heap[0][0] < until:
            self.now, _, action, arguments = heapq.heappop(self.heap)
            action(*arguments)
            if done():
                return True
        self.now = until
        return False

    # The journal

    def create(self, fields: dict[str, Any], seen: int) -> bool:
        """What Journal.append does for a member that has read up to `seen`."""
        before = self.states[seen] if seen >= 0 else None
        if before is not None and fold.invalid(before, fields):
            return False
        data = fold.encode_entry(fields, seen + 1, before.hash if before else "")
        if len(self.raw) > seen + 1:
            return False
        self.states.append(fold.fold(before, data))  # raises on an entry that is not valid there
        self.raw.append(data)
        if fields["kind"] == "round":
            self.check_round(fields)
        return True

    def check_round(self, fields: dict[str, Any]) -> None:
        transfer = self.transfers[fields["attempt"]]
        assert [a["member"] for a in fields["answers"]] == transfer.members
        assert all(transfer.over.get(m) == "held" for m in transfer.members), "committed, but not held by all"
        for answer, agreed in zip(fields["answers"], transfer.answers, strict=True):
            assert answer["tokens"] == agreed["tokens"] and answer["made"] == agreed["made"]
            key = (answer["member"], fields["fragment"])
            assert self.produced.get(key, 0) == answer["made"] - answer["tokens"], "work lost or counted twice"
            self.produced[key] = answer["made"]

    @property
    def head(self) -> fold.State:
        return self.states[-1]

    # Members

    def join(self, region: str) -> None:
        peer = Peer(f"{region}_{self.serial}", region, Rounds(f"{region}_{self.serial}", 1, self.min_regions),
                    self.fragments, self.random.choice((0.1, 0.3, 0.8)))  # fmt: skip
        self.serial += 1
        fields = {"kind": "join", "member": peer.id, "region": region, "endpoints": ["x:1"], "data": ["x:2"]}
        fields["samples_per_step"] = 1
        assert self.create(fields, len(self.raw) - 1)
        peer.seen = peer.main_seen = len(self.raw) - 1
        for other in self.alive():
            self.connect(peer, other)
        self.peers[peer.id] = peer
        self.post(peer, self.view(peer))
        self.at(self.random.random(), self.beat, peer)
        for f in range(self.fragments):
            self.begin_work(peer, f)

    def alive(self) -> list[Peer]:
        return [p for p in self.peers.values() if p.alive]

    def die(self, peer: Peer, delay: float) -> None:
        peer.alive = False
        for attempt, transfer in self.transfers.items():
            if peer.id in transfer.members and peer.id not in transfer.over:
                self.fail(peer, attempt)
        for pair in [pair for pair in self.links if peer.id in pair]:
            self.at(self.random.random() * delay, self.cut, pair, self.links[pair])

    def leave(self, peer: Peer) -> None:
        self.create({"kind": "leave", "member": peer.id}, len(self.raw) - 1)  # unless its id has ended already
        self.die(peer, 0.02)

    # Links: ordered until they break; what is under way then is lost, and both sides hear of it

    def connect(self, a: Peer, b: Peer) -> None:
        self.generation += 1
        pair = (min(a.id, b.id), max(a.id, b.id))
        self.links[pair] = self.generation
        for x, y in ((a, b), (b, a)):
            self.transmit(x.id, y.id, self.generation, "arrive")

    def cut(self, pair: tuple[str, str], generation: int) -> None:
        if self.links.get(pair) == generation:
            del self.links[pair]
            slow = self.random.choice((0.01, 0.3, 1.0))
            for x, y in (pair, pair[::-1]):
                self.at(self.random.random() * slow, self.deliver, x, y, generation, "lost")

    def transmit(self, sender: str, receiver: str, generation: int, kind: Any) -> None:
        at = max(self.arrivals.get((sender, receiver), 0.0), self.now + self.random.random() * 0.1)
        self.arrivals[sender, receiver] = at
        self.at(at - self.now, self.deliver, sender, receiver, generation, kind)

    def deliver(self, sender: str, receiver: str, generation: int, kind: Any) -> None:
        standing = self.links.get((min(sender, receiver), max(sender, receiver))) == generation
        if (standing or kind == "lost") and receiver in self.peers:
            self.post(self.peers[receiver], (sender, generation, kind))

    def reconnect(self) -> None:
        """Whoever is alive and not connected dials again; a broken link has been noticed by then."""
        everyone = self.alive()
        for i, a in enumerate(everyone):
            for b in everyone[i + 1 :]:
                if b.id not in a.links and a.id not in b.links and (min(a.id, b.id), max(a.id, b.id)) not in self.links:
                    self.connect(a, b)
        self.at(1.5, self.reconnect)

    # The coordinator's thread

    def post(self, peer: Peer, item: Any) -> None:
        peer.inbox.append(item)
        self.pump(peer)

    def pump(self, peer: Peer) -> None:
        while peer.alive and not peer.blocked and (peer.actions or peer.inbox):
            self.events += 1
            assert self.events < 100_000, "busy for ever"
            if peer.actions:
                self.perform(peer, peer.actions.popleft())
            else:
                self.handle(peer, peer.inbox.popleft())

    def handle(self, peer: Peer, item: Any) -> None:
        if not isinstance(item, tuple):
            if isinstance(item, Alarm):
                peer.alarms.discard(item)
            peer.actions.extend(peer.machine.handle(item))
            return
        sender, generation, kind = item
        if kind == "arrive":
            peer.links[sender] = generation
            self.tell_view(peer)
        elif peer.links.get(sender) != generation:
            pass
        elif kind == "lost":
            del peer.links[sender]
            self.tell_view(peer)
            peer.actions.extend(peer.machine.handle(rounds.PeerGone(sender)))
        elif kind[0] == "sees":
            peer.actions.extend(peer.machine.handle(rounds.PeerSeen(sender, kind[1])))
        else:
            message = json.loads(json.dumps(kind[1])) if self.strict else kind[1]
            peer.actions.extend(peer.machine.handle(Received(sender, message)))

    def tell_view(self, peer: Peer) -> None:
        for other, generation in peer.links.items():
            self.transmit(peer.id, other, generation, ("sees", frozenset(peer.links)))

    def beat(self, peer: Peer) -> None:
        if peer.alive:
            self.tell_view(peer)
            if self.random.random() < 0.5 and not peer.blocked:
                peer.actions.append(rounds.Read())
                self.pump(peer)
            self.at(1.0, self.beat, peer)

    def perform(self, peer: Peer, action: rounds.Action) -> None:
        match action:
            case rounds.Send(member, message):
                if member in peer.links:
                    self.transmit(peer.id, member, peer.links[member], ("message", message))
            case rounds.Ask():
                peer.asks.append(action)
                self.at(self.random.random() * 0.1, self.tick, peer)
            case rounds.Exchange():
                self.exchange(peer, action)
            case rounds.Cancel(attempt):
                self.fail(peer, attempt)
            case rounds.Append():
                self.append(peer, action)
            case rounds.Read():
                self.store(peer, self.read, peer)
            case rounds.SetAlarm(alarm, kind):
                self.set_alarm(peer, alarm, kind)
            case rounds.Halt(reason):
                raise AssertionError(reason)

    def set_alarm(self, peer: Peer, alarm: Alarm, kind: str) -> None:
        if alarm not in peer.alarms:
            peer.alarms.add(alarm)
            self.at(DELAYS[kind] * (1 + self.random.random()), self.post, peer, alarm)

    def store(self, peer: Peer, then: Callable[..., None], *arguments: Any) -> None:
        """The store answers at once or late; the member's thread waits for it."""
        slow = 1.0 if self.now < self.slow_until else 0.05
        delay = 0.0 if self.random.random() < 0.5 else self.random.random() * slow
        peer.blocked = True
        self.at(delay, self.unblock, peer, then, *arguments)

    def unblock(self, peer: Peer, then: Callable[..., None], *arguments: Any) -> None:
        peer.blocked = False
        if peer.alive:
            then(*arguments)
            self.pump(peer)

    def append(self, peer: Peer, action: rounds.Append) -> None:
        """The create takes effect before or after the wait, or not at all; its answer may be lost."""
        early = self.create(action.fields, peer.seen) if self.random.random() < 0.5 else None
        self.store(peer, self.appended, peer, action, early)

    def appended(self, peer: Peer, action: rounds.Append, won: bool | None) -> None:
        away = self.now < self.away_until
        if won is None and not (away and self.random.random() < 0.5):
            won = self.create(action.fields, peer.seen)
        if away:
            return self.set_alarm(peer, Alarm("append", action.fields["fragment"], action.fields["attempt"]), "retry")
        before = peer.seen
        self.read(peer)
        if won:
            for other, generation in peer.links.items():
                self.transmit(peer.id, other, generation, ("message", {"type": "head", "head": peer.seen}))
        assert won or peer.seen > before or fold.invalid(self.states[before], action.fields)

    def read(self, peer: Peer) -> None:
        if self.now >= self.away_until:
            peer.seen = len(self.raw) - 1
            self.at(self.random.random() * 0.2, self.advance, peer, peer.seen)
            peer.actions.extend(peer.machine.handle(self.view(peer)))

    def view(self, peer: Peer) -> View:
        state = self.states[peer.seen]
        bases = tuple(fragment.base for fragment in state.fragments)
        members = tuple(sorted(state.members))
        return View(state.seq, state.epoch, bases, members, False, state.rounds == 0, state.rules)

    # Exchanges

    def exchange(self, peer: Peer, action: rounds.Exchange) -> None:
        assert {a["member"] for a in action.answers} <= set(self.states[peer.seen].members)
        members = [answer["member"] for answer in action.answers]
        transfer = self.transfers.setdefault(action.attempt, Transfer(members, action.answers))
        assert transfer.answers == action.answers and peer.id not in transfer.started
        transfer.started.add(peer.id)
        self.at(3.0, self.stall, peer, action.attempt)
        if transfer.started == set(members):
            for member in members:
                self.at(self.random.random() * 0.3, self.complete, self.peers[member], action.attempt)

    def complete(self, peer: Peer, attempt: str) -> None:
        if peer.id not in self.transfers[attempt].over:
            self.transfers[attempt].over[peer.id] = "held"
            self.post(peer, rounds.Exchanged(attempt, f"result of {attempt}"))

    def stall(self, peer: Peer, attempt: str) -> None:
        """Whom it blames, it may blame wrongly."""
        members = self.transfers[attempt].members
        self.fail(peer, attempt, frozenset(m for m in members if m != peer.id and self.random.random() < 0.3))

    def fail(self, peer: Peer, attempt: str, suspects: frozenset[str] = frozenset()) -> None:
        """The attempt is over for `peer` without a result, and soon for those who still need something of it."""
        transfer = self.transfers.get(attempt)
        if transfer is None or peer.id in transfer.over or (peer.alive and peer.id not in transfer.started):
            return
        transfer.over[peer.id] = "failed"
        peer.inbox.append(rounds.ExchangeFailed(attempt, suspects))
        self.at(0.0, self.pump, peer)
        for member in transfer.started - set(transfer.over):
            self.at(self.random.random() * 0.3, self.fail, self.peers[member], attempt, suspects)

    # The main loop

    def begin_work(self, peer: Peer, fragment: int) -> None:
        """The inner steps up to the next boundary, from now."""
        peer.ready[fragment] = False
        peer.run_id[fragment] += 1
        self.at(peer.pace * (0.5 + self.random.random()), self.boundary, peer, fragment, peer.run_id[fragment])

    def boundary(self, peer: Peer, fragment: int, run_id: int) -> None:
        if peer.run_id[fragment] == run_id:
            peer.ready[fragment] = True
            peer.work[fragment] += 4
            self.tick(peer)

    def tick(self, peer: Peer) -> None:
        """What Control.next does: announce a boundary once, and take a snapshot that is asked for."""
        state = self.states[peer.main_seen]
        if not peer.alive:
            return
        if peer.id not in state.members:
            return self.die(peer, 0.1)
        for f in range(self.fragments) if self.overlap else [state.next_fragment()]:
            base = state.fragments[f].base
            if peer.ready[f] and self.free(peer, f) and peer.due.get(f) != base:
                peer.due[f] = base
                self.post(peer, rounds.Due(f, base))
        for ask in list(peer.asks):
            f, base = ask.fragment, state.fragments[ask.fragment].base
            if ask.base < base:
                peer.asks.remove(ask)
            elif ask.base == base and peer.ready[f] and self.free(peer, f):
                peer.asks.remove(ask)
                self.contribute(peer, f, base)

    def free(self, peer: Peer, fragment: int) -> bool:
        return fragment not in peer.in_flight if self.overlap else not peer.in_flight

    def contribute(self, peer: Peer, f: int, base: int) -> None:
        assert (f, base) not in peer.in_flight.items(), "two snapshots for one base"
        peer.in_flight[f] = (base, peer.work[f])
        made = self.produced.get((peer.id, f), 0) + peer.work[f]
        answer = {"tokens": peer.work[f], "made": made, "leases": [], "theta": f"t{base}", "momentum": "m"}
        self.at(self.random.random() * 0.05, self.post, peer, rounds.Answered(f, 0, base, answer))

    def advance(self, peer: Peer, seen: int) -> None:
        """The main loop applies the entries up to `seen`."""
        while peer.main_seen < seen:
            peer.main_seen += 1
            entry = json.loads(self.raw[peer.main_seen])
            if entry["kind"] == "round":
                self.merge(peer, entry)
        self.tick(peer)

    def merge(self, peer: Peer, entry: dict[str, Any]) -> None:
        f = entry["fragment"]
        base, work = peer.in_flight.pop(f, (-1, 0))
        assert base in (-1, entry["base"])
        if peer.id in [answer["member"] for answer in entry["answers"]]:
            assert base == entry["base"], "used, but never given"
            peer.work[f] -= work
        self.begin_work(peer, f)

    # Faults

    def break_something(self) -> None:
        if self.now > FAULTS or not self.alive():
            return
        self.at(self.random.random() * 0.8, self.break_something)
        peer, kind = self.random.choice(self.alive()), self.random.random()
        if kind < 0.15 and len(self.alive()) > 1:
            self.die(peer, self.random.choice((0.1, 1.0)))
            if self.random.random() < 0.5:
                self.at(self.random.random() * 2, self.join, peer.region)
        elif kind < 0.22 and len(self.alive()) > 1:
            self.leave(peer)
        elif kind < 0.3 and self.serial < len(NAMES):
            self.join(NAMES[self.serial])
        elif kind < 0.35:
            self.join(peer.region)  # a second process of the region: the first one's id ends
        elif kind < 0.65 and self.links:
            pair = self.random.choice(list(self.links))
            self.cut(pair, self.links[pair])
        elif kind < 0.8 and self.transfers:
            self.fail(peer, self.random.choice(list(self.transfers)))
        elif kind < 0.85:  # by hand: voids what is in flight
            h = self.fragments * self.random.randint(1, 3)
            assert self.create({"kind": "set", "settings": {"outer.sync_every": h}}, len(self.raw) - 1)
        elif kind < 0.92:
            self.slow_until = self.now + 2 * self.random.random()
        else:
            self.away_until = self.now + 2 * self.random.random()

    def wanted(self) -> set[tuple[str, int]]:
        return {(p.id, f) for p in self.alive() if p.id in self.head.members for f in range(self.fragments)}


def settings(fragments: int) -> fold.Settings:
    known = {"sync_every": fragments, "lr": 0.7, "momentum": 0.9, "boundary": "steps", "rounds": None, "tokens": None}
    more = {"seq_len": 1, "seed": 0, "ahead": 8, "lease_rounds": 1000, "start_regions": 1}
    return fold.Settings(**{**known, **more})


def simulate(seed: int) -> World:
    world = World(seed)
    world.at(1.5, world.reconnect)
    world.at(0.5, world.break_something)
    world.run(FAULTS + 2)
    while sum(peer.id in world.head.members for peer in world.alive()) < world.min_regions:
        world.join(f"new{world.serial}")
    begin, seen, have = len(world.raw), [len(world.raw)], set()

    def everyone_contributed() -> bool:
        for data in world.raw[seen[0] :]:
            entry = json.loads(data)
            have.update((a["member"], entry["fragment"]) for a in entry.get("answers", ()))
        seen[0] = len(world.raw)
        return world.wanted() <= have

    if not world.run(FAULTS + 2 + PATIENCE, everyone_contributed):
        raise AssertionError(f"stuck: {world.wanted() - have} since entry {begin}, at {len(world.raw)}")
    return world
