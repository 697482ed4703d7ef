"""The journal: what makes an entry valid, what the fold makes of it, and that one writer wins."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckpt.store import Store
from diloco.fold import (
    PROTOCOL,
    FragmentState,
    JournalError,
    Settings,
    State,
    counters,
    encode_entry,
    fold,
    fold_all,
    invalid,
)
from diloco.journal import Journal, entry_key, main
from diloco.ledger import Lease, Returned

SETTINGS = Settings(
    sync_every=4,
    lr=0.7,
    momentum=0.9,
    boundary="steps",
    rounds=None,
    tokens=None,
    seq_len=16,
    seed=0,
    ahead=10,
    lease_rounds=3,
    start_regions=1,
)


def opening(fragments: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "open",
        "protocol": PROTOCOL,
        "run": "run",
        "checkpoint": "checkpoints/run/0",
        "fingerprint": {"fragments": fragments},
        "settings": asdict(replace(SETTINGS, **changes)),
    }


def joining(member: str, samples_per_step: int = 2) -> dict[str, Any]:
    """Members are named region_number."""
    fields = {"member": member, "region": member.split("_")[0], "samples_per_step": samples_per_step}
    places = {"endpoints": [f"{member}:1", f"{member}:2"], "data": [f"{member}:3", f"{member}:4"]}
    return {"kind": "join", **places, **fields}


def answer(member: str, *leases: tuple[int, int], tokens: int = 64) -> dict[str, Any]:
    """leases: (id, used up to)."""
    return {"member": member, "tokens": tokens, "steps": 4, "norm": 1.5, "leases": [list(x) for x in leases]}


class Log:
    """A journal without a store."""

    def __init__(self, *entries: dict[str, Any]) -> None:
        self.entries: list[bytes] = []
        self.state: State = None  # type: ignore[assignment]
        for entry in entries:
            self.add(entry)

    def encode(self, fields: dict[str, Any]) -> bytes:
        return encode_entry(fields, len(self.entries), self.state.hash if self.state else "")

    def add(self, fields: dict[str, Any]) -> State:
        data = self.encode(fields)
        self.state = fold(self.state, data)
        self.entries.append(data)
        return self.state

    def round(self, *answers: dict[str, Any], fragment: int = 0, **changes: Any) -> dict[str, Any]:
        """The fields of a round that is valid now, if the answers are; they are sorted by member."""
        fields = {
            "kind": "round",
            "fragment": fragment,
            "epoch": self.state.epoch,
            "base": self.state.fragments[fragment].base,
            "head": self.state.seq,
            "attempt": "a" * 32,
            "answers": sorted(answers, key=lambda a: a["member"]),
            "digest": hashlib.sha256(str(len(self.entries)).encode()).hexdigest(),
            "theta": "t" * 64,
            "momentum": "m" * 64,
        }
        return {**fields, **changes}

    def rewind(self, to: dict[str, Any], checkpoint: str = "checkpoints/run/9") -> dict[str, Any]:
        return {"kind": "rewind", "reason": "by hand", "checkpoint": checkpoint, "counters": to}

    def refuses(self, fields: dict[str, Any], why: str) -> None:
        """Both the creator's check and the fold do, with this reason."""
        assert why in (invalid(self.state, fields) or "")
        with pytest.raises(JournalError, match=why):
            fold(self.state, self.encode(fields))


def two_regions() -> Log:
    """eu has samples 0 to 19 (lease 0), us 20 to 39 (lease 1)."""
    return Log(opening(), joining("eu_1"), joining("us_1"))


def leases(state: State, member: str) -> list[tuple[int, int, int, int]]:
    return [(x.id, x.start, x.stop, x.applied) for x in state.members[member].leases]


def check_ledger(state: State) -> None:
    """cursor = applied + dropped + leased + returned, and no sample is in two places."""
    places = [(x.applied, x.stop) for m in state.members.values() for x in m.leases if x.left]
    places = sorted([*places, *((r.start, r.stop) for r in state.ledger.pool)])
    assert all(type(n) is int and n >= 0 for place in places for n in place)
    assert all(start < stop for start, stop in places), "nothing empty is kept"
    assert all(a[1] <= b[0] for a, b in pairwise(places)), "a sample in two places"
    assert not places or places[-1][1] <= state.ledger.cursor
    ledger = state.ledger
    handled = ledger.applied + ledger.dropped + ledger.rejected + ledger.skipped
    assert ledger.cursor == handled + sum(stop - start for start, stop in places)
    ids = [x.id for m in state.members.values() for x in m.leases]
    assert len(set(ids)) == len(ids) and all(i < state.ledger.next_id for i in ids)


