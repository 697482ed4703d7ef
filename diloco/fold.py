"""The fold: from journal entries to the run's global state, and what makes an entry valid. Pure.

An entry is canonical JSON with `seq`, `kind`, `prev` (the hash of its predecessor's bytes) and a `nonce`. Entries carry
facts; the fold decides. Two members that have folded the same prefix hold the same `State`, whatever else happened.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from diloco.ledger import Lease, Ledger, Returned, still_wanted

PROTOCOL = 3
Entry = Mapping[str, Any]


class JournalError(RuntimeError):
    """An entry that no correct member can have written: a bug or an intruder. The run must stop."""


@dataclass(frozen=True)
class Settings:
    """What all members must do alike, fixed by `open`."""

    sync_every: int
    lr: float
    momentum: float
    boundary: str
    rounds: int | None
    tokens: int | None
    seq_len: int
    seed: int
    ahead: int
    """Inner steps that a member's leases must be enough for."""
    lease_rounds: int
    """Rounds without a sign of a member after which its leases return and it has to join again."""
    start_regions: int
    """Leases are granted once this many members have joined, in order of their ids: so it does not matter who came first."""

    def __post_init__(self) -> None:
        counts = [self.sync_every, self.seq_len, self.ahead, self.lease_rounds, self.start_regions]
        limits = [limit for limit in (self.rounds, self.tokens) if limit is not None]
        whole = all(type(n) is int and n > 0 for n in counts + limits)
        rates = all(type(x) in (int, float) and 0 <= x < 1e6 for x in (self.lr, self.momentum))
        if not whole or not rates or self.ahead < self.sync_every:
            raise JournalError("the run's settings are not those of a run that can make a round")


@dataclass(frozen=True)
class Member:
    id: str
    region: str
    endpoints: tuple[str, ...]
    """Of every rank, in rank order: host:port, host:port/name behind a gateway, or empty if it cannot be dialled."""
    data: tuple[str, ...]
    """The same of the ranks' exchanges."""
    samples_per_step: int
    leases: tuple[Lease, ...]
    seen: int
    """Number of committed rounds when it joined or last contributed."""
    dropped: int = 0
    """Samples of its committed rounds that count as dropped."""


@dataclass(frozen=True)
class FragmentState:
    base: int = 0
    """seq of its last round; 0 before any."""
    rounds: int = 0
    digest: str = ""
    """Of the pseudo-gradient that was applied last."""


@dataclass(frozen=True)
class State:
    """The run after entry `seq`."""

    seq: int
    hash: str
    run: str
    fingerprint: Mapping[str, Any]
    settings: Settings
    checkpoint: str
    """Prefix of the checkpoint that the epoch starts from."""
    fragments: tuple[FragmentState, ...]
    epoch: int = 0
    members: Mapping[str, Member] = field(default_factory=dict)
    rounds: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    stopped: str | None = None

    @property
    def tokens(self) -> int:
        """Committed tokens, each counted once."""
        return self.ledger.applied * self.settings.seq_len

    @property
    def spent(self) -> int:
        """Tokens that committed rounds were trained on, those dropped by `outer.merge=mix` included: what `run.tokens` and
        learning-rate schedules go by."""
        return (self.ledger.applied + self.ledger.dropped) * self.settings.seq_len

    def next_fragment(self, in_flight: Collection[int] = ()) -> int | None:
        """Whose boundary is next, of a member with these fragments in flight: they take turns. It may be in flight itself:
        then it has to wait. None: no further round is wanted."""
        limit = self.settings.rounds
        if limit is not None and self.rounds + len(in_flight) >= limit:
            return None
        turns = [fragment.rounds + (f in in_flight) for f, fragment in enumerate(self.fragments)]
        return turns.index(min(turns))

    @property
    def sync_interval(self) -> int:
        """Inner steps between two boundaries: H / fragments."""
        return self.settings.sync_every // len(self.fragments)

    @property
    def finished(self) -> str | None:
        """Why no further round is wanted, if none is: any member may append `stop` then."""
        limits = self.settings
        if limits.rounds is not None and self.rounds >= limits.rounds:
            return f"run.rounds={limits.rounds} reached"
        if limits.tokens is not None and self.spent >= limits.tokens:
            return f"run.tokens={limits.tokens} reached"
        return None

    def weight(self, answer: Entry) -> float:
        """A contribution's weight: its tokens, capped at one round's of that member."""
        member = self.members[answer["member"]]
        cap = self.settings.sync_every * member.samples_per_step * self.settings.seq_len
        return float(min(answer["tokens"], cap))

    def progress(self, own_rounds: float, own_tokens: int) -> float:
        """Share of the run that is done, 0 to 1: what inner learning-rate schedules are functions of. own_rounds, own_tokens:
        what the asking member did that is in no committed round yet."""
        limits = self.settings
        done = 0.0
        if limits.rounds:
            done = (self.rounds + own_rounds) / limits.rounds
        if limits.tokens:
            done = max(done, (self.spent + own_tokens) / limits.tokens)
        return min(done, 1.0)


