"""Bits that nobody has: `lost`, `have`, `rewind`; the path that parameters are built on; and samples that a rewind skips."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from diloco.fold import counters
from diloco.ledger import LeaseReader, Returned
from diloco.lineage import on_path, path_of, rounds_after, spans
from diloco.losing import Search
from diloco.mixture import Schedule
from diloco.tally import COLUMNS, differs, table, tally
from tests.test_journal import ACTIONS, Log, answer, check_ledger, joining, opening, two_regions


def saying(kind: str, seq: int) -> dict[str, Any]:
    return {"kind": kind, "round": seq, "member": "us_1"}


def rewinding(log: Log, to: dict[str, Any], seq: int, reason: str = "lost", skip: bool = False) -> dict[str, Any]:
    return {**log.rewind(to, f"checkpoints/run/{seq}"), "reason": reason, "skip_data": skip}


def with_a_round() -> tuple[Log, dict[str, Any]]:
    """Entry 3 is a round; and the counters before it."""
    log = two_regions()
    start = json.loads(json.dumps(counters(log.state)))
    log.add(log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26))))
    return log, start


# In the fold


def test_a_rewind_for_lost_bits_follows_right_on_the_word() -> None:
    log, start = with_a_round()
    log.refuses(rewinding(log, start, 2), "nobody has just said that bits are lost")
    state = log.add(saying("lost", 3))
    assert state.lost == {3: 4} and state.epoch == 0
    log.add(joining("asia_1"))
    log.refuses(rewinding(log, start, 2), "nobody has just said")
    assert log.add(saying("lost", 3)).lost == {3: 6}, "said again"
    state = log.add(rewinding(log, start, 2))
    assert (state.epoch, state.lost, state.rounds) == (7, {}, 0)
    log.refuses(rewinding(log, start, 2), "nobody has just said")
    log.refuses(rewinding(log, start, 2, reason="mood"), "nobody has just said")
    log.add(rewinding(log, start, 2, reason="by hand"))


def test_a_damaged_checkpoint_is_left_as_long_as_nothing_was_built_on_it() -> None:
    log, start = with_a_round()
    log.refuses(rewinding(log, start, 2, reason="damaged"), "the run goes on")
    log.add(rewinding(log, start, 2, reason="by hand"))
    assert log.add(rewinding(log, start, 1, reason="damaged")).epoch == 5, "and so is the one before"
    log.add(rewinding(log, start, 2, reason="damaged"))
    leases = {m.region: m.leases[0].id for m in log.state.members.values()}
    log.add(
        log.round(
            answer("eu_1", (leases["eu"], 8)),
            answer("us_1", (leases["us"], log.state.members["us_1"].leases[0].start + 8)),
        )
    )
    log.refuses(rewinding(log, start, 2, reason="damaged"), "the run goes on")


def test_have_answers_lost() -> None:
    log, start = with_a_round()
    log.refuses(saying("have", 3), "nobody has lost round 3")
    log.add(saying("lost", 3))
    state = log.add(saying("have", 3))
    assert (state.lost, state.had) == ({}, {3: 5})
    log.refuses(rewinding(log, start, 2), "nobody has just said")
    log.refuses(saying("have", 3), "nobody has lost")
    for seq in (-1, 0, 6, 99, "3", None, True):
        log.refuses({**saying("lost", 0), "round": seq}, "is not a round of the current epoch")
    log.add(saying("lost", 3))
    log.add(rewinding(log, start, 2))
    log.refuses(saying("lost", 3), "not a round of the current epoch")


# A member's moves


def test_who_cannot_get_bits_says_so_waits_and_only_then_goes_back() -> None:
    log, start = with_a_round()
    search = Search(3, 10.0)
    assert search.move(log.state, 100) == "lost"
    log.add(saying("lost", 3))
    assert [search.move(log.state, t) for t in (101, 110.9, 111)] == ["wait", "wait", "rewind"]
    log.add(joining("asia_1"))
    assert search.move(log.state, 112) == "lost", "the wait has passed, but something came between"
    log.add(saying("lost", 3))
    assert [search.move(log.state, t) for t in (122, 131, 132)] == ["wait", "wait", "rewind"]
    log.add(rewinding(log, start, 2))
    assert search.move(log.state, 133) == "over"


def test_who_is_answered_waits_for_the_upload_and_asks_again() -> None:
    log, _ = with_a_round()
    search = Search(3, 10.0)
    log.add(saying("lost", 3))
    assert search.move(log.state, 0) == "wait", "somebody else has said it: its wait is this one's"
    log.add(saying("have", 3))
    log.add(joining("asia_1"))
    assert [search.move(log.state, t) for t in (1, 10.9, 11)] == ["wait", "wait", "lost"]
    log.add({"kind": "stop", "reason": "enough"})
    assert search.move(log.state, 12) == "over"


@given(st.lists(st.tuples(st.sampled_from(["lost", "have", "join", "tick", "tick"]), st.floats(0, 30)), max_size=30))
@settings(deadline=None)
def test_no_rewind_without_a_whole_wait_after_the_last_entry(events: list[tuple[str, float]]) -> None:
    log, start = with_a_round()
    search, now, head_at = Search(3, 10.0), 0.0, 0.0
    for number, (kind, seconds) in enumerate(events):
        move = search.move(log.state, now)
        if move == "rewind":
            assert now - head_at >= 10 and log.state.lost[3] == log.state.seq
            log.encode(rewinding(log, start, 2))  # it would be valid
            return
        if kind == "have" and not log.state.lost:
            kind = "tick"
        if kind != "tick":
            log.add(joining(f"r{number}_1") if kind == "join" else saying(kind, 3))
            search.move(log.state, now)
            head_at = now
        now += seconds


# The path


def test_golden_paths() -> None:
    assert spans([], 7) == [(0, 7)]
    assert spans([(5, 3)], 7) == [(0, 3), (5, 7)]
    assert spans([(5, 0)], 5) == [(0, 0), (5, 5)]
    twice = [(50, 10), (61, 55)]
    assert spans(twice, 70) == [(0, 10), (50, 55), (61, 70)], "10 to 50 are left behind, although 55 is newer"
    assert spans([(50, 10), (60, 40)], 70) == [(0, 40), (60, 70)], "back to what the first rewind had left behind"
    assert [s for s in (10, 11, 49, 50, 56, 61) if on_path(s, spans(twice, 70))] == [10, 50, 61]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10**6)), max_size=20))
def test_paths_are_what_a_walk_back_finds(moves: list[tuple[bool, int]]) -> None:
    """Reference: each entry's parent is its predecessor, or a rewind's checkpoint."""
    parents, rewinds = {0: -1}, []
    for seq, (rewind, where) in enumerate(moves, start=1):
        parents[seq] = where % seq if rewind else seq - 1
        rewinds += [(seq, parents[seq])] if rewind else []
    expected, at = set(), len(moves)
    while at >= 0:
        expected.add(at)
        at = parents[at]
    path = spans(rewinds, len(moves))
    assert {seq for seq in parents if on_path(seq, path)} == expected


def test_rounds_of_the_path_come_with_the_state_that_they_were_committed_on() -> None:
    log, start = with_a_round()
    log.add(log.round(answer("eu_1", (0, 10))))
    after = json.loads(json.dumps(counters(log.state)))
    log.add(log.round(answer("eu_1", (0, 12))))
    log.add(rewinding(log, after, 4, reason="by hand"))
    log.add({"kind": "set", "settings": {"outer.lr": 0.1}})
    log.add(log.round(answer("eu_1")))
    assert [e["seq"] for _, e in rounds_after(log.entries, 0)] == [3, 4, 8]
    assert [(s.seq, s.settings.lr) for s, _ in rounds_after(log.entries, 3)] == [(3, 0.7), (7, 0.1)]
    assert path_of(log.entries) == [(0, 4), (6, 8)]
    assert start["rounds"] == 0


# Samples


def test_skip_data_does_not_hand_out_again_what_was_used_or_held() -> None:
    log, _ = with_a_round()
    saved = json.loads(json.dumps(counters(log.state)))  # applied 0..8 and 20..26 of 54
    log.add(log.round(answer("eu_1", (0, 20), (2, 44)), answer("us_1", (1, 30))))
    log.add({"kind": "leave", "member": "us_1"})
    before = log.state
    assert before.ledger.pool == (Returned("us", 30, 40), Returned("us", 48, 54), Returned("us", 70, 74))
    state = log.add(rewinding(log, saved, 3, "by hand", skip=True))
    assert (state.rounds, state.ledger.applied, state.spent) == (1, 14, 14 * 16), "schedules go by the checkpoint"
    assert state.ledger.skipped == before.ledger.cursor - 14 - 20
    held = [(x.start, x.stop) for x in state.members["eu_1"].leases]
    assert held == [(30, 40), (48, 54), (70, 74)], "what was given back unused, first"
    check_ledger(state)
    assert log.add(rewinding(log, saved, 3, "by hand")).ledger.skipped == 0


def test_forgotten_samples_are_taken_again_but_those_in_flight() -> None:
    log = two_regions()
    reader = LeaseReader()
    reader.update(log.state.members["eu_1"].leases)
    reader.take(9)
    claims = reader.claims()
    reader.take(4)
    reader.forget(claims)
    assert (claims, reader.take(2)) == ([[0, 9]], [9, 10])
    reader.forget()
    assert reader.take(2) == [0, 1]


@given(st.lists(ACTIONS, max_size=40), st.integers(1, 2), st.lists(st.booleans(), min_size=40, max_size=40))
@settings(deadline=None)
def test_the_tally_sums_to_what_was_handed_out_and_is_the_ledgers(actions: list, fragments: int, odd: list) -> None:
    """Any order of joins, leaves, good and rejected rounds, and rewinds with and without skipping."""
    log, number = Log(opening(fragments=fragments)), 0
    saved = [(0, counters(log.state))]
    for (kind, region, who, much), bad in zip(actions, odd, strict=False):
        before, current = log.state, sorted(log.state.members)
        if kind == "join" and region not in before.expelled:
            number += 1
            log.add(joining(f"{region}_{number}", 1 + much % 3))
        elif kind == "leave" and current:
            log.add({"kind": "leave", "member": current[who % len(current)]})
        elif kind == "round" and current and before.ledger.cursor:
            used = [m for i, m in enumerate(current) if who >> i & 1] or current
            answers = [
                answer(m, *((x.id, x.stop - much % (x.left + 1)) for x in before.members[m].leases)) for m in used
            ]
            answers[0] |= {"norm": None if bad else 1.5, "dropped": much % 7}
            log.add(log.round(*answers, fragment=much % fragments))
        elif kind == "rewind":
            seq, there = saved[who % len(saved)]
            skip = bad and on_path(seq, path_of(log.entries))
            log.add(rewinding(log, json.loads(json.dumps(there)), seq, "by hand", skip))
        elif kind == "save":
            saved.append((before.seq, counters(before)))
        check_ledger(log.state)
        state, counts = tally(log.entries)
        assert differs(state, counts) is None and min(counts.values(), default=0) >= 0
        sums = {column: sum(n for (_, _, c), n in counts.items() if c == column) for column in COLUMNS}
        ledger = state.ledger
        assert [sums[c] for c in ("applied", "mix", "norm", "skip")] == [
            ledger.applied, ledger.dropped, ledger.rejected, ledger.skipped,
        ]  # fmt: skip
        assert len(table(state, counts)) == 2 + len({region for region, _, _ in counts})


def test_sources_are_told_apart_sample_by_sample() -> None:
    log = two_regions()
    log.add(log.round(answer("eu_1", (0, 5))))
    log.add({"kind": "leave", "member": "us_1"})
    schedule = Schedule([(0, [Fraction(2), Fraction(1)]), (25, [Fraction(0), Fraction(1)])])
    mixture = {"names": ["web", "books"], "phases": json.loads(json.dumps(schedule.describe()))}
    mixed = Log({**opening(), "fingerprint": {"fragments": 1, "mixture": mixture}})
    for fields in map(json.loads, log.entries[1:]):
        mixed.add({key: value for key, value in fields.items() if key not in ("seq", "prev", "nonce")})
    state, counts = tally(mixed.entries)
    held = [i for m in state.members.values() for x in m.leases for i in range(x.applied, x.stop)]
    back = [i for r in state.ledger.pool for i in range(r.start, r.stop)]
    assert held and back
    for k, source in enumerate(mixture["names"]):
        for region, column, ids in (("eu", "applied", range(5)), ("eu", "leased", held), ("us", "returned", back)):
            assert counts[region, source, column] == sum(schedule.locate(i)[0] == k for i in ids)
    assert not any(column == "mix" for _, _, column in counts)
    rows = [line.split() for line in table(state, counts)]
    assert [row[:2] for row in rows[1:5]] == [["eu", "books"], ["eu", "web"], ["us", "books"], ["us", "web"]]
    assert [row[:3] for row in rows[5:7]] == [["all", "regions", "books"], ["all", "regions", "web"]] and len(rows) == 8
    numbers = [[int(n.replace(",", "")) for n in row[-7:]] for row in rows[1:]]
    assert all(sum(row[:-1]) == row[-1] for row in numbers)
    assert numbers[-1] == [sum(column) for column in zip(*numbers[:4], strict=True)]


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 12)), min_size=1, max_size=12), st.integers(1, 9))
@example([(10, 3)], 1)
@example([(2, 1)] * 12, 1)
@settings(deadline=None)
def test_what_mix_dropped_is_shared_by_the_sources(rounds: list[tuple[int, int]], weight: int) -> None:
    """In proportion to what each gave, however it was dropped."""
    mixture = {"names": ["web", "books"], "phases": Schedule([(0, [Fraction(weight), Fraction(1)])]).describe()}
    log, dropped = Log({**opening(), "fingerprint": {"fragments": 1, "mixture": mixture}}, joining("eu_1")), 0
    for samples, news in rounds:
        dropped += news
        used = {x.id: x.applied for x in log.state.members["eu_1"].leases}
        for x in log.state.members["eu_1"].leases:
            used[x.id] += min(samples, x.left)
            samples -= used[x.id] - x.applied
        log.add(log.round({**answer("eu_1", *used.items()), "dropped": dropped}))
    state, counts = tally(log.entries)
    ledger = state.ledger
    assert differs(state, counts) is None
    assert sum(counts["eu", name, "mix"] for name in mixture["names"]) == ledger.dropped
    gave = Schedule.of(mixture["phases"]).counts(ledger.applied + ledger.dropped)
    for name, n in zip(mixture["names"], gave, strict=True):
        assert counts["eu", name, "applied"] + counts["eu", name, "mix"] == n
        assert abs(counts["eu", name, "mix"] - Fraction(ledger.dropped * n, sum(gave) or 1)) < 1
