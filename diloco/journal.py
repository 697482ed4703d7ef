"""The journal is the run: a log of entries in its store, created only if absent. `docs/protocol.md` has the rules.

`python -m diloco.journal VERB RUN` reads and steers a run: see `diloco.desk`.
"""

from __future__ import annotations

import json
import sys
from typing import Protocol

from diloco.fold import Entry, State, encode_entry, fold, invalid


def entry_key(seq: int) -> str:
    return f"journal/{seq:010d}.json"


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
        """Reads and folds what is new. Returns the new entries' bytes, in order: each is returned once. Raises OSError if
        the store is away before there is any."""
        new: list[bytes] = []
        try:
            while self.store.exists(entry_key(self.next_seq)):
                data = self.store.read(entry_key(self.next_seq))
                self.state = fold(self.state, data)
                new.append(data)
        except OSError:
            if not new:
                raise
        return new

    def append(self, fields: Entry) -> bool:
        """Tries to create the next entry. False: it is not valid (any more), or another entry was first; read()."""
        if self.state is not None and invalid(self.state, fields):
            return False
        data = encode_entry(fields, self.next_seq, self.state.hash if self.state else "")
        fold(self.state, data)  # raises before it is created: what does not fold would end the run for good
        return self.store.create(entry_key(self.next_seq), data)


def entries_of(store: Store, last: int) -> list[bytes]:
    """The entries 0 to `last`."""
    return [store.read(entry_key(seq)) for seq in range(last + 1)]


def say(journal: Journal, fields: Entry) -> str | None:
    """Appends an entry that is no round, again after each lost race. Returns why it is not valid (any more), or None. Raises
    OSError if the store is away."""
    while True:
        journal.read()
        if journal.state is not None and (reason := invalid(journal.state, fields)):
            return reason
        if journal.append(fields):
            return None


def describe(data: bytes, before: State | None = None) -> str:
    """One line about an entry, for people. before: the state that it follows."""
    entry = json.loads(data)
    kind = entry["kind"]
    if kind == "round":
        out = before.rejected(entry["fragment"], entry["answers"]) if before else frozenset()
        who = ", ".join(a["member"] + (" (weight 0)" if a["member"] in out else "") for a in entry["answers"])
        tokens = sum(answer["tokens"] for answer in entry["answers"])
        text = f"fragment {entry['fragment']} · {tokens:,} tokens · {who} · pseudo-gradient {entry['digest'][:12]}"
    elif kind == "open":
        text = f"run {entry['run']} · θ₀ in {entry['checkpoint']} · H={entry['settings']['sync_every']}"
    elif kind == "join":
        text = f"{entry['member']} · {len(entry['endpoints'])} rank(s) · {entry['samples_per_step']} samples a step"
        text += "".join(f" · {share} of its own {name}" for name, share, _ in entry.get("sources", ()))
    elif kind == "set":
        changes = entry.get("settings") or {k: entry[k] for k in ("paused", "expel", "admit") if k in entry}
        text = " · ".join(f"{key}={value}" for key, value in changes.items())
    elif kind in ("lost", "have"):
        text = f"the bits of entry {entry['round']} · {entry['member']}"
    elif kind == "rewind":
        text = f"{entry['checkpoint']} · {entry['reason']}{' · data skipped' if entry.get('skip_data') else ''}"
    else:
        text = str(entry.get("member") or entry.get("reason"))
    return f"{entry['seq']:>6}  {kind:<7} {text}"


def main(argv: list[str]) -> int:
    """`python -m diloco.journal VERB RUN ...`: RUN is a run directory or the URL of a store. Exit code 1: something about the
    run is wrong; 2: the command is."""
    from diloco.desk import serve

    return serve(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