def encode_entry(fields: Entry, seq: int, prev: str) -> bytes:
    """Canonical bytes of an entry, with a fresh nonce."""
    return canonical({**fields, "seq": seq, "prev": prev, "nonce": secrets.token_hex(8)}) + b"\n"


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def entry_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
    """What holds after any entry: every sample that was handed out is applied, dropped, leased or returned, once."""
    places = [(x.applied, x.stop) for m in state.members.values() for x in m.leases if x.left]
    places = sorted([*places, *((r.start, r.stop) for r in state.ledger.pool)])
    ledger = state.ledger
    counts = [state.rounds, ledger.cursor, ledger.applied, ledger.dropped, *(n for place in places for n in place)]
    counts += [n for fragment in state.fragments for n in (fragment.base, fragment.rounds)]
    if not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("a count is not a whole number")
    if any(start >= stop for start, stop in places) or any(a[1] > b[0] for a, b in pairwise(places)):
        raise ValueError("ranges of samples overlap")
    if ledger.cursor != ledger.applied + ledger.dropped + sum(stop - start for start, stop in places):
        raise ValueError("the samples do not add up")


def fold_all(entries: Iterable[bytes]) -> State | None:
    """The state after a journal that is read from entry 0."""
    state = None
    for data in entries:
        state = fold(state, data)
    return state


def invalid(state: State, entry: Entry) -> str | None:
    """Why `entry` may not follow `state`, or None. Whoever creates an entry asks this first."""
    if entry["kind"] not in _EFFECTS:
        return f"unknown kind {entry['kind']!r}"
    if state.stopped is not None:
        return f"the run has stopped ({state.stopped})"
    if entry["kind"] == "leave" and entry["member"] not in state.members:
        return f"{entry['member']} is not a member"
    if entry["kind"] == "join" and entry["member"] in state.members:
        return f"{entry['member']} is a member already"
    return _invalid_round(state, entry) if entry["kind"] == "round" else None


def _invalid_round(state: State, entry: Entry) -> str | None:
    if entry["epoch"] != state.epoch:
        return f"it is of epoch {entry['epoch']}, the run is in {state.epoch}"
    if not 0 <= entry["fragment"] < len(state.fragments):
        return f"there is no fragment {entry['fragment']}"
    if entry["base"] != state.fragments[entry["fragment"]].base:
        return f"fragment {entry['fragment']} has moved on from entry {entry['base']}"
    if state.finished is not None:
        return state.finished
    if state.ledger.cursor == 0:
        return f"fewer than elastic.start_regions={state.settings.start_regions} members have joined"
    ids = [answer["member"] for answer in entry["answers"]]
    if not ids or ids != sorted(set(ids)):
        return "its members are not a sorted set"
    for answer in entry["answers"]:
        member = state.members.get(answer["member"])
        if member is None:
            return f"{answer['member']} is not a current member"
        if type(answer["tokens"]) is not int or answer["tokens"] < 0:
            return f"{answer['member']} has no number of tokens"
        if type(answer.get("dropped", 0)) is not int or answer.get("dropped", 0) < 0:
            return f"{answer['member']} has no number of dropped samples"
        held, claims = {lease.id: lease for lease in member.leases}, dict(answer["leases"])
        if len(claims) < len(answer["leases"]) or any(
            i not in held or not 0 <= upto <= held[i].stop for i, upto in claims.items()
        ):
            return f"{answer['member']} applies a lease that it does not hold"
    return None if any(answer["tokens"] > 0 for answer in entry["answers"]) else "no contribution has any weight"


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
    places = tuple(entry["endpoints"]), tuple(entry["data"])
    member = Member(entry["member"], entry["region"], *places, entry["samples_per_step"], (), state.rounds)
    state = replace(state, members={**state.members, member.id: member})
    return _top_up(state, member.id) if state.ledger.cursor > 0 else _begin(state)