# A story by hand


def test_golden_story() -> None:
    log = two_regions()
    assert (log.state.seq, log.state.run, log.state.epoch, log.state.rounds) == (2, "run", 0, 0)
    assert leases(log.state, "eu_1") == [(0, 0, 20, 0)]
    assert leases(log.state, "us_1") == [(1, 20, 40, 20)]
    state = log.add(log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26))))
    norms = ((1.5 / 4, 1.5), (1.5 / 4, 1.5))
    assert state.fragments == (FragmentState(3, 1, json.loads(log.entries[3])["digest"], norms),)
    assert (state.rounds, state.ledger.applied, state.tokens) == (1, 14, 14 * 16)
    assert leases(state, "eu_1") == [(0, 0, 20, 8), (2, 40, 48, 40)], "topped up to 10 steps of 2"
    assert leases(state, "us_1") == [(1, 20, 40, 26), (3, 48, 54, 48)]
    # us is restarted under another id: what the old one did not apply comes back, in order, then fresh samples.
    state = log.add(joining("us_2"))
    assert set(state.members) == {"eu_1", "us_2"}
    assert leases(state, "us_2") == [(4, 26, 40, 26), (5, 48, 54, 48)]
    # eu leaves; us uses up a lease and gets eu's samples.
    state = log.add({"kind": "leave", "member": "eu_1"})
    assert state.ledger.pool == (Returned("eu", 8, 20), Returned("eu", 40, 48))
    state = log.add(log.round(answer("us_2", (4, 40), (5, 50))))
    assert leases(state, "us_2") == [(5, 48, 54, 50), (6, 8, 20, 8), (7, 40, 44, 40)]
    assert (state.ledger.applied, state.ledger.cursor, state.ledger.pool) == (30, 54, (Returned("eu", 44, 48),))
    assert state.members["us_2"].endpoints == ("us_2:1", "us_2:2")
    check_ledger(state)
    assert log.add({"kind": "stop", "reason": "enough"}).stopped == "enough"
    assert fold_all(log.entries) == log.state, "a fold from 0 is the fold on the way"


# The chain


def test_sequence_is_dense_and_hashes_chain() -> None:
    log = two_regions()
    for seq in (0, 2, 4):
        with pytest.raises(JournalError, match="does not follow"):
            fold(log.state, encode_entry(joining("asia_1"), seq, log.state.hash))
    for prev in ("", "0" * 64, hashlib.sha256(log.entries[1]).hexdigest()):
        with pytest.raises(JournalError, match="does not follow"):
            fold(log.state, encode_entry(joining("asia_1"), 3, prev))
    prev = hashlib.sha256(log.entries[2]).hexdigest()
    assert fold(log.state, encode_entry(joining("asia_1"), 3, prev)).seq == 3
    assert [json.loads(data)["seq"] for data in log.entries] == [0, 1, 2]
    with pytest.raises(JournalError):
        fold_all([log.entries[0], log.entries[2]])
    with pytest.raises(JournalError):
        fold_all([log.entries[1]])


def test_every_entry_carries_a_nonce() -> None:
    """Two creators of the same entry write different bytes: a read back tells who won."""
    one, two = (json.loads(encode_entry(joining("eu_1"), 1, "x")) for _ in range(2))
    assert one.pop("nonce") != two.pop("nonce") and one == two


def test_entries_are_canonical() -> None:
    data = encode_entry({"b": 1, "a": [1.5, None], "kind": "x"}, 3, "p")
    entry = json.loads(data)
    text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    assert data == text + b"\n"
    with pytest.raises(ValueError):
        encode_entry({"norm": float("nan")}, 3, "p")


@given(st.data())
@settings(deadline=None)
def test_an_altered_byte_is_refused(data: st.DataObject) -> None:
    """In any entry that has a successor, for the successor carries its hash."""
    log = two_regions()
    log.add(log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26))))
    log.add({"kind": "stop", "reason": "enough"})
    which = data.draw(st.integers(0, 3))
    altered = bytearray(log.entries[which])
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(JournalError):
        fold_all([*log.entries[:which], bytes(altered), *log.entries[which + 1 :]])


# What makes a round valid


