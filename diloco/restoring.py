"""The newest state that can be had, into a Trainer: from what its predecessor has left in this machine's memory, else from a
member that is alive, else from the store, which both go for any mesh."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from ckpt.checkpoint import DamagedError
from diloco.bits import AGAIN, find_bits
from diloco.checkpoints import Checkpoints, go_back, none_whole, without_bits
from diloco.errors import ConfigError
from diloco.fetching import Fetch
from diloco.fold import State, fold
from diloco.journal import Journal
from diloco.lending import Loan, ask_for_moments, take_moments
from diloco.lineage import rounds_after
from diloco.losing import Search
from diloco.parallel import on_rank_0
from diloco.saving import HERE, Saver
from diloco.trainer import Trainer
from elastic.node import Node
from elastic.recovery import Donor

REPLAYED = 2
"""Rounds of each fragment whose bits members have: what is older than that is fetched from them."""
FETCHES = 5
"""So often members are asked in vain while the journal rests; then the store is. Two that disagree may do so for ever."""


def restore(trainer: Trainer, journal: Journal, entries: list[bytes]) -> None:
    """Theta and momentum from this machine, from the members that are alive, or from the store. Collective."""
    failed, known = 0, len(entries)
    while not _restore(trainer, journal, entries, ask=failed < FETCHES):
        failed = failed + 1 if len(entries) == known and failed < FETCHES else 0
        known = len(entries)


def _restore(trainer: Trainer, journal: Journal, entries: list[bytes], ask: bool) -> bool:
    """One attempt; ask: members, if any are alive. Collective. False: look again."""
    region, links = trainer.region, trainer.links
    trainer.behind = False  # an attempt before may have said so
    choice = on_rank_0(region, lambda: _choose(trainer, journal, entries, ask))
    if choice["entries"]:
        for entry in choice["entries"]:
            entries.append(entry.encode())
            trainer.state = fold(trainer.state, entries[-1])
        return False
    donors = [Donor(member, tuple(endpoints)) for member, endpoints in choice["donors"]]
    loan = _loan(trainer, donors) if choice["own"] is None else None
    if donors and not _load_from(trainer, journal, entries, donors):
        return False
    if (manifest := choice["manifest"]) is not None:
        try:
            _source(trainer, manifest).load(manifest, trainer.planes)
        except DamagedError:
            return False  # the one before is next
        if not _replay(trainer, rounds_after(entries, manifest["seq"])):
            if manifest["prefix"] == HERE:
                links.saver.found = {**manifest, "common": False}  # what it needs is not to be had
            return False
    trainer.adopt()
    own = _restore_own(trainer, choice["own"], entries)
    lent = loan is not None and take_moments(trainer, loan)
    links.saver.forget()
    if region.rank == 0:
        source = _named(manifest) if manifest else "a member that is alive"
        inner = f"inner state of {loan.donor.member}" if loan and lent else "fresh inner state"
        inner = f"inner state of entry {own['seq']}{' from ' + HERE if own['prefix'] == HERE else ''}" if own else inner
        print(f"{links.member}: state after {trainer.state.rounds} rounds from {source}, {inner}", flush=True)
    return True


def _loan(trainer: Trainer, donors: Sequence[Donor]) -> Loan | None:
    """Asked before anything is fetched: then its copy is ready when it is needed."""
    wanted = trainer.cfg.elastic.join_inner == "peer" and not trainer.data_parallel
    return ask_for_moments(trainer, donors) if wanted and donors else None


def _replay(trainer: Trainer, rounds: Sequence[tuple[State, dict[str, Any]]]) -> bool:
    """Steps what has been loaded through committed rounds. False: the bits of one are not to be had. Collective."""
    for before, entry in rounds:
        if (bits := find_bits(trainer, entry)) is None:
            return False
        trainer.outer_step(before, entry, bits)
        trainer.stored[entry["seq"]] = entry["attempt"]
    return True


def _restore_own(trainer: Trainer, own: dict[str, Any] | None, entries: list[bytes]) -> dict[str, Any] | None:
    """The region's own inner state. If no round was committed since, local parameters and counters hold, too. What is damaged
    costs its age: the one before comes instead, if there is one. Returns what was loaded. Collective."""
    while own is not None:
        exact = own["seq"] >= max(fragment.base for fragment in trainer.state.fragments)
        try:
            _source(trainer, own).load_own(own, trainer.inner, trainer.planes, moments_only=not exact)
        except DamagedError:
            trainer.adopt()
            own = on_rank_0(trainer.region, lambda: _own(trainer, entries))
            continue
        if exact:
            trainer.resume_from(own["progress"])
        return own
    return None


def _source(trainer: Trainer, manifest: dict[str, Any]) -> Saver | Checkpoints:
    return trainer.links.saver if manifest["prefix"] == HERE else trainer.links.checkpoints


def _named(manifest: dict[str, Any]) -> str:
    return HERE if manifest["prefix"] == HERE else f"checkpoint {manifest['prefix']}"


def _own(trainer: Trainer, entries: list[bytes]) -> dict[str, Any] | None:
    """The region's newest, this machine's if there are two."""
    checkpoints, found = trainer.links.checkpoints, trainer.links.saver.found
    here = next(checkpoints.on_the_way([found] if found else [], entries), None)
    stored = next(checkpoints.on_the_way(checkpoints.own(trainer.cfg.region.name), entries), None)
    return here if here and (stored is None or here["seq"] >= stored["seq"]) else stored


def _here(trainer: Trainer, own: dict[str, Any] | None, entries: list[bytes], donors: bool) -> dict[str, Any] | None:
    """This machine's θ and momentum, unless it has none or fetching newer ones costs less."""
    if own is None or own["prefix"] != HERE or not own["common"]:
        return None
    few = REPLAYED * len(trainer.fragments)
    return own if not donors or len(rounds_after(entries, own["seq"])) <= few else None


