"""The ledger: every sample is handed out once, and is applied, dropped, leased or returned at any time."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diloco.ledger import Lease, LeaseReader, Ledger, Returned, still_wanted

REGIONS = ("asia", "eu", "us")
regions = st.sampled_from(REGIONS)


def samples(leases: tuple[Lease, ...]) -> list[int]:
    """What is not applied yet, in the order in which it is used."""
    return [i for lease in leases for i in range(lease.applied, lease.stop)]


class AnyInterleaving(RuleBasedStateMachine):
    """The ledger beside a model that keeps a set of single samples for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.leases: dict[str, tuple[Lease, ...]] = dict.fromkeys(REGIONS, ())
        self.applied: set[int] = set()
        self.returned: dict[int, str] = {}
        self.ids: set[int] = set()
        self.seq = 0

    @rule(region=regions, count=st.integers(-3, 30))
    def grant(self, region: str, count: int) -> None:
        own = sorted(i for i, owner in self.returned.items() if owner == region)
        others = sorted(i for i, owner in self.returned.items() if owner != region)
        fresh = range(self.ledger.cursor, self.ledger.cursor + max(count, 0))
        expected = [*own, *others, *fresh][: max(count, 0)]
        self.ledger, new = self.ledger.grant(region, count)
        assert samples(new) == expected
        assert all(lease.applied == lease.start < lease.stop for lease in new)
        assert not self.ids & {lease.id for lease in new}, "an id is never used again"
        self.ids |= {lease.id for lease in new}
        for i in expected:
            self.returned.pop(i, None)
        self.leases[region] += new

    @rule(region=regions, data=st.data())
    def apply(self, region: str, data: st.DataObject) -> None:
        leases = self.leases[region]
        chosen = [lease for lease in leases if data.draw(st.booleans())]
        used = {lease.id: data.draw(st.integers(0, lease.stop)) for lease in chosen}
        newly = {i for lease in chosen for i in range(lease.applied, used[lease.id])}
        left = [i for i in samples(leases) if i not in newly]
        dropped, before, self.seq = data.draw(st.integers(0, 9)), self.ledger, self.seq + 1
        self.ledger, self.leases[region], count = self.ledger.apply(leases, used, self.seq, dropped)
        assert count == len(newly) and not newly & self.applied, "never twice"
        assert self.ledger.dropped - before.dropped == min(dropped, count)
        assert samples(self.leases[region]) == left
        over = {lease.id: lease.done for lease in self.leases[region] if not lease.left}
        assert over == {x.id: x.done or self.seq for x in leases if x.id in over}, "with the seq at which that happened"
        self.applied |= newly

    @rule(region=regions, back=st.integers(0, 3))
    def forget(self, region: str, back: int) -> None:
        before = self.leases[region]
        self.leases[region] = still_wanted(before, self.seq - back)
        assert self.leases[region] == tuple(x for x in before if x.left or x.done > self.seq - back)

    @rule(region=regions)
    def give_back(self, region: str) -> None:
        """The region leaves."""
        for i in samples(self.leases[region]):
            self.returned[i] = region
        self.ledger, self.leases[region] = self.ledger.give_back(region, self.leases[region]), ()

    @invariant()
    def every_sample_is_somewhere_once(self) -> None:
        leased = [i for leases in self.leases.values() for i in samples(leases)]
        pool = [i for r in self.ledger.pool for i in range(r.start, r.stop)]
        assert self.ledger.cursor == self.ledger.applied + self.ledger.dropped + len(leased) + len(pool)
        assert self.ledger.applied + self.ledger.dropped == len(self.applied)
        assert sorted([*leased, *pool, *self.applied]) == list(range(self.ledger.cursor)), "no overlap, no gap"
        owners = {i: r.region for r in self.ledger.pool for i in range(r.start, r.stop)}
        assert owners == self.returned
        assert all(r.start < r.stop for r in self.ledger.pool)


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_golden_story() -> None:
    """eu trains on part of its leases and dies; us gets fresh samples only because eu's own come back to eu first."""
    ledger, eu = Ledger().grant("eu", 10)
    ledger, us = ledger.grant("us", 10)
    assert (eu, us) == ((Lease(0, 0, 10, 0),), (Lease(1, 10, 20, 10),))
    ledger, eu, count = ledger.apply(eu, {0: 4}, seq=3)
    assert (count, ledger.applied, eu) == (4, 4, (Lease(0, 0, 10, 4),))
    ledger, eu, count = ledger.apply(eu, {0: 3}, seq=4)
    assert (count, ledger.applied) == (0, 4), "less than before takes nothing back"
    ledger = ledger.give_back("eu", eu).give_back("us", us)
    assert ledger.pool == (Returned("eu", 4, 10), Returned("us", 10, 20))
    ledger, us = ledger.grant("us", 12)
    assert us == (Lease(2, 10, 20, 10), Lease(3, 4, 6, 4))
    ledger, eu = ledger.grant("eu", 6)
    assert eu == (Lease(4, 6, 10, 6), Lease(5, 20, 22, 20))
    assert ledger == Ledger(cursor=22, next_id=6, applied=4, pool=())
    ledger, eu, count = ledger.apply(eu, {4: 10, 5: 21}, seq=7, dropped=3)
    assert (count, ledger.applied, ledger.dropped) == (5, 6, 3)
    assert eu == (Lease(4, 6, 10, 10, done=7), Lease(5, 20, 22, 21))
    assert still_wanted(eu, 6) == eu and still_wanted(eu, 7) == eu[1:]
    assert ledger.give_back("eu", eu).pool == (Returned("eu", 21, 22),)


