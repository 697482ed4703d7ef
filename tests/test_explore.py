"""The round state machine, explored: every reachable state of small runs, and that planted bugs are found."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from elastic import rounds
from elastic.events import Action, Alarm, SetAlarm, View
from elastic.flight import Flight
from elastic.rounds import Rounds
from tests.explore import explore, walk
from tests.explore_member import Member
from tests.explore_scenarios import LARGER, SCENARIOS, STORM, Scenario

CHOSEN = LARGER if os.environ.get("EXPLORE") == "larger" else SCENARIOS


@pytest.mark.parametrize("scenario", CHOSEN, ids=[scenario.name for scenario in CHOSEN])
def test_no_reachable_state_breaks_the_protocol_or_is_stuck(scenario: Scenario) -> None:
    report = explore(scenario)
    print(report)
    assert not report.violation, "\n".join([report.violation, *report.trace])
    assert report.ends and not report.cut_off and report.states > 150
    assert report.attempts > scenario.crashes + min(scenario.stalls + scenario.partitions, 2) - 1


def test_the_scenarios_hold_three_attempts_in_a_row() -> None:
    assert explore(Scenario("2 failures", stalls=2)).attempts >= 3


@pytest.mark.parametrize("part", range(2))
def test_long_random_schedules_of_all_faults(part: int) -> None:
    rounds = 0
    for seed in range(part, int(os.environ.get("EXPLORE_WALKS", "20")), 2):
        try:
            rounds += walk(STORM, seed, 1500).ends
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert rounds > 50


# Planted bugs: each is found, and by the check that is meant for it


class AppendsEarly(Rounds):
    """Does not wait until all members hold the result."""

    def complete(self, flight: Flight) -> bool:
        return self.me in flight.held.get(flight.attempt, {})

    def _try_append(self, fragment: int, flight: Flight, first: bool = False) -> Iterator[Action]:
        if self.complete(flight):
            yield from self._append(fragment, flight)


class ForgetsThatTheBaseMoved(Rounds):
    """Puts the old snapshot into the fragment's next round, too."""

    def _folded(self, view: View) -> Iterator[Action]:
        for fragment, flight in self.flights.items():
            if flight.base != view.bases[fragment] and flight.answer is not None:
                answer = {**flight.answer, "theta": f"t{view.bases[fragment]}"}
                self.flights[fragment] = Flight(view.epoch, view.bases[fragment], asked=True, answer=answer)
        yield from super()._folded(view)


class TakesUnknownForDone(Member):
    """Does not read back what a create without an answer came to."""

    def unanswered(self, node: int, head: int) -> None:
        fields = self.pending.popleft().fields
        self.poll(self.world.create(node, fields))


class GivesUpForGood(Rounds):
    """Does not propose again."""

    def _alarm(self, alarm: Alarm) -> Iterator[Action]:
        if alarm.name != "again":
            yield from super()._alarm(alarm)


class LeavesItToTheLowest(Rounds):
    """Does not append when the lowest member died after it held the result."""

    def _try_append(self, fragment: int, flight: Flight, first: bool = False) -> Iterator[Action]:
        yield from (a for a in super()._try_append(fragment, flight, first) if not isinstance(a, SetAlarm))


class SaysEverythingOnce(Rounds):
    def _resend(self, fragment: int, flight: Flight) -> Iterator[Action]:
        yield from ()


class StartsAnAttemptAgain(Rounds):
    """Does not mind that it has given the attempt up."""

    def _start(self, message: rounds.Message) -> Iterator[Action]:
        for flight in self.flights.values():
            flight.given_up = False
        yield from super()._start(message)


BUGS = [
    (AppendsEarly, None, Scenario("early append"), "does not hold"),
    (ForgetsThatTheBaseMoved, None, Scenario("base moved", rounds=2), "lost or applied twice|never given"),
    (Rounds, TakesUnknownForDone, Scenario("unknown", unknown=1), "two states at one seq"),
    (GivesUpForGood, None, Scenario("no new attempt", stalls=1), "stuck"),
    (LeavesItToTheLowest, None, Scenario("lowest dies", ("a", "b"), crashes=1), "stuck"),
    (SaysEverythingOnce, None, Scenario("said once", losses=1), "stuck"),
    (StartsAnAttemptAgain, None, Scenario("start twice", crashes=1, repeats=1), "an attempt is exchanged twice"),
]


@pytest.mark.parametrize(("make", "member", "scenario", "found"), BUGS, ids=[bug[2].name for bug in BUGS])
def test_a_planted_bug_is_found(
    make: type[Rounds], member: type[Member] | None, scenario: Scenario, found: str
) -> None:
    report = explore(scenario, make, member)
    print(report, *report.trace, sep="\n")
    assert any(part in report.violation for part in found.split("|")), report.violation or "nothing was found"
    assert report.trace
    sound = explore(scenario)
    assert not sound.violation and sound.ends, "and without the bug, nothing is"
