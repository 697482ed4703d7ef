"""The schedule of tests.bench.chaos: what a seed gives."""

from __future__ import annotations

import pytest

from tests.chaos.schedule import AFTERWARDS, DECK, FETCH, LINKS, MOMENTS, UNHARMED, Fault, schedule

PLACES = ["a", "b", "c", "d"]
HALF_AN_HOUR = 1800.0


def long(seed: int) -> list[Fault]:
    return schedule(seed, HALF_AN_HOUR, PLACES, gap=13.0, restarts=30)


def test_a_seed_is_a_schedule() -> None:
    assert long(1) == long(1) != long(2)


@pytest.mark.parametrize("seed", range(20))
def test_half_an_hour_has_what_it_must(seed: int) -> None:
    """100 faults, of them at most 30 restarts, of every kind and at every moment, spread over the whole time."""
    faults = long(seed)
    restarts = sum(fault.restarts for fault in faults)
    assert len(faults) >= 100 and 15 <= restarts <= 30
    assert {fault.kind for fault in faults} == set(DECK)
    assert {fault.moment for fault in faults} == {*MOMENTS, FETCH}
    assert any(fault.renamed for fault in faults)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert faults[-1].at > 0.9 * HALF_AN_HOUR and all(f.at + f.lasts < HALF_AN_HOUR for f in faults)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("places", [3, 4, 8])
def test_somebody_is_left_alone(seed: int, places: int) -> None:
    """At any time there are two whom no fault touches, and one fault of links at most is under way."""
    names = [f"p{i}" for i in range(places)]
    faults = schedule(seed, 600.0, names, gap=5.0, restarts=50)
    for fault in faults:
        assert set(fault.places) <= set(names)
        under_way = [f for f in faults if f.at <= fault.at < f.at + f.lasts]
        hit = {p for f in under_way for p in (f.places[:1] if f.kind == "cut" else f.places)}
        assert len(names) - len(hit) >= UNHARMED
        links = [f for f in under_way if f.kind in LINKS]
        assert len(links) <= 1


def test_who_was_restarted_is_left_alone_for_a_while() -> None:
    for seed in range(20):
        for first in (f for f in long(seed) if f.kind == "kill" and f.moment != FETCH):
            end = first.at + first.lasts
            again = [f for f in long(seed) if first.at < f.at < end + AFTERWARDS and f.moment != FETCH]
            assert all(first.places[0] not in f.places for f in again if f.kind != "cut")


def test_without_restarts() -> None:
    assert not any(fault.restarts for fault in schedule(3, 600.0, PLACES, gap=5.0, restarts=0))


def test_the_schedule_of_the_test_has_everything() -> None:
    """That of tests/e2e/test_chaos.py."""
    faults = schedule(27, 180.0, PLACES, gap=5.0, restarts=6)
    assert {fault.kind for fault in faults} == set(DECK)
    assert {fault.moment for fault in faults} == {*MOMENTS, FETCH} and any(fault.renamed for fault in faults)