def test_a_round_of_another_epoch_is_refused() -> None:
    log = two_regions()
    start = counters(log.state)
    stale = log.round(answer("eu_1", (0, 8)))
    log.add(log.rewind(start))
    log.refuses(stale, "of epoch 0, the run is in 3")
    log.refuses(log.round(answer("eu_1"), epoch=4), "epoch 4")
    assert log.add(log.round(answer("eu_1"))).rounds == 1


def test_a_round_on_another_base_is_refused() -> None:
    log = Log(opening(fragments=2), joining("eu_1"))
    late = log.round(answer("eu_1", (0, 8)), fragment=0)
    log.add(log.round(answer("eu_1", (0, 4)), fragment=0))
    log.refuses(late, "fragment 0 has moved on from entry 0")
    assert log.add(log.round(answer("eu_1", (0, 8)), fragment=1)).fragments[1].base == 3, "fragments are apart"
    log.refuses(log.round(answer("eu_1"), fragment=0, base=3), "has moved on")


@pytest.mark.parametrize("fragment", [-1, 2, 10**30])
def test_a_round_of_no_fragment_is_refused(fragment: int) -> None:
    log = Log(opening(fragments=2), joining("eu_1"))
    log.refuses({**log.round(answer("eu_1")), "fragment": fragment}, "there is no fragment")


def test_a_round_of_who_is_no_member_is_refused() -> None:
    log = two_regions()
    log.refuses(log.round(answer("eu_1"), answer("asia_1")), "asia_1 is not a current member")
    before = log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26)))
    log.add({"kind": "leave", "member": "us_1"})
    log.refuses(before, "us_1 is not a current member")
    before = log.round(answer("eu_1", (0, 8)))
    log.add(joining("eu_2"))
    log.refuses(before, "eu_1 is not a current member")


@pytest.mark.parametrize("members", [[], ["us_1", "eu_1"], ["eu_1", "eu_1"]])
def test_the_members_of_a_round_are_a_sorted_set(members: list[str]) -> None:
    log = two_regions()
    answers = [answer(member) for member in members]
    log.refuses(log.round(answers=answers), "not a sorted set")


@pytest.mark.parametrize("claim", [(1, 22), (2, 1), (0, 21), (0, -1)])
def test_a_lease_that_the_member_does_not_hold_is_refused(claim: tuple[int, int]) -> None:
    """Another's, nobody's, beyond its end, before zero."""
    log = two_regions()
    log.refuses(log.round(answer("eu_1", claim), answer("us_1")), "eu_1 applies a lease that it does not hold")


def test_a_lease_of_an_earlier_id_is_refused() -> None:
    """A new id of the region has the same samples, under another lease."""
    log = two_regions()
    log.add(joining("eu_2"))
    assert leases(log.state, "eu_2") == [(2, 0, 20, 0)]
    log.refuses(log.round(answer("eu_2", (0, 8))), "a lease that it does not hold")


def test_a_round_without_weight_is_refused() -> None:
    log = two_regions()
    log.refuses(log.round(answer("eu_1", tokens=0), answer("us_1", tokens=0)), "any weight")
    assert log.add(log.round(answer("eu_1", tokens=0), answer("us_1"))).rounds == 1


def test_a_repeated_round_is_refused() -> None:
    log = two_regions()
    fields = log.round(answer("eu_1", (0, 8)))
    log.add(fields)
    log.refuses(fields, "has moved on")


def test_stop_ends_everything() -> None:
    log = two_regions()
    start = counters(log.state)
    fields = log.round(answer("eu_1", (0, 8)))
    log.add({"kind": "stop", "reason": "run.rounds=3 reached"})
    again = {"kind": "stop", "reason": "again"}
    for entry in (fields, joining("asia_1"), {"kind": "leave", "member": "eu_1"}, again, log.rewind(start)):
        log.refuses(entry, "the run has stopped")


def test_who_is_no_member_cannot_leave() -> None:
    log = two_regions()
    log.refuses({"kind": "leave", "member": "asia_1"}, "asia_1 is not a member")
    log.add({"kind": "leave", "member": "eu_1"})
    log.refuses({"kind": "leave", "member": "eu_1"}, "eu_1 is not a member")


def test_other_kinds_are_refused() -> None:
    log = two_regions()
    for kind in ("open", "vote", None, "_round"):
        log.refuses({**opening(), "kind": kind}, "unknown kind")


# Leases


