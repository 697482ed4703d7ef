"""Explores all interleavings of a scenario's events and faults, state by state.

Every reachable state is checked for safety (see `World`), and from each one two fair schedules without further faults have
to bring the run to its end: one where broken links come back, one where they stay broken. Messages on one link keep their
order, but for those that arrive twice. Members' names decide who appends and whose proposal wins, so they are not
interchangeable, and there is no symmetry to use; what changes nothing whenever it happens is not explored.

`python -m tests.explore` runs `SCENARIOS`, as tests/test_explore.py does; `python -m tests.explore larger` runs `LARGER`:
more interleavings of the same, some 100,000 states and minutes each.
"""

from __future__ import annotations

import operator
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from elastic.rounds import Append, Rounds
from tests.explore_member import LOST, Local, Member, Violation
from tests.explore_scenarios import KINDS, LARGER, SCENARIOS, Scenario
from tests.explore_world import State, World

ORDER = ("store", "hear", "advance", "done", "fail", "poll", "boundary", "snapshot", "connect", "beat")
"""What a fair schedule does first: alarms are slow."""
BELLS = ("soon", "jitter", "retry", "patience", "resend", "minority")
PATIENCE = 1000
TOLD = 25
NONE = (0,) * len(KINDS)
CRASHES, JOINS, CUTS, PARTITIONS, LOSSES, REPEATS, STALLS, UNKNOWN, EARLY, DELAYS = range(len(KINDS))


class Option(NamedTuple):
    """Something that may happen to member `who` next. fault: the kind that it takes one of, or empty."""

    kind: str
    who: int
    what: tuple[Any, ...] = ()
    fault: str = ""


