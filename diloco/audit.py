"""Checking a run from what its store holds: entries, bits and checkpoints against each other, and θ rebuilt bit for bit. Needs
neither the model nor a region."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ckpt.checkpoint import DamagedError, load_manifest
from ckpt.reading import Reader, verify
from ckpt.store import MissingError, Store
from diloco.averaging import Averaging
from diloco.codec import CODECS
from diloco.errors import ConfigError
from diloco.fold import JournalError, State, counters, fold
from diloco.fragments import Fragment, Slot, digest
from diloco.journal import entry_key
from diloco.lineage import belongs, on_path, path_of, rounds_after
from diloco.planes import Bits, Planes
from diloco.slices import load_slices

MANIFEST = "/manifest.json"


@dataclass
class Report:
    """What was looked at, and what is missing or wrong, one sentence each."""

    wrong: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1


class Run:
    """A run's store, as far as its journal folds. Raises ConfigError if there is no journal."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.report = store, Report()
        keys = [key for key in store.list("journal") if key.endswith(".json")]
        if entry_key(0) not in keys:
            raise ConfigError(f"RUN={name} holds no journal: name a run directory or the URL of a run's store")
        self.entries: list[bytes] = []
        self.states: list[State] = []
        self._read(keys)

    def _read(self, keys: Sequence[str]) -> None:
        for seq, key in enumerate(keys):
            if key != entry_key(seq):
                self.report.wrong.append(f"journal entry {seq} is missing, and {key} is there")
                return
            data = self.store.read(key)
            try:
                self.states.append(fold(self.states[-1] if self.states else None, data))
            except JournalError as error:
                self.report.wrong.append(str(error))
                return
            self.entries.append(data)
            self.report.count("entries")

    @property
    def state(self) -> State:
        return self.states[-1]

    def checkpoints(self, root: str) -> Iterator[dict[str, Any]]:
        """Manifests below `root`, oldest first; damaged ones are reported."""
        prefixes = [key.removesuffix(MANIFEST) for key in self.store.list(root) if key.endswith(MANIFEST)]
        for prefix in sorted(prefixes, key=lambda prefix: int(prefix.rsplit("/", 1)[-1])):
            try:
                yield load_manifest(self.store, prefix)
            except (DamagedError, MissingError) as error:
                self.report.wrong.append(str(error))

    @property
    def root(self) -> str:
        return f"checkpoints/{self.state.run}"

    def averaging(self, manifest: dict[str, Any]) -> Averaging:
        """The run's codec and fragments, whose sizes a checkpoint says."""
        reader = Reader(self.store, manifest)
        sizes = [reader.elements("theta", f) for f in range(len(self.state.fragments))]
        fragments = [Fragment(f, (Slot("flat", (size,), 0),)) for f, size in enumerate(sizes)]
        return Averaging(fragments, CODECS[self.state.fingerprint["codec"]])

    def bits(self, averaging: Averaging, entry: dict[str, Any]) -> Bits | None:
        """A round's, whole; None if not all of them are stored. Raises DamagedError if they are not the entry's."""
        f, members = entry["fragment"], len(entry["answers"])
        blocks, size = averaging.blocks(f), partial(averaging.result_size, f, members=members)
        data = load_slices(self.store, f"rounds/{self.state.run}/{entry['attempt']}", 0, blocks, size)
        if data is None:
            return None
        whole = len(data) == size(0, blocks)
        if not whole or digest(averaging.digests(f, 0, blocks, data, members)) != entry["digest"]:
            raise DamagedError(f"the stored bits of entry {entry['seq']} do not have the digest of the entry")
        return Bits(f, members, data)


def check(run: Run) -> Report:
    """Everything that is stored, against the entries."""
    if run.states:
        manifests = list(run.checkpoints(run.root))
        whole = [manifest for manifest in manifests if _whole(run, manifest)]
        for manifest in run.checkpoints(f"regions/{run.state.run}"):
            _bytes(run, manifest)
        _bits(run, whole)
    return run.report


def _bytes(run: Run, manifest: dict[str, Any]) -> bool:
    try:
        verify(run.store, manifest)
    except DamagedError as error:
        run.report.wrong.append(str(error))
        return False
    run.report.count("checkpoints")
    return True


def _whole(run: Run, manifest: dict[str, Any]) -> bool:
    """A checkpoint's bytes, its counters, and its planes' digests in the entries that build on it."""
    if not _bytes(run, manifest):
        return False
    seq, where = manifest["seq"], manifest["prefix"]
    if not belongs(manifest, run.entries):
        run.report.wrong.append(f"{where} is of another journal: its hash is not that of entry {seq}")
        return False
    if seq and manifest["counters"] != json.loads(json.dumps(counters(run.states[seq]))):
        run.report.wrong.append(f"{where} has other counters than entry {seq}")
        return False
    planes = _load(run, manifest)
    path, said = path_of(run.entries), set()
    for _, entry in rounds_after(run.entries, seq) if on_path(seq, path) else []:
        f = entry["fragment"]
        if f not in said:
            said.add(f)
            run.report.wrong += _differences(planes, entry, where)
    return True


