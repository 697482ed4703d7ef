"""The ledger against a model that follows every single sample: regions with and without sources of their own join, train, put
work into several fragments, fall silent, are restarted, leave, and the run is rewound, in any order."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from diloco.fold import counters
from diloco.lineage import on_path, path_of
from diloco.reading import SOURCE, Reader
from diloco.tally import differs, tally
from tests.test_journal import Log, answer, joining, opening
from tests.test_losing import rewinding

Sample = tuple[str, int]
"""(source, index)."""
REGIONS = ("asia", "eu", "us")
WHO = st.sampled_from(REGIONS)
SOME = st.sets(WHO, min_size=1)
OWN = st.sampled_from(["", "1/4", "1"])
FRAGMENT = st.integers(0, 2)


@dataclass
class Life:
    """A member as its own loop sees it."""

    member: str
    reader: Reader
    taken: list[Sample] = field(default_factory=list)
    """In the order in which it trained on them."""
    snapshots: dict[int, tuple[tuple[int, int], int, dict[str, Any]]] = field(default_factory=dict)
    """Fragment in flight -> ((epoch, base), len(taken) then, answer)."""


class Accounts(RuleBasedStateMachine):
    @initialize(fragments=st.integers(1, 3), start_regions=st.integers(1, 2), own=OWN)
    def open(self, fragments: int, start_regions: int, own: str) -> None:
        self.fragments = fragments
        self.log = Log(opening(fragments=fragments, ahead=6, lease_rounds=2, start_regions=start_regions))
        self.lives: dict[str, Life] = {}
        self.applied: dict[Sample, str] = {}
        """Sample -> the region that it was applied for."""
        self.skipped: set[Sample] = set()
        self.saved: list[tuple[int, dict[str, Any], dict[Sample, str], set[Sample]]] = []
        self.number = 0
        self.save()
        self.join("eu", 2, own, False)
        self.join("us", 1, "", False)

    def hear(self) -> None:
        """Every loop has read the journal; who is no member any more has ended."""
        members = self.log.state.members
        self.lives = {region: life for region, life in self.lives.items() if life.member in members}
        for life in self.lives.values():
            life.reader.update(members[life.member].leases)

    def leased(self) -> dict[str, list[Sample]]:
        members = self.log.state.members.values()
        return {m.id: [(x.source, i) for x in m.leases for i in range(x.applied, x.stop)] for m in members}

    def pool(self) -> list[Sample]:
        return [(back.source, i) for back in self.log.state.ledger.pool for i in range(back.start, back.stop)]

    @rule(region=WHO, batch=st.integers(1, 3), own=OWN, kept=st.booleans())
    def join(self, region: str, batch: int, own: str, kept: bool) -> None:
        """Also again: with the parameters that it had saved, or without."""
        before, self.number = self.lives.get(region), self.number + 1
        member, shares = f"{region}_{self.number}", {"": 1 - Fraction(own or 0)}
        shares |= {f"{region}/own": Fraction(own)} if own else {}
        sources = [["own", own, f"digest of {region}'s"]] if own else []
        self.log.add({**joining(member, batch), "sources": sources})
        life = self.lives[region] = Life(member, Reader(shares))
        self.hear()
        if kept and before is not None:
            ranges = before.reader.ranges()
            if life.reader.resume(json.loads(json.dumps(ranges))):
                life.taken = [(name, i) for name, there in ranges.items() for a, b in there for i in range(a, b)]

    @rule(region=WHO, lasting=st.booleans())
    def leave(self, region: str, lasting: bool) -> None:
        if (life := self.lives.get(region)) and not lasting:
            self.log.add({"kind": "leave", "member": life.member})
            self.hear()

    @rule(who=SOME, count=st.integers(1, 9))
    def train(self, who: set[str], count: int) -> None:
        for life in (self.lives[region] for region in sorted(who & self.lives.keys())):
            ids = life.reader.take(min(count, life.reader.available()))
            life.taken += [(life.reader.names[i // SOURCE], i % SOURCE) for i in ids]

    @rule(who=SOME, fragment=FRAGMENT)
    def contribute(self, who: set[str], fragment: int) -> None:
        f = fragment % self.fragments
        key = self.log.state.epoch, self.log.state.fragments[f].base
        for life in (self.lives[region] for region in sorted(who & self.lives.keys())):
            if f not in life.snapshots or life.snapshots[f][0] != key:
                said = answer(life.member, *map(tuple, life.reader.claims()))
                life.snapshots[f] = key, len(life.taken), said

    @precondition(lambda self: self.log.state.ledger.handed)
    @rule(fragment=FRAGMENT, without=st.sets(WHO, max_size=2))
    def commit(self, fragment: int, without: set[str]) -> None:
        f = fragment % self.fragments
        key = self.log.state.epoch, self.log.state.fragments[f].base
        ready = {r: x for r, x in self.lives.items() if r not in without and x.snapshots.get(f, (None,))[0] == key}
        if ready:
            self.log.add(self.log.round(*(x.snapshots[f][2] for x in ready.values()), fragment=f))
            for region, life in ready.items():
                covered = life.taken[: life.snapshots.pop(f)[1]]
                self.applied |= {sample: region for sample in covered if sample not in self.applied}
            self.hear()

    @precondition(lambda self: self.log.state.ledger.handed)
    @rule(
        who=SOME, count=st.integers(1, 9), fragment=FRAGMENT, more=st.integers(0, 3), without=st.sets(WHO, max_size=2)
    )
    def round(self, who: set[str], count: int, fragment: int, more: int, without: set[str]) -> None:
        """As most of them go: steps, boundary, steps meanwhile, commit; or the next fragment's round is faster."""
        self.train(who, count)
        self.contribute(who, fragment)
        if more:
            self.train(who, more)
            self.contribute(who, fragment + 1)
            self.commit(fragment + 1, without)
        self.commit(fragment, without)

    @rule(fragment=FRAGMENT, count=st.integers(1, 9))
    def round_of_all(self, fragment: int, count: int) -> None:
        if self.log.state.ledger.handed:
            self.round(set(REGIONS), count, fragment, 1, set())

    @rule()
    def save(self) -> None:
        there = json.loads(json.dumps(counters(self.log.state)))
        self.saved.append((self.log.state.seq, there, self.applied.copy(), self.skipped.copy()))

    @rule(which=st.integers(0, 9), skip=st.booleans())
    def rewind(self, which: int, skip: bool) -> None:
        if which >= len(self.saved):
            return  # not as often as all else
        seq, there, applied, skipped = self.saved[which]
        if skip and on_path(seq, path_of(self.log.entries)):
            held = {sample for leased in self.leased().values() for sample in leased}
            self.skipped = (held | self.skipped | self.applied.keys()) - applied.keys()
            self.log.add(rewinding(self.log, there, seq, "by hand", True))
        else:
            self.skipped = skipped.copy()
            self.log.add(rewinding(self.log, there, seq, "by hand", False))
        self.applied = applied.copy()
        for life in self.lives.values():
            life.taken, life.snapshots = [], {}
        self.hear()

    @invariant()
    def every_sample_is_in_one_place(self) -> None:
        ledger = self.log.state.ledger
        places = [*self.leased().values(), self.pool(), list(self.applied), list(self.skipped)]
        cursors = {"": ledger.cursor, **ledger.own}
        everything = [(source, i) for source, cursor in cursors.items() for i in range(cursor)]
        assert sorted(sample for place in places for sample in place) == sorted(everything)
        assert (ledger.applied, ledger.skipped) == (len(self.applied), len(self.skipped))

    @invariant()
    def no_two_regions_train_on_one_sample(self) -> None:
        """Nor does one train on it again, as long as its parameters hold it."""
        for life in self.lives.values():
            assert len(set(life.taken)) == len(life.taken)
        works = [set(life.taken) - self.applied.keys() for life in self.lives.values()]
        assert not any(a & b for a, b in combinations(works, 2))

    @invariant()
    def the_settled_are_settled(self) -> None:
        settled, done = self.log.state.settled, self.applied.keys() | self.skipped
        assert all(("", i) in done for i in range(settled)) and ("", settled) not in done

    def teardown(self) -> None:
        """What `diloco.journal tokens` says."""
        state, counts = tally(self.log.entries)
        assert differs(state, counts) is None
        told = Counter({(r, s): n for (r, s, column), n in counts.items() if column == "applied" and n})
        assert told == Counter((region, source or "data") for (source, _), region in self.applied.items())
        for column, samples in (("skip", self.skipped), ("returned", self.pool())):
            told = Counter()
            for (_, source, name), n in counts.items():
                told[source] += n if name == column else 0
            assert +told == Counter(source or "data" for source, _ in samples)


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