class Explorer:
    def __init__(
        self, scenario: Scenario, make: Callable[[str], Rounds] = Rounds, member: type[Member] | None = None
    ) -> None:
        self.scenario, self.world = scenario, World(scenario, make, member)
        self.good: tuple[set[State], set[State]] = (set(), set())

    def begin(self) -> State:
        s = self.world.begin()
        for i in range(len(self.scenario.members) if self.scenario.ready else 0):
            for f in range(self.scenario.fragments):
                s = self.apply(s, Option("boundary", i, (f,)))
        return s

    # What may happen

    def options(self, s: State, left: tuple[int, ...] = NONE) -> Iterator[Option]:
        """left: how many faults of each kind."""
        world = self.world
        for late in s.late:
            yield Option("land", -1, (late,))
        alive = world.alive(s)
        for i in alive:
            local = world.local(s.locals[i])
            if local.pending:  # its coordinator waits for the store
                yield Option("store", i, ("known",))
                if left[UNKNOWN] and isinstance(local.pending[0], Append):
                    yield from (Option("store", i, (how,), "unknown") for how in ("done", "undone", "late"))
            else:
                yield from self.own(s, i, local, left)
        for i in alive:
            for j in alive:
                if i < j:
                    yield from self.between(s, i, j, left)
        yield from self.faults(s, alive, left)

    def own(self, s: State, i: int, local: Local, left: tuple[int, ...]) -> Iterator[Option]:
        """Of one member that is not blocked."""
        count = len(self.world.names)
        for j in range(count):
            if link := s.links[j * count + i]:
                yield Option("hear", i, (j,))
                if left[LOSSES] and link[0] > LOST + 1:
                    yield Option("lose", i, (j,), "losses")
                if left[REPEATS] and link[0] > LOST + 1:
                    yield Option("repeat", i, (j,), "repeats")
        if local.main != local.seen:
            yield Option("advance", i)
        if local.seen != s.head:
            yield Option("poll", i)
        yield from self.training(i, local)
        for kind, alarm in local.alarms:
            yield Option("ring", i, (kind, alarm), "early" if kind == "resend" else "")
        for attempt, how in local.exchanges:
            if how == "runs":
                yield from self.exchanging(s, i, attempt, left)

    def training(self, i: int, local: Local) -> Iterator[Option]:
        state = self.world.node(local.main).state
        flying = [f for f, base in enumerate(local.flying) if base >= 0]
        f = state.next_fragment(flying)
        assert f is not None
        if f not in flying and not self.world.over(local.main, f):
            if local.due[f] != state.fragments[f].base:
                yield Option("boundary", i, (f,))
            elif (f, state.fragments[f].base) in local.asks:
                yield Option("snapshot", i, (f,))

    def exchanging(self, s: State, i: int, attempt: str, left: tuple[int, ...]) -> Iterator[Option]:
        world = self.world
        action = world.attempts[attempt]
        others = [world.index[a["member"]] for a in action.answers if a["member"] != world.names[i]]
        ends = {j: dict(world.local(s.locals[j]).exchanges).get(attempt, "") for j in others}
        broken = frozenset(world.names[j] for j in others if not world.standing(s, i, j))
        if all(ends.values()):
            yield Option("done", i, (attempt, "held", frozenset()))
        if broken or "failed" in ends.values():
            yield Option("fail", i, (attempt, "failed", broken))
        absent = frozenset(world.names[j] for j in others if not ends[j])
        if absent and not broken:
            yield Option("stall", i, (attempt, "failed", absent), "stalls")
        for blamed in [frozenset(), *(frozenset([world.names[j]]) for j in others)] if left[STALLS] else []:
            yield Option("false stall", i, (attempt, "failed", blamed), "stalls")

    def between(self, s: State, i: int, j: int, left: tuple[int, ...]) -> Iterator[Option]:
        world = self.world
        if world.standing(s, i, j):
            if left[CUTS]:
                yield Option("cut", i, (j,), "cuts")
            for a, b in ((i, j), (j, i)):
                if not s.links[b * len(world.names) + a] and self.stale(s, a, b):
                    yield Option("beat", a, (b,))
        elif not any(s.links[a * len(world.names) + b] for a, b in ((i, j), (j, i))):
            x, y = world.local(s.locals[i]), world.local(s.locals[j])
            members = world.node(s.head).state.members
            apart = world.names[j] not in x.links and world.names[i] not in y.links
            if apart and world.names[i] in members and world.names[j] in members:
                yield Option("connect", i, (j,))

    def stale(self, s: State, i: int, j: int) -> bool:
        """What i believes of j's links is not so."""
        world = self.world
        local, other = world.local(s.locals[i]), world.local(s.locals[j])
        believed = world.machines.items[local.machine].peers.get(world.names[j])
        both = world.names[j] in local.links and world.names[i] in other.links
        return both and not local.pending and believed != other.links

    def faults(self, s: State, alive: list[int], left: tuple[int, ...]) -> Iterator[Option]:
        world, first = self.world, len(self.scenario.members)
        for i in alive:
            if left[CRASHES] and len(alive) > 1:
                yield Option("crash", i, (True,), "crashes")
                if any(s.links[i * len(world.names) + j] for j in range(len(world.names))):
                    yield Option("crash", i, (False,), "crashes")
            if left[PARTITIONS] and len(alive) > 2 and all(world.standing(s, i, j) for j in alive if j != i):
                yield Option("isolate", i, (), "partitions")
        for i in range(first, len(s.locals)):
            if left[JOINS] and s.locals[i] < 0 and (i == first or s.locals[i - 1] >= 0):
                yield Option("join", i, (), "joins")

    def successors(self, s: State) -> Iterator[tuple[Option, State]]:
        """All that may happen next within the scenario's bounds."""
        options = list(self.options(s, s.left))
        if self.scenario.delays is not None:
            options = self.delayed(s, options)
        for option in options:
            if not option.fault or s.left[KINDS.index(option.fault)]:
                yield option, self.apply(s, option)

    def delayed(self, s: State, options: list[Option]) -> list[Option]:
        """What a fair schedule does next costs nothing, alarms when it has nothing to do; everything else a delay."""
        calm = self.calm(s, 0)
        free = [calm] if calm else [o._replace(fault="") for o in self.bells(options, 0)]
        return free + [o if o.fault else o._replace(fault="delays") for o in options if o not in free]

    # What comes of it

    def apply(self, s: State, option: Option) -> State:
        if option.fault:
            left = list(s.left)
            left[KINDS.index(option.fault)] -= 1
            s = s._replace(left=tuple(left))
        return getattr(self, "_" + option.kind.replace(" ", "_"))(s, option.who, *option.what)  # type: ignore[no-any-return]

    def _land(self, s: State, i: int, late: Any) -> State:
        return self.world.land(s, late)

    def _store(self, s: State, i: int, how: str) -> State:
        return self.world.store(s, i, how)

    def _hear(self, s: State, i: int, j: int) -> State:
        at = j * len(self.world.names) + i
        message, *rest = s.links[at]
        s = s._replace(links=(*s.links[:at], tuple(rest), *s.links[at + 1 :]))
        return self.world.act(s, i, ("hear", self.world.names[j], message))

    def _lose(self, s: State, i: int, j: int) -> State:
        at = j * len(self.world.names) + i
        return s._replace(links=(*s.links[:at], s.links[at][1:], *s.links[at + 1 :]))

    def _repeat(self, s: State, i: int, j: int) -> State:
        at = j * len(self.world.names) + i
        return s._replace(links=(*s.links[:at], (*s.links[at], s.links[at][0]), *s.links[at + 1 :]))

    def _advance(self, s: State, i: int) -> State:
        return self.world.act(s, i, ("advance",))

    def _poll(self, s: State, i: int) -> State:
        return self.world.act(s, i, ("poll", s.head))

    def _boundary(self, s: State, i: int, f: int) -> State:
        return self.world.act(s, i, ("boundary", f))

    def _snapshot(self, s: State, i: int, f: int) -> State:
        return self.world.act(s, i, ("snapshot", f))

    def _ring(self, s: State, i: int, kind: str, alarm: Any) -> State:
        return self.world.act(s, i, ("ring", kind, alarm))

    def _end(self, s: State, i: int, attempt: str, how: str, suspects: frozenset[str]) -> State:
        return self.world.act(s, i, ("ended", attempt, how, suspects))

    _done = _fail = _stall = _false_stall = _end

    def _cut(self, s: State, i: int, j: int) -> State:
        return self.world.cut(s, i, j)

    def _connect(self, s: State, i: int, j: int) -> State:
        return self.world.connect(s, i, j)

    def _beat(self, s: State, i: int, j: int) -> State:
        return self.world.act(s, i, ("beat", self.world.names[j], self.world.local(s.locals[j]).links))

    def _crash(self, s: State, i: int, keep: bool) -> State:
        return self.world.bury(s, i, keep)

    def _isolate(self, s: State, i: int) -> State:
        for j in self.world.others(s, i):
            s = self.world.cut(s, i, j)
        return s

    def _join(self, s: State, i: int) -> State:
        return self.world.join(s, i)

    # Fair schedules

    def committed(self, s: State) -> bool:
        """All rounds that the scenario wants are."""
        return all(self.world.over(s.head, f) for f in range(self.scenario.fragments))

    def over(self, s: State, wanted: list[int]) -> bool:
        """So many rounds of each fragment are committed, and every member has applied them; or nobody is left."""
        world = self.world
        if not world.alive(s):
            return True
        rounds = [f.rounds for f in world.node(s.head).state.fragments]
        return all(map(operator.ge, rounds, wanted)) and all(
            world.local(s.locals[i]).main == s.head for i in world.alive(s)
        )

    def comes_to_an_end(self, s: State, way: int, more: int = 0) -> None:
        """Raises Violation if a fair schedule without faults does not lead to the end, or to so many more rounds of each
        fragment. way 0: links come back; 1: they do not, and members act in the opposite order."""
        good = set() if more else self.good[way]
        counts = [f.rounds + more for f in self.world.node(s.head).state.fragments]
        wanted = [min(count, self.scenario.rounds) if more else self.scenario.rounds for count in counts]
        passed: list[State] = []
        path: list[Option] = []
        try:
            for state in self.fair_schedule(s, way, path, wanted):
                passed.append(state)
                if state in good:
                    break
                if len(passed) > PATIENCE:
                    raise Violation("stuck: busy for ever")
        except Violation as error:
            error.path = tuple(path)
            raise
        good.update(passed)

    def fair_schedule(self, s: State, way: int, path: list[Option], wanted: list[int]) -> Iterator[State]:
        """The states up to the end. Alarms ring when nothing else happens, each once before any rings again."""
        bells: deque[Option] = deque()
        yield s
        while not self.over(s, wanted):
            option = self.calm(s, way)
            if option is None:
                options = list(self.options(s))
                bells = deque(bell for bell in bells if bell in options) or deque(self.bells(options, way))
                if not bells:
                    raise Violation("stuck: nothing is left to happen")
                option = bells.popleft()._replace(fault="")
            path.append(option)
            s = self.apply(s, option)
            yield s

    def calm(self, s: State, way: int) -> Option | None:
        """What happens next if anything but an alarm may happen and changes anything."""
        if (first := self.urgent(s, way)) is not None:
            return first
        options = [o for o in self.options(s) if not o.fault and o.kind in ORDER and not (way and o.kind == "connect")]
        for option in sorted(options, key=lambda o: (ORDER.index(o.kind), -o.who if way else o.who)):
            if self.apply(s, option) != s:
                return option
        return None

    def urgent(self, s: State, way: int) -> Option | None:
        """The first two kinds of `ORDER`, quickly."""
        alive, count = self.world.alive(s), len(self.world.names)
        for i in reversed(alive) if way else alive:
            if self.world.local(s.locals[i]).pending:
                return Option("store", i, ("known",))
        for i in reversed(alive) if way else alive:
            for j in range(count):
                if s.links[j * count + i]:
                    return Option("hear", i, (j,))
        return None

    def bells(self, options: list[Option], way: int) -> list[Option]:
        """Each alarm once, the quickest first, then what only a long silence tells."""
        rings = [o for o in options if o.kind in ("ring", "stall")]
        late = len(BELLS)

        def key(o: Option) -> tuple[int, int]:
            return (BELLS.index(o.what[0]) if o.kind == "ring" else late, -o.who if way else o.who)

        return sorted(rings, key=key)