def _differences(planes: Planes, entry: dict[str, Any], where: str) -> list[str]:
    """Between the planes that a round applies to, and what it says of them."""
    f = entry["fragment"]
    theta = digest(planes.digests("theta", f))
    others = (digest(planes.digests(name, f)) for name in planes.names[1:])
    mine = {"theta": theta, "momentum": digest("".join(others).encode())}
    return [
        f"{where}: {name} of fragment {f} has the digest {mine[name][:12]}, and entry {entry['seq']} builds on "
        f"{str(entry[name])[:12]}"
        for name in ("theta", "momentum")
        if entry[name] != mine[name]
    ]


def _bits(run: Run, whole: Sequence[dict[str, Any]]) -> None:
    """Stored bits are the entries'; and those that the newest whole checkpoint lacks are there."""
    path = path_of(run.entries)
    usable = [manifest for manifest in whole if on_path(manifest["seq"], path)]
    if not usable:
        run.report.wrong.append(f"{run.store.url} has no checkpoint of this run that is whole")
        return
    averaging, newest = run.averaging(usable[-1]), usable[-1]["seq"]
    for _, entry in rounds_after(run.entries, -1):
        try:
            found = run.bits(averaging, entry)
        except DamagedError as error:
            run.report.wrong.append(str(error))
            continue
        if found is not None:
            run.report.count("rounds' bits")
        elif entry["seq"] > newest:
            run.report.wrong.append(
                f"the bits of entry {entry['seq']} are not stored, and the newest whole checkpoint is of entry {newest}"
            )


def _load(run: Run, manifest: dict[str, Any]) -> Planes:
    """θ and moments of a checkpoint, whole."""
    reader, fragments = Reader(run.store, manifest), run.averaging(manifest).fragments
    planes = Planes(fragments, [(0, f.blocks) for f in fragments], variance=bool(reader.elements("variance", 0)))
    for f, there in enumerate(manifest["counters"]["fragments"]):
        flats = [reader.read(name, f, 0, fragments[f].elements) for name in planes.names]
        planes.load(f, there.get("base", 0), *flats)
    return planes


def replay(run: Run, start: int | None, to: int | None) -> Iterator[str]:
    """θ and momentum from the checkpoint of entry `start` (the newest) up to entry `to` (the head), line by line. Raises
    ConfigError if that cannot be done, DamagedError where the digests differ."""
    entries = run.entries if to is None else run.entries[: to + 1]
    if to is not None and not 0 <= to < len(run.entries):
        raise ConfigError(f"--to={to} is no entry of the run: name one from 0 to {len(run.entries) - 1}")
    manifest = _start(run, entries, start)
    verify(run.store, manifest)
    planes, averaging = _load(run, manifest), run.averaging(manifest)
    yield f"checkpoint of entry {manifest['seq']}"
    for before, entry in rounds_after(entries, manifest["seq"]):
        if differences := _differences(planes, entry, f"before entry {entry['seq']}"):
            raise DamagedError(differences[0])
        _step(run, planes, averaging, before, entry)
        f = entry["fragment"]
        yield f"entry {entry['seq']} · fragment {f} · θ {digest(planes.digests('theta', f))}"
    for f in range(len(planes.fragments)):
        theta, momentum = (digest(planes.digests(name, f)) for name in ("theta", "momentum"))
        yield f"at entry {len(entries) - 1} · fragment {f} · θ {theta} · momentum {momentum}"


def _start(run: Run, entries: Sequence[bytes], start: int | None) -> dict[str, Any]:
    path = path_of(entries)
    there = [m for m in run.checkpoints(run.root) if belongs(m, entries) and on_path(m["seq"], path)]
    chosen = [manifest for manifest in there if start in (None, manifest["seq"])]
    if not chosen:
        names = ", ".join(str(manifest["seq"]) for manifest in there) or "none"
        raise ConfigError(f"--from={start} is no checkpoint on the way to entry {len(entries) - 1}: those are {names}")
    return chosen[-1]


def _step(run: Run, planes: Planes, averaging: Averaging, before: State, entry: dict[str, Any]) -> None:
    if planes.variance:
        raise ConfigError(
            f"entry {entry['seq']} is a step of outer.optimizer=adamw, whose numbers are in the regions' config and not in "
            "the journal: name another checkpoint with --from, or an earlier entry with --to"
        )
    f = entry["fragment"]
    if (bits := run.bits(averaging, entry)) is None:
        raise DamagedError(f"the bits of entry {entry['seq']} are not stored: θ cannot be rebuilt beyond it")
    gradients = averaging.decode_runs(f, 0, averaging.blocks(f), bits.data, before.weights(f, entry["answers"]))
    planes.step(entry["seq"], bits, gradients, before.settings.lr, before.settings.momentum)
