"""A region's counters and its merges: progress never goes back, work is in one contribution or still to come."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.clock import Clock, Stamp
from diloco.ledger import LeaseReader
from diloco.merging import mix, progress, rebase, rounding_seed
from tests.test_journal import Log, answer, joining, opening


def test_golden_story() -> None:
    """Two fragments, two steps between boundaries; the second contribution to fragment 0 is left out of its round."""
    clock = Clock(2)

    def steps(count: int) -> None:
        for _ in range(count):
            clock.step(10)

    steps(2)
    first = clock.snapshot(0, 2)
    assert first == Stamp(at=2, gap=2, steps=2, tokens=20) and clock.since == 0
    steps(2)
    second = clock.snapshot(1, 2)
    assert second == Stamp(at=4, gap=2, steps=4, tokens=40)
    steps(1)
    assert clock.own_rounds([first, second], 2) == 2.5
    clock.used(0, first)
    assert clock.work == [[3, 30], [5, 50]] and clock.own_rounds([second], 2) == 1.5
    steps(1)
    third = clock.snapshot(0, 2)
    assert third == Stamp(at=6, gap=2, steps=4, tokens=40)
    steps(1)
    assert clock.work == [[5, 50], [7, 70]], "its round went by without it: nothing is lost"
    clock.missed()
    assert clock.since == 0


def test_after_a_restart_what_was_in_flight_is_due_at_once() -> None:
    clock = Clock(2)
    for _ in range(3):
        clock.step(10)
    stamp = clock.snapshot(0, 3)
    clock.step(10)
    clock.dropped = 7.5
    saved = json.loads(json.dumps(clock.save(in_flight=1, counted=5)))
    again = Clock(2)
    again.load(saved)
    assert (again.steps, again.since, again.overdue, again.dropped) == (4, 1, 1, 2.5)
    assert again.own_rounds([], 3) == clock.own_rounds([stamp], 3) == pytest.approx(4 / 3)
    late = again.snapshot(0, 3)
    assert late == Stamp(at=4, gap=3, steps=4, tokens=40), "with all that came after the one that was thrown away"
    assert (again.since, again.overdue) == (1, 0), "and the next boundary where it was"
    again.start_over()
    assert (again.steps, again.since, again.work, again.dropped) == (4, 0, [[0, 0], [0, 0]], 0.0)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["step", "step", "step", "commit", "others"]), st.integers(0, 2)),
    min_size=40,
    max_size=80,
)


@given(ACTIONS, st.integers(1, 3), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=200)
def test_progress_never_goes_back(actions: list, fragments: int, by_tokens: bool, restart: bool) -> None:
    """Of a member with several fragments in flight, whatever is committed when, its own contributions used or left out. Every
    token is in one used contribution to a fragment at most."""
    limit: dict[str, Any] = {"tokens": 16 * 500} if by_tokens else {"rounds": 50}
    log = Log(opening(fragments=fragments, sync_every=6, ahead=100, lease_rounds=1000, **limit))
    log.add(joining("eu_1", 1)), log.add(joining("us_1", 1))
    clock, reader, interval = Clock(fragments), LeaseReader(), log.state.sync_interval
    reader.update(log.state.members["eu_1"].leases)
    in_flight: dict[int, tuple[Stamp, dict]] = {}
    used, last = [0] * fragments, 0.0
    for kind, which in actions:
        due = log.state.next_fragment(in_flight)
        boundary = clock.overdue > 0 or clock.since >= interval
        if kind == "others" and log.state.finished is None:
            if in_flight.pop(which % fragments, None) is None:
                clock.missed()
            theirs = log.state.members["us_1"].leases[0]
            log.add(log.round(answer("us_1", (theirs.id, theirs.applied + 1)), fragment=which % fragments))
        elif boundary and due is not None and due not in in_flight and clock.work[due][0]:
            stamp = clock.snapshot(due, interval)
            in_flight[due] = stamp, answer("eu_1", *map(tuple, reader.claims()), tokens=stamp.tokens)
        elif kind == "step":
            reader.take(1)
            clock.step(16)
        elif kind == "commit" and which % fragments in in_flight and log.state.finished is None:
            stamp, mine = in_flight.pop(which % fragments)
            used[which % fragments] += stamp.tokens
            log.add(log.round(mine, fragment=which % fragments))
            clock.used(which % fragments, stamp)
        reader.update(log.state.members["eu_1"].leases)
        stamps = [stamp for stamp, _ in in_flight.values()]
        now = log.state.progress(clock.own_rounds(stamps, interval), reader.pending * 16)
        assert now >= last - 1e-9
        if restart and kind == "commit":
            clock.load(json.loads(json.dumps(clock.save(len(in_flight), 0))))
            in_flight.clear()
            assert log.state.progress(clock.own_rounds([], interval), reader.pending * 16) == pytest.approx(now)
        last = now
        assert all(tokens + done == 16 * clock.steps for (_, tokens), done in zip(clock.work, used, strict=True))


# Merging


def test_rebase_keeps_what_was_done_since() -> None:
    x, theta, snapshot = torch.tensor([1.0, 5.0]), torch.tensor([10.0, 20.0]), torch.tensor([0.5, 7.0])
    assert rebase(theta, progress(x, snapshot)).tolist() == [10.5, 18.0]
    assert theta.tolist() == [10.0, 20.0] and snapshot.tolist() == [0.5, 7.0]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_mix_is_the_papers_formula(alpha: float) -> None:
    x, theta = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    got = mix(torch.from_numpy(x.copy()), torch.from_numpy(theta), alpha).numpy()
    assert np.array_equal(got, np.float32(alpha) * x + np.float32(1 - alpha) * theta)


def test_seeds_differ_and_stay() -> None:
    places = [(s, f, n, r) for s in range(3) for f in range(3) for n in range(3) for r in ("eu", "us")]
    seeds = {rounding_seed(*place) for place in places}
    assert len(seeds) == len(places) and all(0 <= seed < 2**63 for seed in seeds)
    assert rounding_seed(0, 1, 2, "eu") == 8159732248708290585