@dataclass
class Report:
    scenario: str
    states: int = 0
    transitions: int = 0
    ends: int = 0
    """States in which all wanted rounds have just been committed."""
    attempts: int = 0
    """The highest number of an attempt."""
    cut_off: int = 0
    """States that were not followed because of a proposal's number."""
    seconds: float = 0.0
    violation: str = ""
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.scenario:<42} {self.states:>9,} states {self.transitions:>10,} transitions {self.ends:>7,} ends "
            f"attempts up to {self.attempts} {self.seconds:>6.1f} s {self.violation}"
        )


def explore(
    scenario: Scenario, make: Callable[[str], Rounds] = Rounds, member: type[Member] | None = None, most: int = 0
) -> Report:
    """Breadth first, so that a trace is a shortest one. make, member: the state machine, and what surrounds it; most: give
    up after so many states (0: never)."""
    begin, explorer, report = time.process_time(), Explorer(scenario, make, member), Report(scenario.name)
    start = explorer.begin()
    states: list[State] = [start]
    came: list[tuple[int, Option | None]] = [(-1, None)]
    known = {start}
    at = 0
    option: Option | None = None
    try:
        while at < len(states) and (not most or at < most):
            s, option = states[at], None
            explorer.world.check(s)
            for way in (0, 1):
                explorer.comes_to_an_end(s, way)
            report.ends += explorer.committed(s)
            if explorer.committed(s):
                pass  # what is left is to read it
            elif number(explorer, s) <= scenario.highest:
                for option, new in explorer.successors(s):
                    report.transitions += 1
                    if new not in known:
                        known.add(new)
                        states.append(new)
                        came.append((at, option))
            else:
                report.cut_off += 1
            at += 1
    except Violation as error:
        report.violation = str(error)
        report.trace = trace(explorer, came, at, option)
        if error.path:
            report.trace += ["then, in a fair schedule:", *(say(explorer, option) for option in error.path[-TOLD:])]
    report.states, report.attempts = len(states), explorer.world.attempts_seen
    report.seconds = time.process_time() - begin
    return report