def test_join_ends_earlier_ids_of_the_region() -> None:
    log = two_regions()
    log.add(log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26))))
    before = leases(log.state, "us_1")
    state = log.add(joining("eu_2"))
    assert set(state.members) == {"eu_2", "us_1"} and leases(state, "us_1") == before
    assert leases(state, "eu_2") == [(4, 8, 20, 8), (5, 40, 48, 40)]
    assert state.members["eu_2"].seen == 1
    check_ledger(state)


def test_leases_are_granted_once_start_regions_joined_whoever_came_first() -> None:
    found = set()
    sizes = {"asia_5": 1, "eu_9": 3, "us_2": 2}
    for order in permutations(sizes):
        log = Log(opening(start_regions=3))
        for i, member in enumerate(order):
            state = log.add(joining(member, sizes[member]))
            if i < 2:
                assert state.ledger.cursor == 0 and not any(m.leases for m in state.members.values())
        found.add(tuple((m, *leases(state, m)) for m in sorted(state.members)))
    assert found == {(("asia_5", (0, 0, 10, 0)), ("eu_9", (1, 10, 40, 10)), ("us_2", (2, 40, 60, 40)))}


def test_a_region_that_restarts_before_the_start_counts_once() -> None:
    log = Log(opening(start_regions=2), joining("eu_1"))
    assert log.add(joining("eu_2")).ledger.cursor == 0
    assert log.add(joining("us_1")).ledger.cursor == 40


def test_who_joins_later_gets_leases_at_once() -> None:
    log = Log(opening(start_regions=2), joining("eu_1"), joining("us_1"))
    log.add({"kind": "leave", "member": "us_1"})
    state = log.add(joining("asia_1"))
    assert leases(state, "asia_1") == [(2, 20, 40, 20)], "what us returned: nothing is lost"


def test_who_is_silent_for_lease_rounds_is_ended() -> None:
    log = two_regions()
    for used in (2, 4, 6):
        state = log.add(log.round(answer("eu_1", (0, used))))
        assert "us_1" in state.members and state.members["eu_1"].seen == state.rounds
    state = log.add(log.round(answer("eu_1", (0, 8))))
    assert set(state.members) == {"eu_1"}
    assert state.ledger.pool == (Returned("us", 20, 40),)
    check_ledger(state)


def test_a_sign_of_a_member_counts_from_anew() -> None:
    log = two_regions()
    for used in range(1, 12):
        mine = [answer("eu_1", (0, used))]
        state = log.add(log.round(*mine, *([answer("us_1")] if used % 4 == 0 else [])))
        assert "us_1" in state.members


# Weights, limits, progress


def test_a_weight_is_capped_at_one_round() -> None:
    state = Log(opening(), joining("eu_1", 2), joining("us_1", 5)).state
    cap = 4 * 2 * 16
    for tokens in (cap - 1, cap, 10 * cap):
        weights = state.weights(0, [answer("eu_1", tokens=tokens), answer("us_1", tokens=10 * cap)])
        assert weights == [min(tokens, cap), 4 * 5 * 16], "each member has its own cap"
        assert all(isinstance(weight, float) for weight in weights)


def test_progress_and_limits() -> None:
    log = Log(opening(rounds=4, fragments=2), joining("eu_1"))
    assert (log.state.sync_interval, log.state.next_fragment()) == (2, 0)
    assert log.state.progress(0, 0) == 0.0
    assert log.state.progress(0.5, 999) == pytest.approx(0.125), "half of an interval"
    for i in range(4):
        assert log.state.finished is None and log.state.next_fragment() == i % 2
        log.add(log.round(answer("eu_1"), fragment=i % 2))
    assert log.state.finished == "run.rounds=4 reached" and log.state.progress(1, 0) == 1.0
    assert log.state.next_fragment() is None
    log.refuses(log.round(answer("eu_1")), "run.rounds=4 reached")


def test_progress_in_tokens() -> None:
    log = Log(opening(tokens=640), joining("eu_1"))
    assert log.state.progress(3, 64) == pytest.approx(0.1)
    log.add(log.round(answer("eu_1", (0, 20))))
    assert log.state.tokens == 320 and log.state.finished is None
    assert log.state.progress(0, 0) == pytest.approx(0.5)
    assert log.state.progress(0, 10**9) == 1.0
    log.add(log.round(answer("eu_1", (1, 40))))
    assert log.state.finished == "run.tokens=640 reached"


def test_progress_with_both_limits_or_none() -> None:
    assert Log(opening(tokens=640, rounds=2)).state.progress(0, 64) == pytest.approx(0.1)
    assert Log(opening(tokens=640, rounds=2)).state.progress(1, 64) == pytest.approx(0.5), "whichever is nearer"
    assert Log(opening()).state.progress(10, 10**6) == 0.0
    assert Log(opening()).state.finished is None


