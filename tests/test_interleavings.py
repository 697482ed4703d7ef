"""Rounds of several fragments in flight: whose turn it is, and that samples count once in whatever order they are committed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.fold import counters, invalid
from diloco.ledger import LeaseReader
from tests.test_journal import Log, answer, check_ledger, joining, leases, opening


def test_fragments_take_turns_with_those_in_flight() -> None:
    """A region that has merged a round and one that has not agree on whose boundary is next."""
    log = Log(opening(rounds=7, fragments=3), joining("eu_1"))
    assert log.state.next_fragment() == 0
    assert log.state.next_fragment([0]) == 1
    assert log.state.next_fragment([0, 1]) == 2
    assert log.state.next_fragment([0, 1, 2]) == 0, "which is in flight: wait"
    log.add(log.round(answer("eu_1"), fragment=1))
    assert log.state.next_fragment([0]) == 2
    assert log.state.next_fragment([0, 2]) == 0
    assert log.state.next_fragment([]) == 0, "who missed it still has its turn"
    for fragment in (0, 2, 0, 1):
        log.add(log.round(answer("eu_1"), fragment=fragment))
    assert log.state.next_fragment([2]) == 0
    assert log.state.next_fragment([2, 0]) is None, "the last two are in flight"


def test_an_answer_may_name_a_lease_that_another_fragments_round_used_up() -> None:
    """Both fragments are snapshotted before either round is committed: the second answer stays valid."""
    log = Log(opening(fragments=2), joining("eu_1"))
    first, second = answer("eu_1", (0, 20)), answer("eu_1", (0, 18))
    log.add(log.round(second, fragment=1))
    state = log.add(log.round(first, fragment=0))
    assert (state.ledger.applied, leases(state, "eu_1")[0]) == (20, (0, 0, 20, 20))
    assert invalid(state, log.round(second, fragment=1)) is None, "fragment 1 is at entry 2, the lease ended at 3"
    state = log.add(log.round(answer("eu_1", (0, 20), (1, 22)), fragment=1))
    assert 0 not in [x.id for x in state.members["eu_1"].leases], "no answer can name it any more"
    assert state.ledger.applied == 22
    log.refuses(log.round(answer("eu_1", (0, 20)), fragment=0), "a lease that it does not hold")


def test_dropped_samples_are_a_running_total() -> None:
    """Said by answers about several fragments, in any order; each counts once, and only as far as samples do."""
    log = Log(opening(fragments=2, tokens=20 * 16), joining("eu_1"))
    early, late = answer("eu_1", (0, 6)) | {"dropped": 2}, answer("eu_1", (0, 10)) | {"dropped": 9}
    state = log.add(log.round(late, fragment=1))
    assert (state.ledger.applied, state.ledger.dropped, state.tokens) == (1, 9, 16)
    assert state.spent == 160 and state.progress(0, 32) == pytest.approx(192 / 320)
    state = log.add(log.round(early, fragment=0))
    assert (state.ledger.applied, state.ledger.dropped) == (1, 9)
    state = log.add(log.round(answer("eu_1", (0, 12)) | {"dropped": 15}, fragment=1))
    assert (state.ledger.applied, state.ledger.dropped) == (1, 11), "two new samples, so two of the six"
    state = log.add(log.round(answer("eu_1", (0, 20)) | {"dropped": 15}, fragment=0))
    assert (state.ledger.applied, state.ledger.dropped) == (5, 15)
    check_ledger(state)
    assert state.finished == "run.tokens=320 reached", "what was dropped was trained on, too"
    assert counters(state)["dropped"] == 15
    for bad in (-1, 0.5, None, "3", True):
        fresh = Log(opening(), joining("eu_1"))
        fresh.refuses(fresh.round(answer("eu_1") | {"dropped": bad}), "no number of dropped samples")


class Region:
    """One member as its loop sees the run: it may lag behind the journal."""

    def __init__(self, member: str, fragments: int) -> None:
        self.member, self.reader = member, LeaseReader()
        self.seen = 0
        self.taken: list[int] = []
        """Samples, in the order in which they were trained on."""
        self.snapshots: dict[int, tuple[int, int, dict[str, Any]]] = {}
        """Fragment in flight -> (base, len(taken) then, answer)."""


INTERLEAVINGS = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "snapshot", "snapshot", "commit", "commit", "read"]),
        st.integers(0, 1),
        st.integers(0, 2),
        st.integers(1, 3),
    ),
    min_size=30,
    max_size=60,
)


@given(INTERLEAVINGS, st.integers(1, 3))
@settings(deadline=None, max_examples=300)
def test_a_sample_counts_at_the_first_round_that_covers_it_and_never_again(actions: list, fragments: int) -> None:
    """Two regions, up to three fragments in flight, committed in any order by any subset of those who answered, while the
    loops lag behind: every round is valid, and what is applied is what the used contributions cover, once."""
    log = Log(opening(fragments=fragments, ahead=4, lease_rounds=1000), joining("eu_1"), joining("us_1"))
    states = {log.state.seq: log.state}
    regions = [Region(member, fragments) for member in ("eu_1", "us_1")]
    covered: set[int] = set()

    def read(region: Region, upto: int) -> None:
        while region.seen < upto:
            region.seen += 1
            for f, (base, _, _) in list(region.snapshots.items()):
                if states[region.seen].fragments[f].base != base:
                    del region.snapshots[f]
            region.reader.update(states[region.seen].members[region.member].leases)

    for region in regions:
        region.seen = log.state.seq - 1
        read(region, log.state.seq)
    for kind, who, fragment, much in actions:
        region, f = regions[who], fragment % fragments
        if kind == "step":
            region.taken += region.reader.take(min(2 * much, region.reader.available()))
        elif kind == "snapshot" and f not in region.snapshots:
            fields = answer(region.member, *map(tuple, region.reader.claims()))
            region.snapshots[f] = (states[region.seen].fragments[f].base, len(region.taken), fields)
        elif kind == "commit":
            base = log.state.fragments[f].base
            ready = [r for i, r in enumerate(regions) if much >> i & 1 and r.snapshots.get(f, (-1,))[0] == base]
            if not ready:
                continue
            for r in ready:
                covered.update(r.taken[: r.snapshots[f][1]])
            log.add(log.round(*(r.snapshots[f][2] for r in ready), fragment=f))
            states[log.state.seq] = log.state
            assert log.state.ledger.applied == len(covered)
            for r in ready:  # that its own contribution was used it knows before it answers about the fragment again
                read(r, log.state.seq)
        elif kind == "read":
            read(region, min(region.seen + much, log.state.seq))
        check_ledger(log.state)
    for region in regions:
        assert len(set(region.taken)) == len(region.taken), "trained on once"
        done = [x for x in log.state.members[region.member].leases if not x.left]
        assert all(x.done > min(f.base for f in log.state.fragments) for x in done), "nothing is kept for ever"
