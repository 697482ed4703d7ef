"""Changing a run from outside: each command appends one entry, which the run's members obey as soon as they read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ckpt.checkpoint import DamagedError, load_manifest
from ckpt.reading import verify
from ckpt.store import MissingError, Store
from diloco.checkpoints import rewind_to
from diloco.errors import ConfigError
from diloco.journal import Journal, entries_of, say
from diloco.lineage import belongs, on_path, path_of
from diloco.settings import LIVE, wrong
from diloco.state import Entry, State

USAGE = {
    "set": "RUN KEY=VALUE ...",
    "pause": "RUN",
    "resume": "RUN",
    "expel": "RUN REGION",
    "admit": "RUN REGION",
    "rewind": "RUN SEQ [--skip-data]",
    "stop": "RUN [--reason TEXT]",
}
"""Verb -> what follows it."""


def steer(verb: str, store: Store, journal: Journal, rest: Sequence[str]) -> str:
    """Appends the entry. Returns what to tell the person; raises ConfigError with one sentence if it cannot be done."""
    state = journal.state
    assert state is not None
    fields = _fields(verb, store, state, list(rest))
    if fields is None:
        return f"the run is {'paused' if state.paused else 'not paused'}: nothing to do"
    if reason := say(journal, fields):
        raise ConfigError(f"{verb} {' '.join(rest)}".strip() + f" cannot be done: {reason}")
    return f"appended: {_told(fields)}; regions obey within a few seconds"


def _told(fields: Entry) -> str:
    return " ".join(f"{key}={value}" for key, value in fields.items() if key not in ("counters", "kind"))


def _fields(verb: str, store: Store, state: State, rest: list[str]) -> dict[str, Any] | None:
    if verb == "set":
        return {"kind": "set", "settings": _settings(state, rest)}
    if verb in ("pause", "resume"):
        _no_more(rest)
        return None if state.paused == (verb == "pause") else {"kind": "set", "paused": verb == "pause"}
    if verb in ("expel", "admit"):
        return {"kind": "set", verb: _region(verb, store, state, rest)}
    if verb == "rewind":
        skip = "--skip-data" in rest
        return rewind_to(_manifest(store, state, [x for x in rest if x != "--skip-data"], skip), "by hand", skip)
    return {"kind": "stop", "reason": _reason(rest)}


def _settings(state: State, pairs: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, found, text = pair.partition("=")
        if not found:
            raise ConfigError(f"{pair} is no setting: write KEY=VALUE, with KEY one of {', '.join(LIVE)}")
        settings[key] = _value(text)
    if reason := wrong(settings, len(state.fragments)):
        raise ConfigError(reason)
    return settings


def _value(text: str) -> Any:
    """A number or null; anything else is a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _region(verb: str, store: Store, state: State, rest: list[str]) -> str:
    known = {json.loads(data).get("region") for data in entries_of(store, state.seq)} - {None}
    if len(rest) != 1 or rest[0] not in known:
        named = ", ".join(sorted(known)) or "of which there is none yet"
        raise ConfigError(f"{' '.join([verb, *rest])}: name one region of the run, {named}")
    return rest[0]


def _manifest(store: Store, state: State, rest: list[str], skip: bool) -> dict[str, Any]:
    """Of a stored checkpoint, every byte of which verifies: a run must not go back to what cannot be loaded."""
    root = f"checkpoints/{state.run}"
    there = sorted({int(key.split("/")[2]) for key in store.list(root) if key.endswith("/manifest.json")})
    if len(rest) != 1 or not rest[0].isdigit() or int(rest[0]) not in there:
        raise ConfigError(
            f"SEQ={' '.join(rest)} is no stored checkpoint of the run: those are {', '.join(map(str, there)) or 'none'}"
        )
    try:
        manifest = load_manifest(store, f"{root}/{int(rest[0])}")
        verify(store, manifest)
    except (DamagedError, MissingError) as error:
        raise ConfigError(f"SEQ={rest[0]} cannot be gone back to ({error}): name another of {there}") from error
    entries = entries_of(store, state.seq)
    if not belongs(manifest, entries):
        raise ConfigError(f"SEQ={rest[0]} is a checkpoint of another journal: name another of {there}")
    if skip and not on_path(manifest["seq"], path_of(entries)):
        raise ConfigError(
            f"SEQ={rest[0]} was left behind by a rewind, so --skip-data has no meaning: go there without it"
        )
    return manifest


def _reason(rest: list[str]) -> str:
    if rest and (len(rest) != 2 or rest[0] != "--reason"):
        raise ConfigError(f"{' '.join(rest)} is not known here: stop RUN [--reason TEXT]")
    return rest[1] if rest else "stopped by hand"


def _no_more(rest: list[str]) -> None:
    if rest:
        raise ConfigError(f"{' '.join(rest)} is too much: name only RUN")
