"""The norm rule: who has no weight in a round, what the fold makes of it, and that one odd region cannot stop the rest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.norms import ENOUGH, WINDOW, extended, rejected
from tests.test_journal import Log, answer, check_ledger, joining, opening

SEEN = tuple((1.0 + i / 10, 4.0 + i) for i in range(5))
"""Medians: 1.2 a step, 6 as a whole."""


def said(member: str, norm: float | None, steps: int = 4, tokens: int = 64) -> dict[str, Any]:
    return {"member": member, "norm": norm, "steps": steps, "tokens": tokens, "leases": []}


def test_golden() -> None:
    def out(*answers: dict[str, Any], norms: Any = SEEN, ratio: float = 10.0, most: int = 100) -> set[str]:
        return set(rejected(norms, answers, ratio, most))

    good = said("eu_1", 5.0)
    assert out(good, said("us_1", 48.0)) == set(), "exactly ten times the median"
    assert out(good, said("us_1", 48.1)) == {"us_1"}
    assert out(good, said("us_1", 48.1), ratio=20) == set()
    assert out(good, said("us_1", 1e9), ratio=0) == set(), "0 rejects nothing that is finite"
    assert out(good, said("us_1", None), ratio=0) == {"us_1"} == out(good, said("us_1", None), norms=())
    assert out(good, said("us_1", 1e9), norms=SEEN[: ENOUGH - 1]) == set(), "too little is known yet"
    assert out(good, said("us_1", 5.9, steps=0)) == set() == out(good, said("us_1", 5.9, steps=0, tokens=0))
    assert out(good, said("us_1", 13.0, steps=1)) == {"us_1"}
    known = ((0.1, 6.0),) * 4
    assert out(said("eu_1", 0.3), said("us_1", 6.0, steps=1), norms=known) == set(), "large for a step, and harmless"
    assert out(said("eu_1", 0.3), said("us_1", 6.1, steps=1), norms=known) == {"us_1"}
    assert out(good, said("us_1", 2000.0, steps=10**6)) == {"us_1"}, "nobody takes more steps than leases are for"
    assert out(said("eu_1", 1e6), said("us_1", 1e6)) == set(), "where nobody is left, all count"
    assert out(said("eu_1", 1e6), said("us_1", None)) == {"us_1"}
    assert out(said("eu_1", None), said("us_1", None)) == {"eu_1", "us_1"}


def test_the_window_holds_the_last_ones_that_counted() -> None:
    norms = extended(
        (), [said("a_1", 8.0), said("b_1", None), said("c_1", 3.0), said("d_1", 0.0)], frozenset({"b_1"}), 9
    )
    assert norms == ((2.0, 8.0), (0.75, 3.0))
    assert extended(norms, [said("a_1", 1.0, tokens=0)], frozenset(), 9) == norms
    for i in range(WINDOW + 3):
        norms = extended(norms, [said("a_1", 4.0 * i + 4)], frozenset(), 9)
    assert len(norms) == WINDOW and norms[0] == (4.0, 16.0) and norms[-1] == (WINDOW + 3.0, 4.0 * (WINDOW + 3))


@given(
    st.lists(st.tuples(st.floats(0.001, 1e6), st.floats(0.001, 1e6)), max_size=WINDOW),
    st.lists(st.tuples(st.one_of(st.none(), st.floats(0, 1e12)), st.integers(0, 50), st.integers(0, 9)), min_size=1),
)
def test_who_counts_does_not_depend_on_the_order_and_somebody_does(norms: list, values: list) -> None:
    answers = [said(f"r{i}_1", *value) for i, value in enumerate(values)]
    out = rejected(tuple(norms), answers, 10.0, 40)
    assert out == rejected(tuple(norms), answers[::-1], 10.0, 40)
    finite = {a["member"] for a in answers if a["norm"] is not None and a["tokens"] > 0}
    assert not finite or finite - out
    assert {a["member"] for a in answers if a["norm"] is None} <= out


# In the fold


def settled() -> Log:
    """Two regions whose norms are known: 1.5 in 4 steps, as `answer` says."""
    log = Log(opening(ahead=40), joining("eu_1"), joining("us_1"))
    for used in (2, 4):
        log.add(log.round(answer("eu_1", (0, used)), answer("us_1", (1, 80 + used))))
    return log


def large(log: Log, norm: float | None = 1e3, eu: int = 6, us: int = 90) -> dict[str, Any]:
    return log.round(answer("eu_1", (0, eu)), answer("us_1", (1, us)) | {"norm": norm})


@pytest.mark.parametrize("norm", [1e3, None])
def test_a_rejected_contribution_has_no_weight_and_its_samples_are_dropped(norm: float | None) -> None:
    log = settled()
    fields = large(log, norm)
    assert log.state.weights(0, fields["answers"]) == [64.0, 0.0]
    assert log.state.rejected(0, fields["answers"]) == {"us_1"}
    before = log.state.ledger
    state = log.add(fields)
    assert (state.ledger.applied - before.applied, state.ledger.rejected) == (2, 6)
    assert state.strikes == {"us": 1} and state.spent == state.ledger.applied * 16
    assert state.fragments[0].norms[-1] == (1.5 / 4, 1.5) and len(state.fragments[0].norms) == 5
    assert sum(lease.left for lease in state.members["us_1"].leases) == 80, "it gets new ones"
    check_ledger(state)


def test_three_in_a_row_expel_the_region() -> None:
    log = settled()
    for i in range(3):
        assert log.state.expelled == ()
        log.add(large(log, eu=6 + i, us=90 + i))
    assert log.state.expelled == ("us",) and set(log.state.members) == {"eu_1"} and log.state.strikes == {}
    log.refuses(joining("us_2"), "us was expelled")
    check_ledger(log.state)
    log.add({"kind": "set", "admit": "us"})
    assert set(log.add(joining("us_2")).members) == {"eu_1", "us_2"}


def test_a_good_one_between_is_a_new_start_and_a_restart_is_none() -> None:
    log = settled()
    log.add(large(log))
    log.add(large(log, us=91))
    log.add(log.round(answer("eu_1")))
    assert log.state.strikes == {"us": 2}, "who is not in a round has no good one"
    log.add(joining("us_2"))
    mine = log.state.members["us_2"].leases[0]
    log.add(log.round(answer("us_2", (mine.id, mine.start + 1)), answer("eu_1")))
    assert log.state.strikes == {}
    for i in range(2):
        log.add(log.round(answer("us_2", (mine.id, mine.start + 2 + i)) | {"norm": None}, answer("eu_1")))
    log.add(joining("us_3"))
    mine = log.state.members["us_3"].leases[0]
    log.add(log.round(answer("us_3", (mine.id, mine.start + 1)) | {"norm": None}, answer("eu_1")))
    assert log.state.expelled == ("us",)


def test_a_round_of_nothing_but_broken_ones_goes_on() -> None:
    """They send zeros: θ moves by its momentum only, their samples are dropped, and they start again."""
    log = settled()
    fields = log.round(answer("eu_1", (0, 6)) | {"norm": None}, answer("us_1", (1, 90)) | {"norm": None})
    assert log.state.weights(0, fields["answers"]) == [64.0, 64.0]
    state = log.add(fields)
    assert state.ledger.rejected == 8 and state.strikes == {"eu": 1, "us": 1}


@pytest.mark.parametrize("norm", [-1.0, "1", "", True, False, [1.0], []])
def test_what_is_no_norm_is_refused(norm: Any) -> None:
    log = settled()
    log.refuses(large(log, norm), "us_1 has no norm")


def test_a_checkpoint_knows_the_norms() -> None:
    import json

    from diloco.fold import counters

    log = settled()
    then, saved = log.state, json.loads(json.dumps(counters(log.state)))
    for used in range(5):
        log.add(log.round(answer("eu_1", (0, 10 + used)) | {"norm": 9.0}))
    assert log.add(log.rewind(saved)).fragments == then.fragments