def test_what_a_region_had_comes_back_in_order() -> None:
    """Also if it was returned in another order."""
    ledger, first = Ledger().grant("eu", 3)
    ledger, second = ledger.grant("eu", 3)
    ledger, _ = ledger.grant("us", 2)
    ledger = ledger.give_back("eu", second).give_back("eu", first)
    _, again = ledger.grant("eu", 7)
    assert samples(again) == [0, 1, 2, 3, 4, 5, 8]


# A member's own place


def test_reader_takes_in_order_and_claims_what_it_took() -> None:
    reader = LeaseReader()
    reader.update((Lease(7, 100, 103, 101), Lease(9, 20, 25, 20)))
    assert reader.available() == 7 and reader.claims() == []
    assert reader.take(1) == [101]
    assert reader.claims() == [[7, 102]]
    assert reader.take(3) == [102, 20, 21]
    assert reader.claims() == [[7, 103], [9, 22]]
    with pytest.raises(ValueError, match="4 samples asked of leases that hold 3"):
        reader.take(4)
    assert reader.claims() == [[7, 103], [9, 22]], "a refusal takes nothing"
    # A round applied what was claimed and granted more; the place in lease 9 stays.
    reader.update((Lease(9, 20, 25, 22), Lease(11, 40, 42, 40)))
    assert reader.claims() == [] and reader.available() == 5
    assert reader.take(5) == [22, 23, 24, 40, 41]


def test_reader_keeps_its_place_when_its_contribution_was_not_used() -> None:
    reader = LeaseReader()
    lease = Lease(0, 0, 10, 0)
    reader.update((lease,))
    reader.take(4)
    reader.update((lease,))
    assert reader.take(1) == [4] and reader.claims() == [[0, 5]]


def test_reader_forgets_leases_that_it_lost() -> None:
    reader = LeaseReader()
    reader.update((Lease(0, 0, 10, 0),))
    reader.take(4)
    reader.update((Lease(1, 0, 10, 0),))
    assert reader.claims() == [] and reader.take(2) == [0, 1]


@pytest.mark.parametrize(
    ("taken", "leases", "then"),
    [
        ([], [(7, 9)], [7, 8]),
        ([[3, 5]], [(3, 9)], [5, 6, 7, 8]),
        ([[3, 5]], [(3, 5), (20, 22)], [20, 21]),
        ([[3, 9]], [(3, 5), (5, 11)], [9, 10]),
        ([[20, 22], [3, 5]], [(3, 5), (20, 24)], [22, 23]),
        ([[3, 5]], [(4, 9)], None),
        ([[3, 5]], [(2, 9)], None),
        ([[3, 5]], [(9, 12)], None),
        ([[3, 5], [8, 9]], [(3, 9)], None),
    ],
)
def test_reader_goes_on_where_it_was_before_a_restart(taken: list, leases: list, then: list[int] | None) -> None:
    """Where the samples that were taken are the first of the leases; otherwise it says so and marks nothing."""
    reader = LeaseReader()
    reader.update(tuple(Lease(i, start, stop, start) for i, (start, stop) in enumerate(leases)))
    assert reader.resume(taken) is (then is not None)
    expected = then or [i for start, stop in leases for i in range(start, stop)]
    assert reader.take(len(expected)) == expected and reader.available() == 0
    assert reader.pending == sum(stop - start for start, stop in leases)


def test_what_was_taken_survives_a_restart() -> None:
    """Used, partly applied, returned, granted again: what is trained on is every sample once."""
    ledger, leases = Ledger().grant("eu", 5)
    ledger, more = ledger.grant("eu", 5)
    reader = LeaseReader()
    reader.update(leases + more)
    seen = reader.take(4)
    ledger, leases, _ = ledger.apply(leases + more, dict(map(tuple, reader.claims())), seq=3)
    reader.update(leases)
    seen += reader.take(3)
    assert reader.ranges() == [[4, 5], [5, 7]] and reader.pending == 3
    ledger, again = ledger.give_back("eu", leases).grant("eu", 10)
    after = LeaseReader()
    after.update(again)
    assert after.resume(reader.ranges())
    seen += after.take(5)
    assert seen == list(range(12))


class AnyReading(RuleBasedStateMachine):
    """Reader and ledger together: between grants and losses of contributions no sample is trained on twice."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.leases = Ledger().grant("eu", 12)
        self.reader = LeaseReader()
        self.reader.update(self.leases)
        self.taken: list[int] = []

    @rule(count=st.integers(0, 8))
    def step(self, count: int) -> None:
        if count <= self.reader.available():
            self.taken += self.reader.take(count)

    @rule(used=st.booleans(), other=st.integers(0, 5))
    def round(self, used: bool, other: int) -> None:
        claims = dict(map(tuple, self.reader.claims())) if used else {}
        self.ledger, left, _ = self.ledger.apply(self.leases, claims, seq=1)
        self.ledger, _ = self.ledger.grant("us", other)
        self.ledger, more = self.ledger.grant("eu", 12 - sum(lease.left for lease in left))
        self.leases = left + more
        self.reader.update(self.leases)
        if used:
            assert self.ledger.applied == len(self.taken), "all that was trained on counts, once"
            assert self.reader.claims() == []

    @invariant()
    def no_sample_twice(self) -> None:
        assert len(set(self.taken)) == len(self.taken)
        assert self.reader.available() == 12 - (len(self.taken) - self.ledger.applied)


TestAnyReading = AnyReading.TestCase
TestAnyReading.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
