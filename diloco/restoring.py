"""The newest state that can be had, into a Trainer: from a member that is alive, else from the store; any mesh."""

from __future__ import annotations

import json
import time
from typing import Any

from diloco.bits import AGAIN, fetch_fragment, find_bits
from diloco.checkpoints import go_back, none_whole
from diloco.errors import ConfigError
from diloco.fold import State, fold
from diloco.journal import Journal
from diloco.lineage import rounds_after
from diloco.losing import Search
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
        for before, entry in rounds_after(entries, manifest["seq"]):
            if (bits := find_bits(trainer, entry)) is None:
                return False
            trainer.outer_step(before, entry, bits)
            trainer.stored[entry["seq"]] = entry["attempt"]
    trainer.adopt()
    _restore_own(trainer, choice["own"], choice["exact"])
    if region.rank == 0:
        source = f"checkpoint {manifest['prefix']}" if manifest else "a member that is alive"
        inner = f"inner state of entry {choice['own']['seq']}" if choice["own"] else "fresh inner state"
        print(f"{links.member}: state after {trainer.state.rounds} rounds from {source}, {inner}", flush=True)
    return True


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
    own = checkpoints.newest_whole(checkpoints.own(trainer.cfg.region.name), entries)
    choice["own"] = own
    choice["exact"] = own is not None and own["seq"] >= max(fragment.base for fragment in state.fragments)
    choice["donors"] = _alive(trainer.links.node, state)
    if not choice["donors"]:
        choice["manifest"] = manifest = checkpoints.newest_whole(checkpoints.candidates(), entries)
        if manifest is None:
            raise ConfigError(none_whole(checkpoints.store.url))
        for _, entry in rounds_after(entries, manifest["seq"]):
            if new := _wait_for_bits(trainer, journal, entry):
                choice["entries"] = new
                break
    return choice


def _wait_for_bits(trainer: Trainer, journal: Journal, entry: dict[str, Any]) -> list[str]:
    """Until the store has those of a round: there is no peer to ask, but somebody may hear the journal. Or until the journal
    moves: its new entries."""
    checkpoints, blocks = trainer.links.checkpoints, trainer.fragments[entry["fragment"]].blocks
    search = Search(entry["seq"], trainer.cfg.ckpt.lost_wait)
    while not checkpoints.has_bits(entry["attempt"], blocks):
        assert journal.state is not None
        move = search.move(journal.state, time.monotonic())
        if move == "lost":
            journal.append({"kind": "lost", "round": entry["seq"], "member": trainer.links.member})
        elif move == "rewind":
            go_back(trainer.links.member, checkpoints, journal, entry["seq"])
        elif move == "over":
            return []
        if new := [data.decode() for data in journal.read()]:
            return new
        time.sleep(AGAIN)
    return []


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