# Epochs, and sources that one region holds alone


def own(member: str, *sources: tuple[str, str, str]) -> dict[str, Any]:
    """sources: (name, share, digest)."""
    return {**joining(member), "sources": [list(source) for source in sources]}


def test_a_region_has_leases_on_its_own_sources_besides() -> None:
    log = Log(opening(), own("eu_1", ("archive", "1/4", "d")), joining("us_1"))
    mine = [(x.source, x.start, x.stop) for x in log.state.members["eu_1"].leases]
    assert mine == [("", 0, 18), ("eu/archive", 0, 8)], "20 samples ahead, whichever turn comes first"
    assert leases(log.state, "us_1") == [(2, 18, 38, 18)]
    assert (log.state.ledger.cursor, log.state.ledger.own, log.state.ledger.handed) == (38, {"eu/archive": 8}, 46)
    state = log.add(log.round(answer("eu_1", (0, 6), (1, 2))))
    assert state.ledger.applied == 8 and state.tokens == 8 * 16, "its own samples count like all others"
    state = log.add({"kind": "leave", "member": "eu_1"})
    assert Returned("eu", 2, 8, "eu/archive") in state.ledger.pool
    assert not any(x.source for m in log.add(log.round(answer("us_1", (2, 38)))).members.values() for x in m.leases)
    state = log.add(own("eu_2", ("archive", "1", "d")))
    ranges = [(x.source, x.start, x.stop) for x in state.members["eu_2"].leases]
    assert ranges == [("eu/archive", 2, 8), ("eu/archive", 8, 10), ("eu/archive", 10, 22)], "with another share now"


def test_a_source_of_ones_own_stays_the_same_data() -> None:
    log = Log(opening(), own("eu_1", ("archive", "1/4", "d")))
    log.refuses(own("eu_2", ("archive", "1/4", "e")), "eu/archive is other data than it was before")
    log.add(own("us_1", ("archive", "1/4", "e")))
    log.add(log.rewind(counters(log.state)))
    log.refuses(own("eu_2", ("archive", "1/4", "e")), "eu/archive is other data")
    for wrong in ([("a", "0", "d")], [("a", "-1/2", "d")], [("a", "3/4", "d"), ("b", "1/2", "d")], [("a", "x", "d")],
                  [("a", "1/4", "d"), ("a", "1/4", "d")], [("a", "1/0", "d")]):  # fmt: skip
        with pytest.raises(JournalError):
            log.add(own("eu_2", *wrong))


def test_the_run_ends_once_every_sample_of_its_epochs_is_settled() -> None:
    """Whoever was slow with the first of them, and although others are further."""
    log = Log(opening(samples=30), joining("eu_1"), joining("us_1"))
    log.add(log.round(answer("us_1", (1, 40))))
    assert (log.state.settled, log.state.finished) == (0, None)
    assert log.state.progress(0, 0, own_samples=3) == pytest.approx(23 / 30)
    log.add({"kind": "leave", "member": "eu_1"})
    log.add(log.round(answer("us_1", (2, 60))))
    assert (log.state.settled, log.state.finished) == (0, None), "what eu gave back is us's now"
    claims = [(x.id, x.stop) for x in log.state.members["us_1"].leases]
    log.add(log.round(answer("us_1", *claims)))
    assert log.state.settled >= 30 and log.state.finished == "run.epochs reached: 30 samples"
    log.refuses(log.round(answer("us_1")), "run.epochs reached")


# Going back


