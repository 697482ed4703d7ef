"""The journal is the run: entries, what makes one valid, and the fold from entries to the run's global state. Pure.

An entry is canonical JSON with `seq`, `kind`, `prev` (the hash of its predecessor's bytes) and a `nonce`. Entries carry
facts; the fold decides. Two members that have folded the same prefix hold the same `State`, whatever else happened.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from diloco.ledger import Lease, Ledger, Returned

PROTOCOL = 1
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
        if self.sync_every < 1 or self.ahead < self.sync_every:
            raise JournalError("the run's settings are not those of a run that can make a round")


@dataclass(frozen=True)
class Member:
    id: str
    region: str
    endpoints: tuple[str, ...]
    """host:port of every rank, in rank order."""
    samples_per_step: int
    leases: tuple[Lease, ...]
    seen: int
    """Number of committed rounds when it joined or last contributed."""


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
    def next_fragment(self) -> int:
        return self.rounds % len(self.fragments)

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
        if limits.tokens is not None and self.tokens >= limits.tokens:
            return f"run.tokens={limits.tokens} reached"
        return None

    def weight(self, answer: Entry) -> float:
        """A contribution's weight: its tokens, capped at one round's of that member."""
        member = self.members[answer["member"]]
        cap = self.settings.sync_every * member.samples_per_step * self.settings.seq_len
        return float(min(answer["tokens"], cap))

    def progress(self, own_steps: int, own_tokens: int) -> float:
        """Share of the run that is done, 0 to 1, with what the asking member did since the last commit: what inner
        learning-rate schedules are functions of."""
        limits = self.settings
        done = 0.0
        if limits.rounds:
            done = (self.rounds + min(own_steps / self.sync_interval, 1.0)) / limits.rounds
        if limits.tokens:
            done = max(done, (self.tokens + own_tokens) / limits.tokens)
        return min(done, 1.0)


def encode_entry(fields: Entry, seq: int, prev: str) -> bytes:
    """Canonical bytes of an entry, with a fresh nonce."""
    return canonical({**fields, "seq": seq, "prev": prev, "nonce": secrets.token_hex(8)}) + b"\n"


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def entry_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry_key(seq: int) -> str:
    return f"journal/{seq:010d}.json"


def fold(state: State | None, data: bytes) -> State:
    """state(n) from state(n-1) and the bytes of entry n. Raises JournalError on an entry that is not valid there."""
    try:
        entry = json.loads(data)
        seq, prev = (0, "") if state is None else (state.seq + 1, state.hash)
        if entry["seq"] != seq or entry["prev"] != prev:
            raise JournalError(f"journal entry {seq} does not follow its predecessor: the journal was altered")
        if state is None:
            after = _open(entry)
        elif reason := invalid(state, entry):
            raise JournalError(f"journal entry {seq} ({entry['kind']}) is not valid: {reason}")
        else:
            after = _EFFECTS[entry["kind"]](state, entry)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise JournalError(f"journal entry after {state.seq if state else -1} is malformed: {error!r}") from error
    return replace(after, seq=seq, hash=entry_hash(data))


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
    return _invalid_round(state, entry) if entry["kind"] == "round" else None


def _invalid_round(state: State, entry: Entry) -> str | None:
    if entry["epoch"] != state.epoch:
        return f"it is of epoch {entry['epoch']}, the run is in {state.epoch}"
    if not 0 <= entry["fragment"] < len(state.fragments):
        return f"there is no fragment {entry['fragment']}"
    if entry["base"] != state.fragments[entry["fragment"]].base:
        return f"fragment {entry['fragment']} has moved on from entry {entry['base']}"
    ids = [answer["member"] for answer in entry["answers"]]
    if not ids or ids != sorted(set(ids)):
        return "its members are not a sorted set"
    for answer in entry["answers"]:
        member = state.members.get(answer["member"])
        if member is None:
            return f"{answer['member']} is not a current member"
        held = {lease.id: lease for lease in member.leases}
        if any(i not in held or not 0 <= upto <= held[i].stop for i, upto in answer["leases"]):
            return f"{answer['member']} applies a lease that it does not hold"
    return None if any(answer["tokens"] > 0 for answer in entry["answers"]) else "no contribution has any weight"


def _open(entry: Entry) -> State:
    if entry["kind"] != "open":
        raise JournalError(f"the journal begins with {entry['kind']!r} instead of 'open'")
    if entry["protocol"] != PROTOCOL:
        raise JournalError(f"the run speaks protocol {entry['protocol']}, this program {PROTOCOL}")
    settings = Settings(**entry["settings"])
    fragments = (FragmentState(),) * entry["fingerprint"]["fragments"]
    return State(0, "", entry["run"], entry["fingerprint"], settings, entry["checkpoint"], fragments)


def _join(state: State, entry: Entry) -> State:
    """Ends earlier ids of the region, then grants the first leases: to all at once when the run begins."""
    for old in [m.id for m in state.members.values() if m.region == entry["region"]]:
        state = _end(state, old)
    member = Member(
        entry["member"], entry["region"], tuple(entry["endpoints"]), entry["samples_per_step"], (), state.rounds
    )
    state = replace(state, members={**state.members, member.id: member})
    if state.ledger.cursor > 0:
        return _top_up(state, member.id)
    begins = len(state.members) >= state.settings.start_regions
    return _top_up_all(state) if begins else state


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


def _top_up_all(state: State) -> State:
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
        member = state.members[answer["member"]]
        ledger, leases, _ = state.ledger.apply(member.leases, dict(answer["leases"]))
        member = replace(member, leases=leases, seen=state.rounds)
        state = _top_up(replace(state, ledger=ledger, members={**state.members, member.id: member}), member.id)
    silent = [m.id for m in state.members.values() if state.rounds - m.seen > state.settings.lease_rounds]
    for member_id in silent:
        state = _end(state, member_id)
    return state


def _rewind(state: State, entry: Entry) -> State:
    """Parameters, counters and ledger as at the checkpoint; membership as now, with leases granted afresh."""
    counters = entry["counters"]
    ledger = Ledger(
        counters["cursor"], state.ledger.next_id, counters["applied"], tuple(Returned(*r) for r in counters["pool"])
    )
    fragments = tuple(FragmentState(**f) for f in counters["fragments"])
    if len(fragments) != len(state.fragments):
        raise JournalError("a rewind names another number of fragments")
    members = {k: replace(m, leases=(), seen=counters["rounds"]) for k, m in state.members.items()}
    state = replace(
        state,
        epoch=state.seq + 1,
        checkpoint=entry["checkpoint"],
        fragments=fragments,
        rounds=counters["rounds"],
        ledger=ledger,
        members=members,
    )
    return _top_up_all(state)


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
        "pool": [[r.region, r.start, r.stop] for r in ledger.pool],
        "fragments": [asdict(f) for f in state.fragments],
    }


class Store(Protocol):
    """What a journal needs of the run's store (ckpt.store.Store has it)."""

    def create(self, key: str, data: bytes) -> bool: ...
    def read(self, key: str) -> bytes: ...
    def exists(self, key: str) -> bool: ...


