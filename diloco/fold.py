"""The fold: from journal entries to the run's global state. Pure.

Entries carry facts; the fold decides. Two members that have folded the same prefix hold the same `State`, whatever else
happened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from diloco import norms
from diloco.ledger import Ledger, Returned, still_wanted
from diloco.mixture import most
from diloco.settings import RULES, JournalError, Settings, changed
from diloco.state import PROTOCOL, Entry, FragmentState, Member, State, canonical, encode_entry, entry_hash, own_sources
from diloco.validity import invalid

__all__ = [
    "PROTOCOL",
    "Entry",
    "FragmentState",
    "JournalError",
    "Member",
    "Settings",
    "State",
    "canonical",
    "counters",
    "encode_entry",
    "entry_hash",
    "fold",
    "fold_all",
    "invalid",
]


def fold(state: State | None, data: bytes) -> State:
    """state(n) from state(n-1) and the bytes of entry n. Raises JournalError on an entry that is not valid there."""
    try:
        entry = json.loads(data)
        seq, prev = (0, "") if state is None else (state.seq + 1, state.hash)
        if canonical(entry) + b"\n" != data:
            raise JournalError(f"journal entry {seq} is not canonical JSON: no member wrote it")
        if entry["seq"] != seq or entry["prev"] != prev:
            raise JournalError(f"journal entry {seq} does not follow its predecessor: the journal was altered")
        if state is None:
            after = _open(entry)
        elif reason := invalid(state, entry):
            raise JournalError(f"journal entry {seq} ({entry['kind']}) is not valid: {reason}")
        else:
            after = _EFFECTS[entry["kind"]](state, entry)
        _check(after)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise JournalError(f"journal entry after {state.seq if state else -1} is malformed: {error!r}") from error
    return replace(after, seq=seq, hash=entry_hash(data))


def _check(state: State) -> None:
    """What holds after any entry: every sample that was handed out is used, dropped, leased or returned, once."""
    places = [(x.source, x.applied, x.stop) for m in state.members.values() for x in m.leases if x.left]
    places = sorted([*places, *((r.source, r.start, r.stop) for r in state.ledger.pool)])
    ledger = state.ledger
    counts = [ledger.applied, ledger.dropped, ledger.rejected, ledger.skipped]
    counts += [state.rounds, ledger.cursor, *ledger.own.values()]
    counts += [n for _, *ends in places for n in ends]
    counts += [n for fragment in state.fragments for n in (fragment.base, fragment.rounds)]
    if not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("a count is not a whole number")
    if any(start >= stop for _, start, stop in places):
        raise ValueError("a range of samples is empty")
    if any(a[0] == b[0] and a[2] > b[1] for a, b in pairwise(places)):
        raise ValueError("ranges of samples overlap")
    if ledger.handed != ledger.handled + sum(stop - start for _, start, stop in places):
        raise ValueError("the samples do not add up")


def fold_all(entries: Iterable[bytes]) -> State | None:
    """The state after a journal that is read from entry 0."""
    state = None
    for data in entries:
        state = fold(state, data)
    return state


def _open(entry: Entry) -> State:
    if entry["kind"] != "open":
        raise JournalError(f"the journal begins with {entry['kind']!r} instead of 'open'")
    if entry["protocol"] != PROTOCOL:
        raise JournalError(f"the run speaks protocol {entry['protocol']}, this program {PROTOCOL}")
    settings = Settings(**entry["settings"])
    count = entry["fingerprint"]["fragments"]
    if not 0 < count <= settings.sync_every:
        raise JournalError(f"{count} fragments cannot each have a boundary in {settings.sync_every} steps")
    fragments = (FragmentState(),) * count
    return State(0, "", entry["run"], entry["fingerprint"], settings, entry["checkpoint"], fragments)


def _join(state: State, entry: Entry) -> State:
    """Ends earlier ids of the region, then grants the first leases: to all at once when the run begins."""
    for old in [m.id for m in state.members.values() if m.region == entry["region"]]:
        state = _end(state, old)
    places, own = (tuple(entry["endpoints"]), tuple(entry["data"])), own_sources(entry)
    shares = [(source, share) for source, (share, _) in own.items()]
    shares = [("", 1 - sum((share for _, share in shares), Fraction(0))), *shares]
    who = entry["member"], entry["region"], *places, entry["samples_per_step"]
    member = Member(*who, (), state.rounds, shares=tuple(shares))
    known = {**state.sources, **{source: digest for source, (_, digest) in own.items()}}
    state = replace(state, members={**state.members, member.id: member}, sources=known)
    return _top_up(state, member.id) if state.ledger.handed > 0 else _begin(state)


def _leave(state: State, entry: Entry) -> State:
    return _end(state, entry["member"])


def _end(state: State, member: str) -> State:
    gone = state.members[member]
    members = {k: m for k, m in state.members.items() if k != member}
    return replace(state, members=members, ledger=state.ledger.give_back(gone.region, gone.leases))


def _top_up(state: State, member: str) -> State:
    """Leases for `ahead` inner steps, counted from what is applied."""
    mine, ledger = state.members[member], state.ledger
    leases, samples = mine.leases, state.settings.ahead * mine.samples_per_step
    for source, share in mine.shares:
        missing = most(samples, share) - sum(lease.left for lease in leases if lease.source == source)
        ledger, new = ledger.grant(mine.region, missing, source)
        leases += new
    return replace(state, ledger=ledger, members={**state.members, member: replace(mine, leases=leases)})


def _begin(state: State) -> State:
    """Leases for everyone, in the order of their ids, once enough members are there for the run to begin."""
    if state.ledger.handed > 0 or state.epoch > 0 or len(state.members) >= state.settings.start_regions:
        for member in sorted(state.members):
            state = _top_up(state, member)
    return state


def _round(state: State, entry: Entry) -> State:
    f, answers, before = entry["fragment"], entry["answers"], state
    out, most = state.rejected(f, answers), state.settings.ahead
    old = state.fragments[f]
    new = FragmentState(state.seq + 1, old.rounds + 1, entry["digest"], norms.extended(old.norms, answers, out, most))
    fragments = (*state.fragments[:f], new, *state.fragments[f + 1 :])
    state = replace(state, fragments=fragments, rounds=state.rounds + 1)
    for answer in answers:
        state = _contributed(state, answer, answer["member"] in out)
    oldest = min(fragment.base for fragment in state.fragments)
    members = {k: replace(m, leases=still_wanted(m.leases, oldest)) for k, m in state.members.items()}
    state = _strike(
        replace(state, members=members), {before.members[a["member"]].region: a["member"] in out for a in answers}
    )
    silent = [m.id for m in state.members.values() if state.rounds - m.seen > state.settings.lease_rounds]
    for member_id in silent:
        state = _end(state, member_id)
    return state


def _contributed(state: State, answer: Entry, out: bool) -> State:
    """A member's contribution was used, or rejected: its samples count so, and it gets new ones. `dropped` is a running
    total, so that rounds of several fragments may say it in any order, and each sample is counted once."""
    member = state.members[answer["member"]]
    news = 0 if out else max(answer.get("dropped", 0) - member.dropped, 0)
    ledger, leases, count = state.ledger.apply(member.leases, dict(answer["leases"]), state.seq + 1, news, out)
    member = replace(member, leases=leases, seen=state.rounds, dropped=member.dropped + min(news, count))
    return _top_up(replace(state, ledger=ledger, members={**state.members, member.id: member}), member.id)


def _strike(state: State, regions: Mapping[str, bool]) -> State:
    """regions: of a round -> whether the contribution was rejected. Three times in a row, and the region is expelled."""
    strikes = {r: n for r, n in state.strikes.items() if r not in regions}
    strikes |= {r: state.strikes.get(r, 0) + 1 for r, out in regions.items() if out}
    state = replace(state, strikes=strikes)
    for region in [r for r, n in strikes.items() if n >= norms.STRIKES]:
        state = _expel(state, region)
    return state


def _expel(state: State, region: str) -> State:
    for member in [m.id for m in state.members.values() if m.region == region]:
        state = _end(state, member)
    strikes = {r: n for r, n in state.strikes.items() if r != region}
    return replace(state, expelled=tuple(sorted({*state.expelled, region})), strikes=strikes)


def _set(state: State, entry: Entry) -> State:
    """From the next entry on. Settings, a pause, or who may take part."""
    seq, changes = state.seq + 1, entry.get("settings", {})
    state = replace(
        state,
        settings=changed(state.settings, changes),
        paused=entry.get("paused", state.paused),
        rules=seq if any(key in changes for key in RULES) else state.rules,
    )
    if "expel" in entry:
        state = _expel(state, entry["expel"])
    if "admit" in entry:
        state = replace(state, expelled=tuple(r for r in state.expelled if r != entry["admit"]))
    return _begin(state) if state.ledger.handed > 0 else state


def _lost(state: State, entry: Entry) -> State:
    return replace(state, lost={**state.lost, entry["round"]: state.seq + 1})


def _have(state: State, entry: Entry) -> State:
    lost = {r: seq for r, seq in state.lost.items() if r != entry["round"]}
    return replace(state, lost=lost, had={**state.had, entry["round"]: state.seq + 1})


def _rewind(state: State, entry: Entry) -> State:
    """Parameters, counters and ledger as at the checkpoint; settings, expulsions and membership as now, with leases granted
    afresh."""
    there = entry["counters"]
    fragments = tuple(_fragment(**f) for f in there["fragments"])
    if len(fragments) != len(state.fragments):
        raise JournalError("a rewind names another number of fragments")
    members = {k: replace(m, leases=(), seen=there["rounds"], dropped=0) for k, m in state.members.items()}
    state = replace(
        state,
        epoch=state.seq + 1,
        checkpoint=entry["checkpoint"],
        fragments=fragments,
        rounds=there["rounds"],
        ledger=_ledger(state, there, entry.get("skip_data", False)),
        members=members,
        strikes={},
        lost={},
        had={},
    )
    return _begin(state)


def _fragment(norms: Iterable[Iterable[float]] = (), **fields: Any) -> FragmentState:
    pairs = tuple((float(step), float(whole)) for step, whole in norms)
    return FragmentState(**fields, norms=pairs)


def _ledger(state: State, there: Mapping[str, Any], skip: bool) -> Ledger:
    """After a rewind: as at the checkpoint; skip: the cursor stays, and what was leased or applied since is not trained on
    again. What members returned unused is free in either case."""
    now = state.ledger
    counts = {key: there[key] for key in ("applied", "dropped", "rejected")}
    if not skip:
        pool = tuple(Returned(*r) for r in there["pool"])
        return Ledger(there["cursor"], there["own"], now.next_id, skipped=there["skipped"], pool=pool, **counts)
    free = sum(r.stop - r.start for r in now.pool)
    return replace(now, skipped=now.handed - free - sum(counts.values()), **counts)


def _stop(state: State, entry: Entry) -> State:
    return replace(state, stopped=str(entry["reason"]))


_EFFECTS = {
    "join": _join,
    "leave": _leave,
    "round": _round,
    "set": _set,
    "lost": _lost,
    "have": _have,
    "rewind": _rewind,
    "stop": _stop,
}


def counters(state: State) -> dict[str, Any]:
    """What a checkpoint at `state` has to say so that a `rewind` can go back to it: all leases as returned."""
    ledger = state.ledger
    for member in state.members.values():
        ledger = ledger.give_back(member.region, member.leases)
    return {
        "rounds": state.rounds,
        "cursor": ledger.cursor,
        "own": dict(ledger.own),
        "applied": ledger.applied,
        "dropped": ledger.dropped,
        "rejected": ledger.rejected,
        "skipped": ledger.skipped,
        "pool": [[r.region, r.start, r.stop, r.source] for r in ledger.pool],
        "fragments": [asdict(f) for f in state.fragments],
    }
