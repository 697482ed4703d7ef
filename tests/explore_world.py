"""What surrounds the round state machines, as a finite model for tests/explore.py.

A state is a tuple of small integers and tuples: a local state for every member, the messages under way on every link, the
head of the journal, creates that the store has not carried out yet, and what is left of each kind of fault. Everything
that happens to one member is a function of its local state and of the event, so it is computed once and remembered:
`Rounds` is pure, and no state machine is copied for a transition that was seen before, in whatever company.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from diloco import fold
from elastic import rounds
from elastic.rounds import Rounds, View
from tests.explore_member import ARRIVED, LOST, Local, Member, Violation, frozen
from tests.explore_scenarios import Scenario
from tests.rounds_world import settings


class Node(NamedTuple):
    """A prefix of the journal."""

    parent: int
    entry: dict[str, Any]
    state: fold.State
    produced: dict[tuple[str, int], int]
    """(member, fragment) -> how much of its work the rounds so far hold."""


class State(NamedTuple):
    locals: tuple[int, ...]
    """Per member; -1: has not joined."""
    links: tuple[tuple[int, ...], ...]
    """Messages under way from i to j, at i * members + j."""
    head: int
    late: tuple[tuple[int, Any], ...]
    """(node, action): creates that the store has yet to carry out."""
    left: tuple[int, ...]


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
        key = (parent, frozen({k: v for k, v in fields.items() if k not in ("attempt", "digest", "head")}))
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
        fields = {"kind": "join", "member": name, "region": name[0], "endpoints": ["x:1"], "data": ["x:2"]}
        return {**fields, "samples_per_step": 1}

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
