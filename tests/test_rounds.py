"""The round state machines: several members against the journal's own rules under seeded schedules of faults, and single
machines in the situations that once went wrong."""

from __future__ import annotations

import os
from typing import Any

import pytest

from elastic import rounds
from elastic.events import Alarm, Received, View
from elastic.proposal import Proposal
from elastic.rounds import Rounds
from tests.rounds_world import simulate

SEEDS = int(os.environ.get("ROUNDS_SEEDS", "3000"))


@pytest.mark.parametrize("part", range(4))
def test_any_schedule_commits_once_and_goes_on(part: int) -> None:
    commits = 0
    for seed in range(part, SEEDS, 4):
        try:
            commits += simulate(seed).head.rounds
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert commits > SEEDS  # the schedules do let rounds happen


# Single machines


def machine(*members: str, seq: int = 3) -> Rounds:
    """`a`, in a run of `members` that are all connected."""
    one = Rounds("a")
    one.handle(view(*members, seq=seq))
    for member in members[1:]:
        one.handle(rounds.PeerSeen(member, frozenset(members)))
    return one


def view(*members: str, seq: int = 3, base: int = 0) -> View:
    return View(seq, 0, (base,), members)


ANSWER = {"tokens": 1, "leases": [[0, 1]], "theta": "t", "momentum": "m"}


def holding(*members: str) -> tuple[Rounds, list[rounds.Action]]:
    """`a` holds the result of its own proposal; what it does as all the others say so too."""
    one = machine(*members)
    one.handle(rounds.Due(0))
    actions = one.handle(rounds.Answered(0, 0, 0, ANSWER))
    best = one.flights[0].best
    assert best is not None and best.members == members
    for member in members[1:]:
        actions += one.handle(Received(member, best.message("answer", answer={**ANSWER, "member": member})))
    attempt = one.flights[0].attempt
    assert [a.attempt for a in actions if isinstance(a, rounds.Exchange)] == [attempt]
    actions = one.handle(rounds.Exchanged(attempt, "d"))
    for member in members[1:]:
        assert not any(isinstance(a, rounds.Append) for a in actions)
        actions += one.handle(Received(member, best.message("held", attempt=attempt, digest="d")))
    return one, actions