class Journal:
    """A member's view of the journal in a store: the entries read so far, folded."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.state: State | None = None

    @property
    def next_seq(self) -> int:
        return 0 if self.state is None else self.state.seq + 1

    def read(self) -> list[bytes]:
        """Reads and folds what is new. Returns the new entries' bytes, in order."""
        new: list[bytes] = []
        while self.store.exists(entry_key(self.next_seq)):
            new.append(self.store.read(entry_key(self.next_seq)))
            self.state = fold(self.state, new[-1])
        return new

    def append(self, fields: Entry) -> bool:
        """Tries to create the next entry. False: it is not valid (any more), or another entry was first; read()."""
        if self.state is not None and invalid(self.state, fields):
            return False
        prev = self.state.hash if self.state else ""
        return self.store.create(entry_key(self.next_seq), encode_entry(fields, self.next_seq, prev))


def describe(data: bytes) -> str:
    """One line about an entry, for people."""
    entry = json.loads(data)
    kind = entry["kind"]
    if kind == "round":
        who = ", ".join(answer["member"] for answer in entry["answers"])
        tokens = sum(answer["tokens"] for answer in entry["answers"])
        text = f"fragment {entry['fragment']} · {tokens:,} tokens · {who} · pseudo-gradient {entry['digest'][:12]}"
    elif kind == "open":
        text = f"run {entry['run']} · θ₀ in {entry['checkpoint']} · H={entry['settings']['sync_every']}"
    elif kind == "join":
        text = f"{entry['member']} · {len(entry['endpoints'])} rank(s) · {entry['samples_per_step']} samples a step"
    else:
        text = str(entry.get("member") or entry.get("reason") or entry.get("checkpoint"))
    return f"{entry['seq']:>6}  {kind:<7} {text}"


def main(argv: list[str]) -> int:
    """`python -m diloco.journal show RUN`: RUN is a run directory or the URL of a store."""
    import os

    from ckpt.store import Store as RunStore

    if len(argv) != 2 or argv[0] != "show":
        print(
            "usage: python -m diloco.journal show RUN (a run directory, or the URL of a run's store)", file=sys.stderr
        )
        return 2
    inside = os.path.join(argv[1], "store")
    store = RunStore(inside if os.path.isdir(inside) else argv[1])
    journal = Journal(store)
    if not store.exists(entry_key(0)):
        print(f"RUN={argv[1]} holds no journal: name a run directory or the URL of a run's store", file=sys.stderr)
        return 2
    for data in journal.read():
        print(describe(data))
    state = journal.state
    assert state is not None
    print(f"rounds {state.rounds} · tokens {state.tokens:,} · epoch {state.epoch} · {state.stopped or 'not stopped'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