def walk(scenario: Scenario, seed: int, steps: int, make: Callable[[str], Rounds] = Rounds) -> Report:
    """One long random schedule, far beyond what can be explored; every fifth state has to lead to one more round of each
    fragment under fair delivery."""
    begin, random, explorer = time.process_time(), Random(seed), Explorer(scenario, make)
    report, s = Report(f"{scenario.name}, seed {seed}"), explorer.begin()
    for step in range(steps):
        options = list(explorer.options(s, s.left))
        faults = [o for o in options if o.fault and s.left[KINDS.index(o.fault)]]
        quiet = [o for o in options if not o.fault]
        if explorer.committed(s) or not explorer.world.alive(s):
            break
        s = explorer.apply(s, random.choice(faults if faults and (not quiet or random.random() < 0.1) else quiet))
        explorer.world.check(s)
        report.states, report.ends = step + 1, sum(f.rounds for f in explorer.world.node(s.head).state.fragments)
        if step % 5 == 0:
            explorer.comes_to_an_end(s, step % 2, more=1)
    report.attempts, report.seconds = explorer.world.attempts_seen, time.process_time() - begin
    return report


def number(explorer: Explorer, s: State) -> int:
    """The highest number of a proposal that is under way."""
    world = explorer.world
    machines = (world.machines.items[world.local(s.locals[i]).machine] for i in world.alive(s))
    return max((flight.number for machine in machines for flight in machine.flights.values()), default=0)


def trace(explorer: Explorer, came: list[tuple[int, Option | None]], at: int, last: Option | None) -> list[str]:
    lines = [] if last is None else [say(explorer, last)]
    while at > 0:
        at, option = came[at]
        assert option is not None
        lines.append(say(explorer, option))
    return lines[::-1]


def say(explorer: Explorer, option: Option) -> str:
    names = explorer.world.names
    what = [names[x] if option.kind in ("hear", "lose", "repeat", "cut", "connect", "beat") else x for x in option.what]
    return f"{option.kind} {names[option.who] if option.who >= 0 else ''} {' '.join(map(str, what))}"


def main(argv: list[str]) -> None:
    for scenario in LARGER if argv == ["larger"] else SCENARIOS:
        report = explore(scenario)
        print(report, *report.trace, sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