def _choose(trainer: Trainer, journal: Journal, entries: list[bytes], ask: bool) -> dict[str, Any]:
    """Rank 0: where to load from; or the entries that appeared meanwhile, a `rewind` of our own among them."""
    new = [entry.decode() for entry in journal.read()]
    choice: dict[str, Any] = {"entries": new, "donors": [], "manifest": None, "own": None}
    if new:
        return choice
    state, checkpoints = trainer.state, trainer.links.checkpoints
    choice["own"] = _own(trainer, entries)
    donors = _alive(trainer.links.node, state) if ask else []
    if (here := _here(trainer, choice["own"], entries, bool(donors))) is not None:
        choice["manifest"] = here
    elif donors:
        choice["donors"] = donors
    else:
        choice["manifest"] = next(checkpoints.on_the_way(checkpoints.candidates(), entries), None)
        if choice["manifest"] is None:
            raise ConfigError(none_whole(checkpoints.store.url))
    if not donors:
        manifest = choice["manifest"]
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
            go_back(trainer.links.member, checkpoints, journal, "lost", without_bits(entry["seq"]))
        elif move == "over":
            return []
        if new := [data.decode() for data in journal.read()]:
            return new
        time.sleep(AGAIN)
    return []


def _alive(node: Node, state: State) -> list[tuple[str, tuple[str, ...]]]:
    """The members whose rank 0 answers, and their ranks' endpoints."""
    found = []
    for member in state.members.values():
        try:
            connection, hello = node.dial(member.endpoints[0], "fetch", 10.0)
        except OSError:
            continue  # a member of an earlier life
        node.release(connection)
        if hello["member"] == member.id:  # or somebody, maybe this rank itself, has its port now
            found.append((member.id, member.endpoints))
    return found


def _load_from(trainer: Trainer, journal: Journal, entries: list[bytes], donors: Sequence[Donor]) -> bool:
    """Every rank fetches its own slices from all donors, and replays what was committed meanwhile. False: that gave no whole
    state. Collective."""
    planes, region, new = trainer.planes, trainer.region, list[bytes]()

    def look() -> tuple[list[bytes], State]:
        new.extend(journal.read())
        assert journal.state is not None
        return [*entries, *new], journal.state

    into = {f: [getattr(planes, name)[f] for name in planes.names] for f in range(len(planes.fragments))}
    for f in into:
        planes.forget(f)
    fetch, epoch = Fetch(trainer.links.node, region, planes, into), trainer.state.epoch
    try:
        fetch.run(donors, look)
    except OSError as error:
        print(f"{trainer.links.member}: {error}", flush=True)
        time.sleep(AGAIN)
    for text in json.loads(region.broadcast_bytes(json.dumps([data.decode() for data in new]).encode())):
        entries.append(text.encode())
        trainer.state = fold(trainer.state, entries[-1])
    if not fetch.bases or trainer.state.epoch != epoch:
        return False
    trainer.unproven = fetch.words
    for f, held in fetch.held.items():
        planes.arrived(f, fetch.bases[f][0], held)
    if region.rank == 0:
        shares = ", ".join(f"{count / 1e6:.3g} MB from {member}" for member, count in sorted(fetch.served.items()))
        print(f"{trainer.links.member}: fetched {shares}", flush=True)
    oldest = min(planes.bases)
    late = [(s, e) for s, e in rounds_after(entries, oldest) if e["seq"] > planes.bases[e["fragment"]]]
    return _replay(trainer, late)