def _leave(state: State, entry: Entry) -> State:
    return _end(state, entry["member"])


def _end(state: State, member: str) -> State:
    gone = state.members[member]
    members = {k: m for k, m in state.members.items() if k != member}
    return replace(state, members=members, ledger=state.ledger.give_back(gone.region, gone.leases))


def _top_up(state: State, member: str) -> State:
    """Leases for `ahead` inner steps, counted from what is applied."""
    mine = state.members[member]
    missing = state.settings.ahead * mine.samples_per_step - sum(lease.left for lease in mine.leases)
    ledger, leases = state.ledger.grant(mine.region, missing)
    return replace(state, ledger=ledger, members={**state.members, member: replace(mine, leases=mine.leases + leases)})


def _begin(state: State) -> State:
    """Leases for everyone, in the order of their ids, once enough members are there for the run to go on."""
    if state.ledger.cursor > 0 or len(state.members) >= state.settings.start_regions:
        for member in sorted(state.members):
            state = _top_up(state, member)
    return state


def _round(state: State, entry: Entry) -> State:
    fragments = list(state.fragments)
    fragments[entry["fragment"]] = FragmentState(
        state.seq + 1, fragments[entry["fragment"]].rounds + 1, entry["digest"]
    )
    state = replace(state, fragments=tuple(fragments), rounds=state.rounds + 1)
    for answer in entry["answers"]:
        state = _contributed(state, answer)
    oldest = min(fragment.base for fragment in state.fragments)
    members = {k: replace(m, leases=still_wanted(m.leases, oldest)) for k, m in state.members.items()}
    state = replace(state, members=members)
    silent = [m.id for m in state.members.values() if state.rounds - m.seen > state.settings.lease_rounds]
    for member_id in silent:
        state = _end(state, member_id)
    return state


def _contributed(state: State, answer: Entry) -> State:
    """A member's contribution was used: its samples count, and it gets new ones. `dropped` is a running total, so that
    rounds of several fragments may say it in any order, and each sample is counted once."""
    member = state.members[answer["member"]]
    news = max(answer.get("dropped", 0) - member.dropped, 0)
    ledger, leases, count = state.ledger.apply(member.leases, dict(answer["leases"]), state.seq + 1, news)
    member = replace(member, leases=leases, seen=state.rounds, dropped=member.dropped + min(news, count))
    return _top_up(replace(state, ledger=ledger, members={**state.members, member.id: member}), member.id)


def _rewind(state: State, entry: Entry) -> State:
    """Parameters, counters and ledger as at the checkpoint; membership as now, with leases granted afresh."""
    counters = entry["counters"]
    ledger = Ledger(
        counters["cursor"],
        state.ledger.next_id,
        counters["applied"],
        counters["dropped"],
        tuple(Returned(*r) for r in counters["pool"]),
    )
    fragments = tuple(FragmentState(**f) for f in counters["fragments"])
    if len(fragments) != len(state.fragments):
        raise JournalError("a rewind names another number of fragments")
    members = {k: replace(m, leases=(), seen=counters["rounds"], dropped=0) for k, m in state.members.items()}
    state = replace(
        state,
        epoch=state.seq + 1,
        checkpoint=entry["checkpoint"],
        fragments=fragments,
        rounds=counters["rounds"],
        ledger=ledger,
        members=members,
    )
    return _begin(state)


def _stop(state: State, entry: Entry) -> State:
    return replace(state, stopped=str(entry["reason"]))


_EFFECTS = {"join": _join, "leave": _leave, "round": _round, "rewind": _rewind, "stop": _stop}


def counters(state: State) -> dict[str, Any]:
    """What a checkpoint at `state` has to say so that a `rewind` can go back to it: all leases as returned."""
    ledger = state.ledger
    for member in state.members.values():
        ledger = ledger.give_back(member.region, member.leases)
    return {
        "rounds": state.rounds,
        "cursor": ledger.cursor,
        "applied": ledger.applied,
        "dropped": ledger.dropped,
        "pool": [[r.region, r.start, r.stop] for r in ledger.pool],
        "fragments": [asdict(f) for f in state.fragments],
    }
