"""The newest state that can be had, into a Trainer: from a member that is alive, else from the store; any mesh."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from ckpt.checkpoint import DamagedError, verify
from diloco.bits import bits_of, fetch_fragment
from diloco.checkpoints import Checkpoints
from diloco.errors import ConfigError
from diloco.fold import State, entry_hash, fold, fold_all
from diloco.journal import Journal
from diloco.parallel import on_rank_0
from diloco.trainer import Trainer
from elastic.node import Node


def restore(trainer: Trainer, journal: Journal, entries: list[bytes]) -> bool:
    """Theta and momentum from a member that is alive, else from the store. Collective. False: look again."""
    region, links = trainer.region, trainer.links
    choice = on_rank_0(region, lambda: _choose(trainer, journal, entries))
    if choice["entries"]:
        for entry in choice["entries"]:
            entries.append(entry.encode())
            trainer.state = fold(trainer.state, entries[-1])
        return False
    if choice["donors"] and not _load_from(trainer, [tuple(d) for d in choice["donors"]]):
        return False
    if (manifest := choice["manifest"]) is not None:
        links.checkpoints.load(manifest, trainer.planes)
        for before, entry in _rounds_after(entries, max(manifest["seq"], trainer.state.epoch)):
            trainer.outer_step(before, entry, bits_of(trainer, entry))
            trainer.stored[entry["seq"]] = entry["attempt"]
    trainer.adopt()
    _restore_own(trainer, choice["own"], choice["exact"])
    if region.rank == 0:
        source = f"checkpoint {manifest['prefix']}" if manifest else "a member that is alive"
        inner = f"inner state of entry {choice['own']['seq']}" if choice["own"] else "fresh inner state"
        print(f"{links.member}: state after {trainer.state.rounds} rounds from {source}, {inner}", flush=True)
    return True


def _rounds_after(entries: list[bytes], seq: int) -> list[tuple[State, dict[str, Any]]]:
    """The rounds after entry `seq`, each with the state that it was committed on."""
    state, found = fold_all(entries[: seq + 1]), []
    for data in entries[seq + 1 :]:
        entry = json.loads(data)
        assert state is not None
        if entry["kind"] == "round":
            found.append((state, entry))
        state = fold(state, data)
    return found


def _restore_own(trainer: Trainer, own: dict[str, Any] | None, exact: bool) -> None:
    """The region's own inner state. exact: no round was committed since, so local parameters and counters hold, too."""
    if own is not None:
        trainer.links.checkpoints.load_own(own, trainer.inner, trainer.planes, moments_only=not exact)
        if exact:
            trainer.resume_from(own["progress"])


def _choose(trainer: Trainer, journal: Journal, entries: list[bytes]) -> dict[str, Any]:
    """Rank 0: where to load from; or the entries that appeared meanwhile, a `rewind` of our own among them."""
    new = [entry.decode() for entry in journal.read()]
    choice: dict[str, Any] = {"entries": new, "donors": [], "manifest": None, "own": None, "exact": False}
    if new:
        return choice
    state, checkpoints = trainer.state, trainer.links.checkpoints
    own = _newest_whole(checkpoints, checkpoints.own(trainer.cfg.region.name), state, entries)
    choice["own"] = own
    choice["exact"] = own is not None and own["seq"] >= max(fragment.base for fragment in state.fragments)
    choice["donors"] = _alive(trainer.links.node, state)
    if not choice["donors"]:
        choice["manifest"] = manifest = _newest_whole(checkpoints, checkpoints.candidates(), state, entries)
        if manifest is None:
            raise ConfigError(
                f"run.store={checkpoints.store.url} has no checkpoint that is whole: restore one, or set run.dir to a new "
                "directory"
            )
        since = _rounds_after(entries, max(manifest["seq"], state.epoch))
        blocks = [fragment.blocks for fragment in trainer.fragments]
        if not all(checkpoints.has_bits(entry["attempt"], blocks[entry["fragment"]]) for _, entry in since):
            choice["entries"] = _go_back(trainer.links.member, journal, manifest, len(since))
    return choice


def _go_back(member: str, journal: Journal, manifest: dict[str, Any], rounds: int) -> list[str]:
    print(
        f"{member}: {rounds} round(s) were committed after the newest checkpoint, and their bits are neither in the store "
        f"nor with a member that can be reached: going back to entry {manifest['seq']}",
        flush=True,
    )
    journal.append({"kind": "rewind", "checkpoint": manifest["prefix"], "counters": manifest["counters"]})
    return [entry.decode() for entry in journal.read()]


def _on_this_path(manifest: dict[str, Any], state: State, entries: list[bytes]) -> bool:
    """Whether the manifest's entry is in this journal and its state one that the current epoch builds on."""
    seq, origin = manifest["seq"], int(state.checkpoint.rsplit("/", 1)[-1])
    known = seq == 0 or (seq < len(entries) and entry_hash(entries[seq]) == manifest["hash"])
    return known and (seq > state.epoch or seq <= origin)


def _newest_whole(
    checkpoints: Checkpoints, manifests: Iterable[dict[str, Any]], state: State, entries: list[bytes]
) -> dict[str, Any] | None:
    """The first that belongs here and whose every byte verifies."""
    for manifest in manifests:
        if _on_this_path(manifest, state, entries):
            try:
                verify(checkpoints.store, manifest)
            except DamagedError as error:
                print(f"checkpoint {manifest['prefix']} is passed over: {error}", flush=True)
            else:
                return manifest
    return None


def _alive(node: Node, state: State) -> list[tuple[str, ...]]:
    """The endpoints of the members whose rank 0 answers."""
    found = []
    for member in state.members.values():
        try:
            connection, _ = node.dial(member.endpoints[0], "fetch", 10.0)
        except OSError:
            continue  # a member of an earlier life
        node.release(connection)
        found.append(member.endpoints)
    return found


def _load_from(trainer: Trainer, donors: list[tuple[str, ...]]) -> bool:
    """Every rank fetches its own slices. False if that did not give one whole state: then the journal has moved on, or
    the donor is gone."""
    mine = []
    for fragment in trainer.fragments:
        f = fragment.index
        try:
            bases, flats = fetch_fragment(trainer, donors, f)
        except OSError as error:
            print(f"{trainer.links.member}: {error}", flush=True)
            mine.append({-1})
            continue
        bases = bases or {trainer.state.fragments[f].base}
        mine.append(bases)
        if len(bases) == 1:
            trainer.planes.load(f, bases.copy().pop(), *flats)
    everyone = [
        json.loads(data) for data in trainer.region.gather_bytes(json.dumps([sorted(b) for b in mine]).encode())
    ]
    for f, expected in enumerate(trainer.state.fragments):
        bases = {base for rank in everyone for base in rank[f]}
        if len(bases) != 1 or min(bases) < expected.base:
            time.sleep(0.2)  # a round commits there just now
            return False
    return True