def test_rewind_restores_counters_and_nothing_else() -> None:
    log = Log(opening(fragments=2), joining("eu_1"), joining("us_1"))
    log.add(log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26)), fragment=0))
    then, saved = log.state, counters(log.state)
    log.add(log.round(answer("eu_1", (0, 12)), fragment=1))
    log.add(log.round(answer("eu_1", (0, 20)), fragment=0))
    log.add({"kind": "leave", "member": "us_1"})
    log.add(joining("asia_1"))
    before = log.state
    saved = json.loads(json.dumps(saved))  # it comes from a manifest
    state = log.add(log.rewind(saved))
    assert state.epoch == state.seq == 8 and state.checkpoint == "checkpoints/run/9"
    assert (state.rounds, state.fragments) == (then.rounds, then.fragments)
    assert (state.ledger.applied, state.tokens) == (then.ledger.applied, then.tokens)
    assert (state.settings, state.run, state.fingerprint) == (then.settings, then.run, then.fingerprint)
    assert set(state.members) == {"eu_1", "asia_1"}, "membership as it is now"
    assert all(m.seen == 1 for m in state.members.values())
    old_ids = range(before.ledger.next_id)
    assert not any(x.id in old_ids for m in state.members.values() for x in m.leases), "an answer from before fits none"
    check_ledger(state)
    samples = {i for m in state.members.values() for x in m.leases for i in range(x.start, x.stop)}
    samples |= {i for r in state.ledger.pool for i in range(r.start, r.stop)}
    assert samples >= set(range(8, 20)) | set(range(26, 40)), "what was not applied at the checkpoint is not lost"
    assert not samples & (set(range(8)) | set(range(20, 26))), "what was, is not handed out again"
    log.add(log.round(answer("eu_1"), fragment=0))
    assert log.state.fragments[0].base == 9


def test_rewind_gives_a_regions_own_samples_back_first() -> None:
    log = two_regions()
    log.add(log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26))))
    state = log.add(log.rewind(counters(log.state)))
    own = {m: [(x.start, x.stop) for x in state.members[m].leases] for m in state.members}
    assert own == {"eu_1": [(8, 20), (40, 48)], "us_1": [(26, 40), (48, 54)]}


def test_counters_do_not_change_the_state() -> None:
    log = two_regions()
    before = deepcopy(log.state)
    saved = counters(log.state)
    assert log.state == before
    assert saved["pool"] == [["eu", 0, 20, ""], ["us", 20, 40, ""]] and saved["cursor"] == 40


def test_a_later_rewind_may_supersede() -> None:
    log = two_regions()
    start = counters(log.state)
    log.add(log.rewind(start))
    state = log.add(log.rewind(start, "checkpoints/run/1"))
    assert (state.epoch, state.checkpoint) == (4, "checkpoints/run/1")
    check_ledger(state)


def test_a_rewind_to_other_fragments_is_refused() -> None:
    log = two_regions()
    other = counters(Log(opening(fragments=2)).state)
    with pytest.raises(JournalError, match="another number of fragments"):
        log.add(log.rewind(other))


# Any order of entries


MEMBERS = ("asia", "eu", "us")
ACTIONS = st.tuples(
    st.sampled_from(["join", "join", "leave", "round", "round", "round", "rewind", "save"]),
    st.sampled_from(MEMBERS),
    st.integers(0, 7),
    st.integers(0, 2**16),
)


@given(st.lists(ACTIONS, max_size=40), st.integers(1, 3), st.integers(1, 2))
@settings(deadline=None)
def test_any_order_of_entries_accounts_for_every_sample(actions: list, start_regions: int, fragments: int) -> None:
    log, number = Log(opening(fragments=fragments, start_regions=start_regions)), 0
    saved = counters(log.state)
    for kind, region, who, much in actions:
        before, current = log.state, sorted(log.state.members)
        if kind == "join":
            number += 1
            log.add(joining(f"{region}_{number}", 1 + much % 3))
            assert [m for m in log.state.members if m.startswith(region)] == [f"{region}_{number}"]
        elif kind == "leave" and current:
            log.add({"kind": "leave", "member": current[who % len(current)]})
        elif kind == "round" and current and before.ledger.cursor:
            used = [m for i, m in enumerate(current) if who >> i & 1] or current
            claims = {m: [(x.id, x.stop - much % (x.left + 1)) for x in before.members[m].leases] for m in used}
            log.add(log.round(*(answer(m, *claims[m]) for m in used), fragment=much % fragments))
            news = sum(x.left - much % (x.left + 1) for m in used for x in before.members[m].leases)
            assert log.state.ledger.applied == before.ledger.applied + news
            for m in used:
                mine = log.state.members[m]
                assert sum(x.left for x in mine.leases) == 10 * mine.samples_per_step
        elif kind == "rewind":
            log.add(log.rewind(saved))
        elif kind == "save":
            saved = counters(before)
        check_ledger(log.state)
    again = fold_all(log.entries)
    assert again == log.state


# What is malformed


NASTY: list[Any] = [
    None, True, -1, 0, 1, 2, 0.5, 1e300, 10**30, "", "x", "eu_1", [], [[]], [1], [[0, 1, 2]], [["0", 5]], {}, {"a": 1},
]  # fmt: skip


