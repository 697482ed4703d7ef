"""The checker of tests.bench.chaos: quiet about a good run, and red on each thing that may go wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diloco.fold import PROTOCOL, State, encode_entry, fold
from tests.chaos.checker import Checker, Deadline, Samples

BATCH, SEQ_LEN, H = 4, 8, 10
SETTINGS = {"sync_every": H, "lr": 0.7, "momentum": 0.9, "boundary": "steps", "rounds": None, "tokens": None}
SETTINGS |= {"seq_len": SEQ_LEN, "seed": 0, "ahead": 5 * H, "lease_rounds": 20, "start_regions": 2}


class Run:
    """A journal and the reports of its members, made by hand: everyone takes H steps and all contribute."""

    def __init__(self, fragments: int = 1) -> None:
        self.fragments = fragments
        self.state: State | None = None
        self.entries: list[bytes] = []
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self.steps = {"a_1": 0, "b_2": 0}
        self.last: dict[tuple[str, int], int] = {}
        """(member, fragment) -> steps at its last contribution."""
        opening = {"kind": "open", "protocol": PROTOCOL, "run": "r", "checkpoint": "c/0", "settings": SETTINGS}
        self.append({**opening, "fingerprint": {"fragments": fragments}})
        for member in self.steps:
            region = member.split("_")[0]
            places = {"endpoints": [""], "data": [""]}
            self.append({"kind": "join", "member": member, "region": region, "samples_per_step": BATCH, **places})
            self.reports.append((region, {"kind": "run", "member": member}))

    def append(self, fields: dict[str, Any]) -> None:
        data = encode_entry(fields, len(self.entries), self.state.hash if self.state else "")
        self.state = fold(self.state, data)
        self.entries.append(data)

    def round(self, *members: str, **changes: Any) -> None:
        """changes: of the answer of the first, or of the entry or the last report, by a prefix."""
        assert self.state is not None
        members, before = members or tuple(self.steps), self.state
        fragment = before.next_fragment()
        assert fragment is not None
        answers = [self.answer(member, fragment, before) for member in members]
        answers[0] |= {k: v for k, v in changes.items() if k in ("steps", "tokens")}
        base = before.fragments[fragment].base
        entry = {"kind": "round", "fragment": fragment, "epoch": 0, "base": base, "attempt": f"t{len(self.entries)}"}
        entry["head"] = before.seq
        theta = changes.get("theta", f"theta{base}" if base else "start")
        self.append({**entry, "answers": answers, "digest": "g", "theta": theta, "momentum": "m"})
        seq = len(self.entries) - 1
        for member in self.steps:
            report = {"kind": "round", "seq": seq, "digest": f"theta{seq}", "step": self.steps[member], "overlap": 0}
            self.reports.append((member.split("_")[0], report))
        self.reports[-1][1].update({k: v for k, v in changes.items() if k in ("digest", "step")})

    def answer(self, member: str, fragment: int, before: State) -> dict[str, Any]:
        self.steps[member] += before.sync_interval
        steps = self.steps[member] - self.last.get((member, fragment), 0)
        self.last[member, fragment] = self.steps[member]
        (lease, *_) = [x for x in before.members[member].leases if x.left]
        claims = [[lease.id, lease.applied + before.sync_interval * BATCH]]
        return {"member": member, "tokens": steps * BATCH * SEQ_LEN, "steps": steps, "norm": 1.0, "leases": claims}

    def check(self) -> Checker:
        checker = Checker()
        for data in self.entries:
            checker.entry(data)
        for region, report in self.reports:
            checker.report(region, report)
        checker.finish()
        return checker


def violations(run: Run) -> str:
    return "\n".join(run.check().violations)


def test_a_good_run() -> None:
    run = Run()
    for _ in range(4):
        run.round()
    checker = run.check()
    assert checker.violations == [] and checker.compared == 4 + 3 and checker.steps_checked == 6


def test_reports_may_come_before_entries() -> None:
    run, checker = Run(), Checker()
    for _ in range(4):
        run.round()
    for region, report in run.reports:
        checker.report(region, report)
    for data in run.entries:
        checker.entry(data)
    checker.finish()
    assert checker.violations == [] and checker.compared == 4 + 3


def test_digests_that_differ() -> None:
    run = Run()
    run.round()
    run.round(digest="other")
    assert "theta is theta4 at a_1 and other at b_2" in violations(run)


def test_a_round_on_another_theta_than_reported() -> None:
    run = Run()
    run.round()
    run.round(theta="other")
    assert "entry 4 applies to theta other, but a_1 had theta3 after entry 3" in violations(run)


def test_an_inner_step_is_lost() -> None:
    run = Run()
    run.round()
    run.round(step=2 * H + 3)
    assert "b_2 has taken 13 inner steps" in violations(run) and "3 lost" in violations(run)


def test_an_inner_step_is_contributed_twice() -> None:
    run = Run()
    run.round()
    run.round(steps=H + 2, tokens=(H + 2) * BATCH * SEQ_LEN)
    assert "2 counted twice" in violations(run)
    assert "a has put 88 samples' work into fragment 0, more than the 80" in violations(run)


def test_work_that_the_ledger_has_and_no_round_holds() -> None:
    run = Run()
    run.round()
    run.round(steps=H - 2, tokens=(H - 2) * BATCH * SEQ_LEN)
    assert "less than the 80" in violations(run)


def test_tokens_that_are_not_the_steps() -> None:
    run = Run()
    run.round()
    run.round(tokens=7)
    assert "7 tokens of a_1 are not 10 steps" in violations(run)


def test_a_contribution_that_is_applied_twice() -> None:
    """As if the next round of a had held its old contribution again: the ledger has no samples for it."""
    run = Run()
    run.round()
    entry = json.loads(run.entries[-1])
    run.append({k: v for k, v in entry.items() if k not in ("seq", "prev", "nonce")} | {"base": entry["seq"]})
    run.reports.append(("a", {"kind": "round", "seq": 4, "digest": "theta4", "step": H, "overlap": 0}))
    assert "more than the 40" in violations(run) and "10 counted twice" in violations(run)


def test_an_entry_that_was_replaced() -> None:
    run = Run()
    run.round()
    run.round()
    checker, other = run.check(), Run()
    checker.again(3, run.entries[3])
    assert checker.violations == []
    checker.again(1, other.entries[1])
    assert "entry 1 is another one than before" in checker.violations[0]


def test_an_entry_that_is_not_valid() -> None:
    run = Run()
    run.round()
    run.entries.append(run.entries[-1])
    assert "does not follow its predecessor" in violations(run)


def test_a_rewind() -> None:
    run = Run()
    run.round()
    counts = dict.fromkeys(("rounds", "cursor", "applied", "dropped", "rejected", "skipped"), 0)
    counters = {**counts, "own": {}, "pool": [], "fragments": [{}]}
    run.append({"kind": "rewind", "reason": "by hand", "checkpoint": "c/0", "counters": counters})
    assert "the run went back" in violations(run)


def test_a_round_that_a_member_skips() -> None:
    run = Run()
    for _ in range(3):
        run.round()
    run.reports = [(r, x) for r, x in run.reports if (r, x.get("seq")) != ("b", 4)]
    assert "b_2 reports entry 5 but has skipped [4]" in violations(run)


def test_a_report_on_nothing() -> None:
    run = Run()
    run.round()
    run.reports.append(("a", {"kind": "round", "seq": 9, "digest": "x", "step": 1, "overlap": 0}))
    assert "a reports entry 9, which is not in the journal" in violations(run)


def test_a_run_that_nobody_compared() -> None:
    run = Run()
    run.round()
    run.round()
    run.reports = []
    assert "nothing was compared" in violations(run)


def test_fragments_share_their_samples() -> None:
    """With several, a sample counts when the first round holds it: a fragment's work may lag, never lead."""
    run = Run(fragments=2)
    for _ in range(4):
        run.round()
    assert violations(run) == ""


@pytest.mark.parametrize(("start", "stop", "new"), [(0, 5, True), (5, 9, False), (19, 20, True), (9, 12, False)])
def test_sets_of_samples(start: int, stop: int, new: bool) -> None:
    samples = Samples()
    assert samples.add(5, 10) and samples.add(12, 19) and samples.add(10, 11)
    assert samples.ranges == [(5, 11), (12, 19)]
    assert samples.add(start, stop) is new


def test_a_deadline() -> None:
    rounds = Deadline("rounds", 10.0)
    rounds.waited(0.0)
    rounds.waited(9.0)
    rounds.happened(9.5)
    rounds.waited(19.0)
    assert rounds.missed == [] and rounds.longest == 9.5
    rounds.waited(20.0)
    rounds.waited(25.0)
    assert rounds.missed == ["rounds: not for 10 s"]
    rounds.excused(25.0)
    rounds.waited(34.0)
    assert len(rounds.missed) == 1
