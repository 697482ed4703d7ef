"""`set`: settings, pauses and expulsions in the fold, and what becomes of rounds in flight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from diloco.settings import LIVE, changed, wrong
from elastic.events import Alarm, Answered, Append, Exchange, Exchanged, Received, Send, SetAlarm, View
from elastic.proposal import Proposal
from elastic.rounds import Rounds
from tests.test_journal import SETTINGS, Log, answer, check_ledger, counters, joining, leases, opening, two_regions


def setting(**changes: Any) -> dict[str, Any]:
    """Keys with _ for the dot."""
    return {"kind": "set", "settings": {key.replace("_", ".", 1): value for key, value in changes.items()}}


def test_settings_hold_from_the_next_entry_on() -> None:
    log = two_regions()
    state = log.add(setting(outer_lr=0.5, outer_momentum=0, run_rounds=2, run_tokens=10**6, outer_boundary="first"))
    expected = replace(SETTINGS, lr=0.5, momentum=0, rounds=2, tokens=10**6, boundary="first")
    assert state.settings == expected and state.rules == 0
    log.add(log.round(answer("eu_1")))
    log.add(log.round(answer("eu_1")))
    log.refuses(log.round(answer("eu_1")), "run.rounds=2 reached")
    assert log.add(setting(run_rounds=None)).settings.rounds is None
    log.add(log.round(answer("eu_1")))


def test_leases_follow_h() -> None:
    log = two_regions()
    state = log.add(setting(outer_sync_every=9))
    assert (state.settings.sync_every, state.settings.ahead) == (9, 15)
    assert leases(state, "eu_1") == [(0, 0, 20, 0), (2, 40, 50, 40)], "enough for 15 steps, at once"
    assert log.add(setting(outer_sync_every=4)).settings == SETTINGS, "and back"
    check_ledger(log.state)


BAD = [
    ("outer.lr", 0), ("outer.lr", "fast"), ("outer.lr", None), ("outer.lr", 1e7), ("outer.momentum", 1), ("outer.momentum", -0.1),
    ("outer.sync_every", 3), ("outer.sync_every", 0), ("outer.sync_every", 4.0), ("outer.sync_every", True),
    ("outer.boundary", "never"), ("run.rounds", 0), ("run.tokens", -1), ("run.tokens", 1.5), ("elastic.max_norm_ratio", 0.5),
    ("elastic.max_norm_ratio", -1), ("outer.lr", True),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD)
def test_bad_values_name_key_value_and_fix(key: str, value: Any) -> None:
    reason = wrong({key: value}, 2) or ""
    assert reason.startswith(f"{key}={value}: set it to"), reason
    log = Log(opening(fragments=2), joining("eu_1"))
    log.refuses({"kind": "set", "settings": {key: value}}, "set it to")


def test_other_keys_and_other_entries_are_refused() -> None:
    log = two_regions()
    log.refuses({"kind": "set", "settings": {"inner.lr": 1}}, "inner.lr cannot be set")
    log.refuses({"kind": "set", "settings": {}}, "nothing is set")
    log.refuses({"kind": "set"}, "a set is of")
    log.refuses({"kind": "set", "paused": True, "expel": "eu"}, "a set is of")
    log.refuses({"kind": "set", "paused": 1}, "on or off")
    log.refuses({"kind": "set", "expel": ["eu"]}, "has a name")
    log.refuses({"kind": "set", "admit": "eu"}, "not expelled")
    assert {changed(SETTINGS, {"outer.lr": 0.1}).lr} == {0.1} and len(LIVE) == 7


def test_no_round_while_paused() -> None:
    log = two_regions()
    log.add({"kind": "set", "paused": True})
    log.refuses(log.round(answer("eu_1")), "the run is paused")
    log.add(joining("asia_1"))
    log.add({"kind": "leave", "member": "us_1"})
    log.add({"kind": "set", "paused": False})
    assert log.add(log.round(answer("eu_1"))).rounds == 1


def test_an_expelled_region_is_out_until_it_is_admitted() -> None:
    log = two_regions()
    before = log.round(answer("eu_1"), answer("us_1"))
    state = log.add({"kind": "set", "expel": "us"})
    assert set(state.members) == {"eu_1"} and state.ledger.pool[0].region == "us"
    log.refuses(before, "us_1 is not a current member")
    log.refuses(joining("us_2"), "us was expelled")
    log.refuses({"kind": "set", "expel": "us"}, "already expelled")
    state = log.add(log.rewind(counters(log.state)))
    assert state.expelled == ("us",), "a rewind never undoes it"
    log.add({"kind": "set", "admit": "us"})
    assert "us_2" in log.add(joining("us_2")).members
    check_ledger(log.state)


# In flight


def test_a_round_that_began_before_its_weights_changed_is_void() -> None:
    log = two_regions()
    early = log.round(answer("eu_1", tokens=200))
    log.add(setting(outer_lr=0.1))
    assert log.state.rules == 0
    late = log.round(answer("eu_1", tokens=200), head=early["head"])
    assert log.state.weights(0, late["answers"]) == [128.0]
    log.add(setting(outer_sync_every=8))
    log.refuses(late, "its attempt began before entry 4")
    assert log.state.weights(0, late["answers"]) == [200.0]
    log.add(log.round(answer("eu_1", tokens=200)))
    log.add(setting(elastic_max_norm_ratio=0))
    log.refuses(log.round(answer("eu_1"), head=5), "began before entry 6")
    log.refuses(log.round(answer("eu_1"), head=99), "began before")


def test_a_void_attempt_is_given_up_and_proposed_again_with_the_same_snapshot() -> None:
    """The machine: held by all, but H changed meanwhile. Nothing is appended; the next proposal has the new head."""
    machine = Rounds("a_1", 2, 2)
    said = {"tokens": 4, "theta": "t", "momentum": "m", "leases": []}
    machine.handle(View(2, 0, (0,), ("a_1", "b_1")))
    machine.peers["b_1"] = frozenset({"a_1"})
    proposal = Proposal(0, 0, 0, 2, 1, "b_1", ("a_1", "b_1"))
    machine.handle(Received("b_1", proposal.message("propose")))
    machine.handle(Answered(0, 0, 0, said))
    answers = [{**said, "member": "a_1"}, {**said, "member": "b_1"}]
    started = machine.handle(Received("b_1", proposal.message("start", answers=answers)))
    (attempt,) = [action.attempt for action in started if isinstance(action, Exchange)]
    assert not [a for a in machine.handle(Exchanged(attempt, "d")) if isinstance(a, Append)]
    actions = machine.handle(View(3, 0, (0,), ("a_1", "b_1"), rules=3))
    again = [a.alarm for a in actions if isinstance(a, SetAlarm) and a.kind == "soon"]
    assert len(again) == 1
    held = proposal.message("held", attempt=attempt, digest="d")
    assert not [a for a in machine.handle(Received("b_1", held)) if isinstance(a, Append)], "void"
    (sent,) = [a.message for a in machine.handle(again[0]) if isinstance(a, Send)]
    assert isinstance(again[0], Alarm) and sent["type"] == "propose" and sent["head"] == 3
    refused = machine.handle(Received("b_1", replace(proposal, number=9).message("propose")))
    assert [a.message["type"] for a in refused if isinstance(a, Send)] == ["head"], "an old head is told the new one"