def kinds(actions: list[rounds.Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_the_lowest_member_appends_once_everybody_holds() -> None:
    one, actions = holding("a", "b", "c")
    (append,) = [a for a in actions if isinstance(a, rounds.Append)]
    assert [a["member"] for a in append.fields["answers"]] == ["a", "b", "c"]
    assert "theta" not in append.fields["answers"][0] and append.fields["theta"] == "t"
    assert kinds(one.handle(view("a", "b", "c", seq=4, base=4))) == ["Cancel"] and not one.flights


def test_an_entry_that_the_journal_refuses_is_not_tried_again_at_the_same_head() -> None:
    one, _ = holding("a", "b")
    assert kinds(one.handle(view("a", "b"))) == []
    assert kinds(one.handle(view("a", "b", seq=4))) == ["Append"]  # somebody else's entry came first


def test_a_held_round_is_given_up_when_a_member_of_it_ends() -> None:
    one, _ = holding("a", "b")
    assert kinds(one.handle(view("a", "b2", seq=4))) == ["Cancel", "Read", "SetAlarm"]
    assert kinds(one.handle(view("a", "b2", seq=4))) == []  # what that Read comes back with
    one.handle(rounds.PeerGone("b"))
    one.handle(rounds.PeerSeen("b2", frozenset(["a"])))
    actions = one.handle(Alarm("again", 0, one.flights[0].turn))
    assert [a.member for a in actions if isinstance(a, rounds.Send)] == ["b2"]
    assert one.flights[0].best is not None and one.flights[0].best.number == 2


def blamed(*suspects: str) -> Rounds:
    """`a` was in an attempt with b and c that failed."""
    one = machine("a", "b", "c")
    one.handle(rounds.Due(0))
    one.handle(rounds.Answered(0, 0, 0, ANSWER))
    best = one.flights[0].best
    assert best is not None
    for member in ("b", "c"):
        one.handle(Received(member, best.message("answer", answer={**ANSWER, "member": member})))
    one.handle(rounds.ExchangeFailed(one.flights[0].attempt, frozenset(suspects)))
    return one


def test_who_stalled_is_left_out_of_the_next_proposal() -> None:
    one = blamed("c")
    actions = one.handle(Alarm("again", 0, one.flights[0].turn))
    assert [a.member for a in actions if isinstance(a, rounds.Send)] == ["b"]


def test_who_stalled_is_proposed_with_if_too_few_are_left() -> None:
    one = blamed("b", "c")
    actions = one.handle(Alarm("again", 0, one.flights[0].turn))
    assert [a.member for a in actions if isinstance(a, rounds.Send)] == ["b", "c"]


def test_who_stalled_is_unheard_once_and_a_third_ones_proposal_with_it_is_heard() -> None:
    one = blamed("c")
    own = Proposal(0, 0, 0, 3, 5, "c", ("a", "b", "c")).message("propose")
    assert kinds(one.handle(Received("c", own))) == ["Read", "SetAlarm"] and one.flights[0].number == 5
    (answer,) = one.handle(Received("c", own))
    assert isinstance(answer, rounds.Send) and answer.message["type"] == "answer"

    one = blamed("c")
    other = Proposal(0, 0, 0, 3, 5, "b", ("a", "b", "c")).message("propose")
    (answer,) = one.handle(Received("b", other))
    assert isinstance(answer, rounds.Send) and (answer.member, answer.message["type"]) == ("b", "answer")


def test_a_start_that_arrives_again_after_the_attempt_was_given_up_starts_nothing() -> None:
    """Found by tests/explore.py: a's boundary; b answers; b gets `start` twice, and a is gone in between."""
    one = machine("a", "b")
    best = Proposal(0, 0, 0, 3, 1, "b", ("a", "b"))
    one.handle(Received("b", best.message("propose")))
    one.handle(rounds.Answered(0, 0, 0, ANSWER))
    answers = [{**ANSWER, "member": member} for member in ("a", "b")]
    start = Received("b", best.message("start", answers=answers))
    assert kinds(one.handle(start)) == ["Exchange"] and kinds(one.handle(start)) == []
    assert kinds(one.handle(rounds.PeerGone("b"))) == ["Cancel", "Read", "SetAlarm"]
    assert kinds(one.handle(start)) == []


def resend(one: Rounds) -> list[tuple[str, str]]:
    actions = one.handle(Alarm("resend", 0, one.flights[0].turn))
    assert kinds(actions)[-1:] == ["SetAlarm"]
    return [(a.member, a.message["type"]) for a in actions if isinstance(a, rounds.Send)]


def test_what_may_have_been_lost_is_said_again_to_those_who_have_not_answered_it() -> None:
    one = machine("a", "b", "c")
    one.handle(rounds.Due(0))
    one.handle(rounds.Answered(0, 0, 0, ANSWER))
    best = one.flights[0].best
    assert best is not None and resend(one) == [("b", "propose"), ("c", "propose")]
    one.handle(Received("b", best.message("answer", answer={**ANSWER, "member": "b"})))
    assert resend(one) == [("c", "propose")]
    one.handle(Received("c", best.message("answer", answer={**ANSWER, "member": "c"})))
    assert resend(one) == [("b", "start"), ("c", "start")]
    attempt = one.flights[0].attempt
    one.handle(rounds.Exchanged(attempt, "d"))
    one.handle(Received("c", best.message("held", attempt=attempt, digest="d")))
    assert resend(one) == [("b", "held")]
    one.handle(rounds.PeerGone("b"))
    assert one.handle(Alarm("resend", 0, one.flights[0].turn)) == [], "given up: there is nothing to say"


def minority(durable: bool = True) -> tuple[Rounds, list[rounds.Action]]:
    """`a`, cut off from the others of five, holds the result of an attempt with b."""
    one = Rounds("a", durable=durable)
    one.handle(view("a", "b", "c", "d", "e"))
    actions = one.handle(rounds.PeerSeen("b", frozenset("a"))) + one.handle(rounds.Due(0))
    assert kinds(actions) == ["SetAlarm"], "it waits before it proposes"
    one.handle(Alarm("minority", 0, "3"))
    one.handle(rounds.Answered(0, 0, 0, ANSWER))
    best = one.flights[0].best
    assert best is not None and best.members == ("a", "b")
    actions = one.handle(Received("b", best.message("answer", answer={**ANSWER, "member": "b"})))
    (exchange,) = [a for a in actions if isinstance(a, rounds.Exchange)]
    assert exchange.store
    one.handle(rounds.Exchanged(exchange.attempt, "d"))
    return one, one.handle(Received("b", best.message("held", attempt=exchange.attempt, digest="d")))


@pytest.mark.parametrize("durable", [True, False])
def test_a_minority_waits_again_after_every_entry_and_stores_before_it_appends(durable: bool) -> None:
    one, actions = minority(durable)
    assert kinds(actions) == ["Append"]
    alarm = Alarm("minority", 0, "4")
    assert one.handle(view("a", "b", "c", "d", "e", seq=4)) == [rounds.SetAlarm(alarm, "minority")]
    assert kinds(one.handle(Alarm("append", 0, one.flights[0].attempt))) == ["SetAlarm"], "however long it took"
    assert kinds(one.handle(alarm)) == ["Append"]


def test_a_minoritys_attempt_gives_way_to_a_majoritys() -> None:
    """Found by seed 36 of the simulation: a and b hold a result, c is back, and the entries of the other fragment, which all
    three commit, came faster than the wait. It starved, and with it the fragment: its number was the highest."""
    one, _ = minority()
    one.handle(rounds.PeerSeen("b", frozenset(("a", "c"))))
    one.handle(rounds.PeerSeen("c", frozenset(("a", "b"))))
    assert kinds(one.handle(view("a", "b", "c", "d", "e", seq=4))) == ["Cancel", "Read", "SetAlarm"]
    actions = one.handle(Alarm("again", 0, one.flights[0].turn))
    assert [a.member for a in actions if isinstance(a, rounds.Send)] == ["b", "c"]


def test_only_a_minority_has_to_store_what_the_run_does_not_want_stored() -> None:
    one, _ = holding("a", "b")
    assert one.flights[0].store
    one = Rounds("a", durable=False)
    one.handle(view("a"))
    one.handle(rounds.Due(0))
    actions = one.handle(rounds.Answered(0, 0, 0, ANSWER))
    assert [a.store for a in actions if isinstance(a, rounds.Exchange)] == [False]
    attempt = one.flights[0].attempt
    joined = view("a", "b", "c", seq=4)
    assert kinds(one.handle(joined)) == []
    assert kinds(one.handle(rounds.Exchanged(attempt, "d")))[-1:] == ["SetAlarm"], "now it is a minority's: it waits"
    actions = one.handle(Alarm("minority", 0, "4"))
    assert "Append" not in kinds(actions) and one.flights[0].given_up, "nobody else could get its bits"


def test_nothing_is_proposed_or_committed_while_the_run_is_paused() -> None:
    one, _ = holding("a", "b")
    paused = View(4, 0, (0,), ("a", "b"), paused=True)
    assert kinds(one.handle(paused)) == []
    assert kinds(one.handle(Alarm("append", 0, one.flights[0].attempt))) == ["SetAlarm"]
    assert kinds(one.handle(view("a", "b", seq=5))) == ["Append"], "what all hold is committed when it goes on"
    one = machine("a", "b")
    one.handle(paused)
    assert kinds(one.handle(rounds.Due(0))) == []
    assert "Send" in kinds(one.handle(view("a", "b", seq=5)))


def test_a_head_that_cannot_be_read_is_asked_for_once() -> None:
    one = machine("a", "b")
    assert kinds(one.handle(Received("b", {"type": "head", "head": 10**9}))) == ["Read"]
    assert kinds(one.handle(view("a", "b"))) == []
    for _ in range(3 * rounds.AHEAD):
        one.handle(Received("b", {"type": "head", "head": 10**9}))
    assert len(one.ahead) <= rounds.AHEAD + 1


def test_messages_of_a_member_that_is_gone_do_not_come_to_life() -> None:
    one = machine("a", "b")
    proposal = Proposal(0, 0, 0, 4, 1, "b", ("a", "b"))
    one.handle(Received("b", proposal.message("propose")))
    one.handle(rounds.PeerGone("b"))
    assert kinds(one.handle(view("a", "b", seq=4))) == [] and not one.flights


def test_a_boundary_that_a_commit_has_overtaken_is_void() -> None:
    one = machine("a", "b")
    assert one.handle(rounds.Due(0, base=-7)) == [] and not one.flights[0].due
    assert "Ask" in kinds(one.handle(rounds.Due(0, base=0)))


def test_an_answer_of_a_stranger_changes_nothing() -> None:
    one = machine("a", "b")
    one.handle(rounds.Due(0, base=0))
    best = one.flights[0].best
    assert best is not None
    one.handle(Received("x", best.message("answer", answer={**ANSWER, "member": "x"})))
    assert not one.flights[0].answers


@pytest.mark.parametrize(
    "change",
    [
        {"fragment": "0"},
        {"epoch": None},
        {"base": 1.0},
        {"number": float("inf")},
        {"head": "9"},
        {"head": float("nan")},
        {"members": None},
        {"members": ["b", "a"]},
        {"members": ["a", "a"]},
        {"members": []},
        {"type": None},
        {"answers": 7},
        {"answers": [None]},
        {"answers": [{}]},
        {"answers": [{**ANSWER, "member": "a", "tokens": "1"}]},
        {"answers": [{**ANSWER, "member": "a", "tokens": -64}]},
        {"answers": [{**ANSWER, "member": "a", "tokens": 10**400}]},
        {"answers": [{**ANSWER, "member": "a", "up": 1 << 63}]},
        {"answers": [{**ANSWER, "member": "a", "norm": 10**400}]},
        {"answers": [{**ANSWER, "member": "a", "norm": float("nan")}]},
        {"answers": [{**ANSWER, "member": "a", "leases": [[0, -1]]}]},
        {"answers": [{**ANSWER, "member": "a", "leases": [[1]]}]},
        {"answers": [{**ANSWER, "member": "a", "leases": [["x", 1]]}]},
        {"answers": [{**ANSWER, "member": "a", "theta": None}]},
        {"answers": [{**ANSWER, "member": ["a"]}]},
    ],
)
@pytest.mark.parametrize("head", [3, 99])
def test_malformed_messages_are_refused_when_they_come_and_not_later(change: dict[str, Any], head: int) -> None:
    one = machine("a", "b")
    message = Proposal(0, 0, 0, head, 1, "b", ("a", "b")).message("start", answers=[])
    for key in change.keys() - {"type", "answers"}:
        message["type"] = "propose"
        message[key] = None
    if change == {"type": None}:
        del message["type"]
    else:
        message |= change
    with pytest.raises((KeyError, TypeError, ValueError)):
        one.handle(Received("b", message))
    assert not one.ahead and not one.flights
    one.handle(view("a", "b", seq=100))
