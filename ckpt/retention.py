"""Which checkpoints stay, and how the others go.

A checkpoint goes in two steps, lest a reader loses it half-way: its manifest first, so that nobody begins to read it, and
its shards when a *tombstone*, written just before, is as old as the grace period. Ages are the store's own (Store.ages); no
clock of ours is asked. A reader that is slower than the grace period finds its shards missing, and takes the one before.

What has no manifest and no tombstone is an attempt, and left alone until the last of it is as old as the grace period; and
so is what lies beside a manifest that does not name it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ckpt.checkpoint import MANIFEST, DamagedError, load_manifest, shard_key
from ckpt.errors import RequestError
from ckpt.format import FormatError, decode_json
from ckpt.store import MissingError, Store, StoreError

TOMBSTONE = "removed"
GLOBAL, OWN = "checkpoints", "regions"
PINS = "pins"
"""Folder of the pins: <PINS>/<prefix of a checkpoint>, empty objects."""
JOURNAL = "journal"
"""Folder of the entries of the run, <seq, 10 digits>.json: those with a `checkpoint` say where the run may go back to."""


@dataclass(frozen=True)
class Rules:
    """keep: so many of the newest stay; every: and of the others those after a multiple of so many rounds, 0: none;
    grace: seconds that shards stay after their manifest, and attempts after their last object."""

    keep: int
    every: int
    grace: float


@dataclass(frozen=True)
class Removed:
    """What a collection removed, or would: checkpoints by prefix, objects whose checkpoint was removed before or never was
    one, and their number."""

    checkpoints: tuple[str, ...]
    objects: tuple[str, ...]


def pin(store: Store, prefix: str) -> None:
    """This checkpoint stays until it is unpinned. RequestError if there is none."""
    store.create(_pin_key(prefix), b"")
    if not store.exists(f"{prefix}/{MANIFEST}"):  # a collection that did not see the pin was faster
        store.delete(_pin_key(prefix))
        raise RequestError(f"{prefix} is no checkpoint (any more): pin one of those that python -m ckpt ls lists")


def unpin(store: Store, prefix: str) -> None:
    store.delete(_pin_key(prefix))


def pinned(store: Store) -> set[str]:
    """Prefixes of the checkpoints that are pinned."""
    return {key.removeprefix(f"{PINS}/") for key in store.list(PINS)}


def _pin_key(prefix: str) -> str:
    return f"{PINS}/{prefix}"


def collect(store: Store, root: str, rules: Rules, dry_run: bool = False) -> Removed:
    """Remove what the rules leave of the checkpoints <root>/<n>; any number of processes may do so at once. Raises
    StoreError; what is left then, the next collection finds."""
    ages, pins = store.ages(root), pinned(store)
    inside: dict[str, dict[str, float]] = defaultdict(dict)
    for key, age in ages.items():
        if match := re.match(re.escape(root) + r"/[0-9]{1,18}(?=/)", key):
            inside[match[0]][key] = age
    committed = [prefix for prefix in sorted(inside, key=_number) if f"{prefix}/{MANIFEST}" in inside[prefix]]
    kept = keepers(store, committed, rules) | pins
    goes = [prefix for prefix in committed if prefix not in kept]
    objects = [
        key for prefix in inside if prefix not in goes for key in _left_over(store, prefix, inside[prefix], rules)
    ]
    if not dry_run:
        goes = [prefix for prefix in goes if _remove(store, prefix)]
        for key in objects:
            store.delete(key)
    return Removed(tuple(goes), tuple(objects))


def roots(store: Store) -> list[str]:
    """Where checkpoints are numbered: <checkpoints>/<run> of the global ones, regions/<run>/<name> of the regions' own."""
    found = set()
    for folder, depth in ((GLOBAL, 2), (OWN, 3)):
        for key in store.list(folder):
            parts = key.split("/")
            if len(parts) > depth + 1 and parts[depth].isdigit():
                found.add("/".join(parts[:depth]))
    return sorted(found)


def keepers(store: Store, committed: list[str], rules: Rules) -> set[str]:
    """Those of the committed checkpoints (prefixes, by rising number) that the rules keep: the first, the newest, some of the
    others, and where the run may go back to. One whose manifest is damaged does not count."""
    whole, kept = 0, {prefix for prefix in committed if _number(prefix) == 0}
    for prefix in reversed(committed):
        if whole >= rules.keep and not rules.every:
            break
        try:
            manifest = load_manifest(store, prefix)
        except (DamagedError, MissingError):
            continue
        if whole < rules.keep or _rounds(manifest) % rules.every == 0:
            kept.add(prefix)
        if whole == 0:
            kept |= _goals(store, manifest)
        whole += 1
    return kept


def _goals(store: Store, newest: dict[str, Any]) -> set[str]:
    """Where the run may go back to: what the newest checkpoint goes back to itself, and what later entries of the journal
    name."""
    goals = {goal for goal in [newest.get("origin")] if isinstance(goal, str)}
    seq = newest.get("seq")
    for key in store.list(JOURNAL):
        match = re.fullmatch(rf"{JOURNAL}/([0-9]{{10}})\.json", key)
        if match and isinstance(seq, int) and int(match[1]) > seq:
            goals |= _goal_of(store, key)
    return goals


def _goal_of(store: Store, key: str) -> set[str]:
    try:
        entry = decode_json(store.read(key))
    except FormatError:
        return set()
    goal = entry.get("checkpoint") if isinstance(entry, dict) else None
    return {goal} if isinstance(goal, str) else set()


def _rounds(manifest: dict[str, Any]) -> int:
    counters = manifest.get("counters")
    rounds = counters.get("rounds") if isinstance(counters, dict) else None
    return rounds if isinstance(rounds, int) else -1


def _remove(store: Store, prefix: str) -> bool:
    """The manifest, after a tombstone. False: it was pinned meanwhile, and stays. Whoever pins looks for the manifest
    afterwards, and whoever removes looks for the pin afterwards: one of them sees the other."""
    key = f"{prefix}/{MANIFEST}"
    try:
        raw = store.read(key)
    except MissingError:
        return False  # somebody else's collection
    store.write(f"{prefix}/{TOMBSTONE}", b"")
    store.delete(key)
    if not store.exists(_pin_key(prefix)):
        return True
    store.create(key, raw)
    store.delete(f"{prefix}/{TOMBSTONE}")
    return False


def _left_over(store: Store, prefix: str, ages: dict[str, float], rules: Rules) -> Iterator[str]:
    """Objects below this prefix that nobody needs, the tombstone last."""
    tombstone, key = f"{prefix}/{TOMBSTONE}", f"{prefix}/{MANIFEST}"
    if key in ages:
        if all(age < rules.grace for age in ages.values()):
            return
        named = _named(store, prefix)
        yield from (key for key, age in sorted(ages.items()) if named and key not in named and age >= rules.grace)
    elif ages.get(tombstone, min(ages.values())) >= rules.grace and not store.exists(key):  # one that finished late
        yield from (key for key in sorted(ages) if key != tombstone)
        if tombstone in ages:
            yield tombstone


def _named(store: Store, prefix: str) -> set[str]:
    """The objects of a checkpoint; none if that cannot be told."""
    try:
        manifest = load_manifest(store, prefix)
    except (DamagedError, StoreError):
        return set()
    return {f"{prefix}/{MANIFEST}", *(shard_key(prefix, record["name"]) for record in manifest["shards"])}


def _number(prefix: str) -> int:
    return int(prefix.rsplit("/", 1)[-1])