def samples_of_entries() -> list[tuple[Log, dict[str, Any]]]:
    """Every kind of entry, valid, with the log that it is valid on."""
    log = two_regions()
    log.add(log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26))))
    entries = [
        joining("asia_1"),
        {"kind": "leave", "member": "us_1"},
        log.round(answer("eu_1", (0, 12), (2, 44)), answer("us_1", (1, 30))),
        log.rewind(json.loads(json.dumps(counters(log.state)))),
        {"kind": "stop", "reason": "enough"},
    ]
    return [(Log(), opening(fragments=2)), *((log, entry) for entry in entries)]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(entry: dict[str, Any], path: tuple[Any, ...], value: Any, delete: bool) -> dict[str, Any]:
    entry = deepcopy(entry)
    inside: Any = entry
    for key in path[:-1]:
        inside = inside[key]
    if delete:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return entry


def use(state: State) -> None:
    """What every member does with a state."""
    check_ledger(state)
    _ = (state.tokens, state.next_fragment(), state.sync_interval, state.finished, state.progress(1, 1))
    _ = state.settings.lr * state.settings.momentum * 1.0
    json.dumps(counters(state), allow_nan=False)


@pytest.mark.parametrize("index", range(6), ids=["open", "join", "leave", "round", "rewind", "stop"])
def test_malformed_entries_end_in_a_journal_error_and_nothing_else(index: int) -> None:
    """Every field of every kind of entry, gone or replaced: JournalError, or a state that one can go on from."""
    log, entry = samples_of_entries()[index]
    use(fold(log.state, log.encode(entry)))
    trouble = []
    for path in places(entry):
        for value in (*NASTY, KeyError):
            bad = mutated(entry, path, value, delete=value is KeyError)
            try:
                with suppress(JournalError):
                    use(fold(log.state, log.encode(bad)))
            except Exception as error:
                trouble.append(f"{'.'.join(map(str, path))} = {value!r}: {type(error).__name__}: {error}"[:200])
    assert not trouble, "\n".join([f"{len(trouble)} of them, such as", *trouble[:10]])


@given(st.binary(max_size=60))
@example(b"null")
@example(b"[]")
@example(b'{"seq":3}')
@example(b"\xff\xfe")
@example(b"1" * 5000)
def test_garbage_is_a_journal_error(data: bytes) -> None:
    for state in (None, two_regions().state):
        with pytest.raises(JournalError):
            fold(state, data)


@pytest.mark.parametrize("opener", [b"[", b'{"a":'])
def test_deep_nesting_is_a_journal_error(opener: bytes) -> None:
    with pytest.raises(JournalError):
        fold(None, opener * 200_000)


@pytest.mark.parametrize("text", [b"Infinity", b"NaN", b"1e999", b"-Infinity"])
@pytest.mark.parametrize("key", [b'"tokens":64', b'"norm":1.5', b'"base":3'])
def test_numbers_that_are_not_finite_are_refused(key: bytes, text: bytes) -> None:
    log, entry = samples_of_entries()[3]
    data = log.encode(entry)
    assert key in data
    with pytest.raises(JournalError):
        fold(log.state, data.replace(key, key.split(b":")[0] + b":" + text))


def test_a_contribution_has_no_negative_weight() -> None:
    log = two_regions()
    fields = log.round(answer("eu_1", tokens=-5), answer("us_1"))
    with pytest.raises(JournalError):
        log.add(fields)


def test_a_member_id_belongs_to_one_region() -> None:
    """Otherwise the leases of the member that had it would be lost."""
    log = two_regions()
    with suppress(JournalError):
        log.add({**joining("asia_1"), "member": "eu_1"})
    check_ledger(log.state)


def test_settings_of_no_run_are_refused() -> None:
    for changes in ({"sync_every": 0}, {"ahead": 3}):
        fields = opening()
        fields["settings"].update(changes)
        with pytest.raises(JournalError, match="settings"):
            Log(fields)
    with pytest.raises(JournalError, match=f"speaks protocol {PROTOCOL + 1}"):
        Log({**opening(), "protocol": PROTOCOL + 1})
    with pytest.raises(JournalError, match="begins with 'join'"):
        Log(joining("eu_1"))


# In a store


def test_of_two_writers_one_wins(tmp_path: Path) -> None:
    """At every seq, raced by threads; the loser reads the winner's entry and goes on."""
    store = Store(str(tmp_path))
    assert Journal(store).append(opening())
    journals = [Journal(Store(str(tmp_path))) for _ in range(2)]
    barrier = threading.Barrier(2)

    def race(index: int) -> list[bool]:
        won = []
        for number in range(20):
            barrier.wait()
            journals[index].read()
            barrier.wait()
            won.append(journals[index].append(joining(f"r{index}_{number}")))
        return won

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(race, range(2))
    assert all(a != b for a, b in zip(one, two, strict=True)), "exactly one"
    for journal in journals:
        journal.read()
    assert journals[0].state == journals[1].state and journals[0].state.seq == 20  # type: ignore[union-attr]
    winners = [json.loads(store.read(entry_key(seq)))["member"] for seq in range(1, 21)]
    assert winners == [f"r{0 if won else 1}_{number}" for number, won in enumerate(one)]


def test_who_has_not_read_the_newest_cannot_append(tmp_path: Path) -> None:
    ahead, behind = Journal(Store(str(tmp_path))), Journal(Store(str(tmp_path)))
    assert ahead.append(opening()) and ahead.next_seq == 0, "appending is not folding"
    ahead.read(), behind.read()
    assert ahead.append(joining("eu_1"))
    ahead.read()
    assert not behind.append(joining("us_1"))
    assert [json.loads(data)["member"] for data in behind.read()] == ["eu_1"]
    assert behind.append(joining("us_1")) and behind.read() and behind.read() == []
    assert set(behind.state.members) == {"eu_1", "us_1"}  # type: ignore[union-attr]


def test_what_is_not_valid_is_not_created(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    journal, log = Journal(store), Log()
    for fields in (opening(), joining("eu_1")):
        assert journal.append(fields) and journal.read()
    log.state, log.entries = journal.state, [b""] * 2  # type: ignore[assignment]
    late = log.round(answer("eu_1", (0, 8)), epoch=7)
    assert not journal.append(late)
    assert not store.exists(entry_key(2)), "nothing blocks the seq"
    assert journal.append(log.round(answer("eu_1", (0, 8)))) and journal.read()
    assert journal.state.rounds == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("fields", [joining("eu_1"), {**opening(), "protocol": 99}], ids=["join", "protocol"])
def test_what_does_not_fold_is_not_created(fields: dict[str, Any], tmp_path: Path) -> None:
    """An entry that every fold refuses would end the run for good."""
    store = Store(str(tmp_path))
    with suppress(JournalError):
        Journal(store).append(fields)
    assert not store.exists(entry_key(0))


def test_a_rewind_that_does_not_fold_is_not_created(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    journal = Journal(store)
    assert journal.append(opening()) and journal.read()
    with suppress(JournalError):
        journal.append({"kind": "rewind", "reason": "by hand", "checkpoint": "x", "counters": {"fragments": [{}, {}]}})
    assert not store.exists(entry_key(1))


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(Store(str(tmp_path / "store")))
    log = two_regions()
    log.add(log.round(answer("eu_1", (0, 8)), answer("us_1", (1, 26))))
    log.add(log.rewind(counters(log.state)))
    log.add({"kind": "leave", "member": "us_1"})
    log.add({"kind": "stop", "reason": "enough"})
    for seq, data in enumerate(log.entries):
        assert journal.store.create(entry_key(seq), data)
    assert main(["show", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        [str(i), kind] for i, kind in enumerate(["open", "join", "join", "round", "rewind", "leave", "stop"])
    ]
    assert "eu_1, us_1" in lines[3] and "128 tokens" in lines[3]
    assert lines[-1].split(" · ") == ["rounds 1", "tokens 224", "epoch 4", "enough"]
    assert main(["show"]) == 2 and main(["show", str(tmp_path / "nowhere")]) == 2


def test_lease_is_not_mutable() -> None:
    """A state is shared between threads."""
    with pytest.raises(AttributeError):
        Lease(0, 0, 1, 0).applied = 1  # type: ignore[misc]


def test_before_the_run_begins_no_round_is_valid_and_a_lease_counts_once() -> None:
    log = Log(opening(start_regions=2))
    log.add(joining("eu_1"))
    assert "start_regions=2" in (invalid(log.state, log.round(answer("eu_1"))) or "")
    log.add(joining("us_1"))
    assert invalid(log.state, log.round(answer("eu_1", (0, 8)))) is None
    twice = answer("eu_1", (0, 8))
    twice["leases"] = [[0, 8], [0, 3]]
    assert "does not hold" in (invalid(log.state, log.round(twice)) or "")
