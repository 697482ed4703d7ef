"""When and what a region saves: the global planes for everyone, its own inner planes for itself, both in flat space."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from ckpt.checkpoint import DamagedError, Piece, commit_manifest, load_manifest, save_shard
from ckpt.layout import encode_layout
from ckpt.pieces import cut, groups
from ckpt.reading import Reader, Want, newest, verify
from ckpt.store import MissingError, Store, StoreError
from diloco.checkpointing import CkptConfig
from diloco.config import ModelConfig
from diloco.errors import ConfigError
from diloco.fold import State
from diloco.inner import Inner
from diloco.journal import Journal, entries_of
from diloco.lineage import belongs, on_path, path_of, rounds_after
from diloco.parallel import Region, on_rank_0
from diloco.planes import Planes
from diloco.settings import JournalError
from diloco.shards import Select, Shards
from diloco.slices import load_slices, spans

MOMENTS = ("exp_avg", "exp_avg_sq")
RESIDUAL = "residual"
OUTAGE = 120.0
"""Seconds that a load waits for a store that does not answer."""
AGAIN = 1.0
"""Seconds between two tries then."""
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run, as one rank of one region sees them. All methods but the queries are collective."""

    def __init__(
        self, store: Store, run: str, region: Region, shards: Shards, keep: CkptConfig, model: dict[str, Any]
    ) -> None:
        """keep: what is kept. model: what `describe` says of it."""
        self.store, self.region, self.shards, self.keep = store, region, shards, keep
        layout = encode_layout([[(slot.name, slot.shape) for slot in f.slots] for f in shards.fragments])
        self.what = {"model": model, "layout": layout}
        """In every global checkpoint, so that it can be exported without this code."""
        self.root = f"checkpoints/{run}"
        self.damaged = set[str]()
        """Prefixes of checkpoints that could not be loaded, on all ranks."""
        self.own_root = f"regions/{run}"
        self.bits_root = _bits_root(run)

    # Global: θ, momentum, and the counters that a rewind goes back to

    def save_first(self, planes: Planes, started: dict[str, Any] | None = None) -> str:
        """θ₀, before the run is opened. started: what it was made from, if from a checkpoint. Returns its prefix."""
        start = {
            "rounds": 0,
            "cursor": 0,
            "own": {},
            "applied": 0,
            "dropped": 0,
            "rejected": 0,
            "skipped": 0,
            "pool": [],
            "fragments": [{} for _ in planes.fragments],
        }
        body = {
            "seq": 0,
            "hash": "",
            "epoch": 0,
            "counters": start,
            **self.what,
            **({"started": started} if started else {}),
        }
        return self._save(f"{self.root}/0", "r", body, _global_pieces(planes))

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Manifests that load, newest first; a damaged one is reported and passed over. Rank 0 asks."""
        return newest(self.store, self.root, _report)

    def on_the_way(self, manifests: Iterable[dict[str, Any]], entries: Sequence[bytes]) -> Iterator[dict[str, Any]]:
        """Those on the path to the journal's head that no load found damaged. Rank 0 asks."""
        path = path_of(entries)
        for manifest in manifests:
            if manifest["prefix"] not in self.damaged and belongs(manifest, entries) and on_path(manifest["seq"], path):
                yield manifest

    def newest_whole(self, manifests: Iterable[dict[str, Any]], entries: Sequence[bytes]) -> dict[str, Any] | None:
        """The first on the way whose every byte verifies: a run must not go back to what others cannot load. Rank 0 asks."""
        for manifest in self.on_the_way(manifests, entries):
            try:
                verify(self.store, manifest)
            except DamagedError as error:
                _report(manifest["prefix"], error)
            else:
                return manifest
        return None

    def load(self, manifest: dict[str, Any], planes: Planes) -> None:
        """This rank's slices of θ and momentum, verified, straight into the planes, which hold nothing until every rank has
        its own. Collective: raises DamagedError or StoreError on all ranks, and says which checkpoint is damaged."""
        fragments = manifest["counters"]["fragments"]
        for f in range(len(fragments)):
            planes.forget(f)
        wants = [
            Want(plane, f, self.shards.span(f)[0], getattr(planes, plane)[f])
            for f in range(len(fragments))
            for plane in planes.names
        ]
        self.agreed(manifest["prefix"], lambda: Reader(self.store, manifest).read_into(wants))
        for f, fragment in enumerate(fragments):
            planes.arrived(f, fragment.get("base", 0), ())

    def agreed(self, prefix: str, read: Callable[[], T]) -> T:
        """What `read` returns, if it does so on every rank; otherwise all raise DamagedError, and leave this checkpoint out from
        now on, or StoreError. An outage is waited for. Collective."""
        until = time.monotonic() + OUTAGE
        while True:
            value, said = _tried(read)
            answers = [json.loads(data) for data in self.region.gather_bytes(json.dumps(said).encode())]
            if away := next((text for kind, text in answers if kind == "away"), ""):
                # Rank 0's clock, lest some go on and others do not.
                if self.region.broadcast_bytes(b"on" if time.monotonic() < until else b"") == b"":
                    raise StoreError(away)
                if self.region.rank == 0:
                    print(f"{away}; trying again", flush=True)
                time.sleep(AGAIN)
            elif damages := [text for kind, text in answers if kind == "damaged"]:
                self.damaged.add(prefix)
                if self.region.rank == 0:
                    _report(prefix, DamagedError(damages[0]))
                raise DamagedError(damages[0])
            else:
                assert value is not None
                return value[0]

    def load_fragment(self, prefix: str, fragment: int, planes: Planes) -> tuple[set[int], list[Tensor]]:
        """This rank's slices of one fragment's θ and moments, and the seq of the last round in them."""
        manifest = load_manifest(self.store, prefix)
        reader, span = Reader(self.store, manifest), self.shards.span(fragment)
        flats = [reader.read(plane, fragment, *span) for plane in planes.names]
        return {manifest["counters"]["fragments"][fragment]["base"]}, flats

    def load_prefix(self, state: State, planes: Planes) -> None:
        """From the checkpoint that the current epoch starts from; see load."""
        prefix = state.checkpoint
        self.load(self.agreed(prefix, lambda: load_manifest(self.store, prefix)), planes)

    # A region's own: local parameters, AdamW's moments, error-feedback residual, and where its steps stand

    def own(self, name: str) -> Iterator[dict[str, Any]]:
        """Manifests of the region's own planes that load, newest first. Rank 0 asks."""
        return newest(self.store, f"{self.own_root}/{name}", _report)

    def load_own(self, manifest: dict[str, Any], inner: Inner, planes: Planes, moments_only: bool) -> None:
        """Local parameters, residual (if there is one, there and here) and AdamW's moments, whatever mesh wrote them; or the
        moments alone. Collective: raises DamagedError on all ranks, and StoreError; some of it has been written then."""
        reader, prefix = Reader(self.store, manifest), manifest["prefix"]
        inner.materialise()
        for plane, select in selections(inner).items():
            for f in range(len(self.shards.fragments)):
                if plane in MOMENTS or not moments_only:
                    span = self.shards.span(f)
                    self.shards.write(f, self.agreed(prefix, partial(reader.read, plane, f, *span)), select)
        inner.set_updates(manifest["progress"]["adam"])
        has_residual = any(piece["plane"] == RESIDUAL for shard in manifest["shards"] for piece in shard["pieces"])
        for f, residual in enumerate(planes.residual or []):
            if has_residual and not moments_only:
                want = Want(RESIDUAL, f, self.shards.span(f)[0], residual)
                self.agreed(prefix, partial(reader.read_into, [want]))

    # The bits of rounds. Any thread, any rank

    def load_bits(self, attempt: str, first: int, last: int, size: Callable[[int, int], int]) -> Tensor | None:
        """Blocks [first, last) from whatever slices there are; None if some are missing. size(a, b): bytes of [a, b)."""
        return load_slices(self.store, f"{self.bits_root}/{attempt}", first, last, size)

    def has_bits(self, attempt: str, blocks: int) -> bool:
        """Whether all blocks of the attempt's result are stored."""
        at = 0
        for a, b in spans(self.store, f"{self.bits_root}/{attempt}"):
            at = max(at, b) if a <= at else at
        return at >= blocks

    def _save(self, prefix: str, shard: str, body: dict[str, Any], pieces: Iterator[Piece]) -> str:
        """Raises StoreError on every rank if any of them failed."""
        records, failure = [], ""
        for i, group in enumerate(groups(pieces)):
            try:
                if not failure:
                    records.append(save_shard(self.store, prefix, f"{shard}{self.region.rank}-{i}", group))
            except StoreError as error:
                failure = str(error)  # and on with the pieces: making them is collective
        ranks = self._agree(records, failure)
        try:
            if self.region.rank == 0:
                commit_manifest(self.store, prefix, body, [record for rank in ranks for record in rank])
        except StoreError as error:
            failure = str(error)
        self._agree([], failure)
        return prefix

    def _agree(self, records: list[dict[str, Any]], failure: str) -> list[list[dict[str, Any]]]:
        """Every rank's records, on every rank. Raises StoreError there if one of them failed."""
        said = [json.loads(data) for data in self.region.gather_bytes(json.dumps([records, failure]).encode())]
        if failures := [failure for _, failure in said if failure]:
            raise StoreError(failures[0])
        return [records for records, _ in said]


def _tried(read: Callable[[], T]) -> tuple[tuple[T] | None, tuple[str, str]]:
    """(what it returned, what there is to say): ok, damaged or away, and a sentence."""
    try:
        return (read(),), ("ok", "")
    except (DamagedError, MissingError) as error:  # its objects are named: one that is not there has been lost
        return None, ("damaged", str(error))
    except StoreError as error:
        return None, ("away", str(error))


def save_bits(store: Store, run: str, attempt: str, first: int, last: int, bits: Tensor) -> None:
    """One rank's slice, blocks [first, last), of an attempt's encoded result, before the round is committed. Any process."""
    store.create(f"{_bits_root(run)}/{attempt}/{first}-{last}", bits.numpy().tobytes())


def _bits_root(run: str) -> str:
    return f"rounds/{run}"


def go_back(member: str, checkpoints: Checkpoints, journal: Journal, reason: str, why: str) -> bool:
    """Appends a `rewind` to the newest checkpoint, for this reason: lost or damaged. why: the rest of a sentence. False: another
    entry was first. Raises ConfigError if there is no whole checkpoint. Rank 0."""
    assert journal.state is not None
    entries = entries_of(journal.store, journal.state.seq)
    if (manifest := checkpoints.newest_whole(checkpoints.candidates(), entries)) is None:
        raise ConfigError(none_whole(checkpoints.store.url))
    rounds = len(rounds_after(entries, manifest["seq"]))
    print(
        f"{member}: {rounds} round(s) were committed after the newest checkpoint that is whole, and {why}: going back to "
        f"entry {manifest['seq']}",
        flush=True,
    )
    return journal.append(rewind_to(manifest, reason))


def without_bits(seq: int) -> str:
    return f"the bits of entry {seq} are neither in the store nor with a member that answers"


def reload(member: str, checkpoints: Checkpoints, state: State, planes: Planes) -> bool:
    """The planes as at the checkpoint of a `rewind`. False: it is damaged, and another `rewind` follows. Collective."""
    try:
        checkpoints.load_prefix(state, planes)
    except DamagedError:
        on_rank_0(checkpoints.region, lambda: _go_further_back(member, checkpoints, state))
        return False
    return True


def _go_further_back(member: str, checkpoints: Checkpoints, state: State) -> None:
    """Unless somebody else has. Raises JournalError if others could read it and have gone on."""
    journal, over = Journal(checkpoints.store), False
    while not over:
        journal.read()
        now = journal.state
        assert now is not None
        if now.epoch != state.epoch or now.stopped is not None:
            return
        if any(fragment.base > now.epoch for fragment in now.fragments):
            raise JournalError(
                f"{state.checkpoint} is damaged as this region reads it, and others have gone on: start it again"
            )
        over = go_back(member, checkpoints, journal, "damaged", f"checkpoint {state.checkpoint} is damaged")


def rewind_to(manifest: dict[str, Any], reason: str, skip_data: bool = False) -> dict[str, Any]:
    """The fields of a `rewind`. reason: lost, damaged, or by hand."""
    there = {"checkpoint": manifest["prefix"], "counters": manifest["counters"]}
    return {"kind": "rewind", "reason": reason, "skip_data": skip_data, **there}


def none_whole(url: str) -> str:
    return f"run.store={url} has no checkpoint that is whole: restore one, or set run.dir to a new directory"


def moment(inner: Inner, name: str) -> Select:
    """One of `MOMENTS`."""

    def select(parameter: nn.Parameter) -> Tensor:
        tensor: Tensor = inner.optimizer.state[parameter][name]
        return tensor

    return select


def selections(inner: Inner) -> dict[str, Select]:
    return {"x": lambda parameter: parameter, **{name: moment(inner, name) for name in MOMENTS}}


def describe(model: nn.Module, cfg: ModelConfig, seq_len: int) -> dict[str, Any]:
    """The model's config as JSON, defaults included where the model has them as a dataclass `args`: they may change. What is
    no JSON in there is left out, lest a model of one's own cannot be saved."""
    args = getattr(model, "args", None)
    found = {field.name: getattr(args, field.name, None) for field in fields(args)} if is_dataclass(args) else {}
    full = {name: value for name, value in found.items() if _is_plain(value)}
    return {"target": cfg.target, "args": {**full, **cfg.args}, "seq_len": seq_len}


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))


def _global_pieces(planes: Planes) -> Iterator[Piece]:
    for f, fragment in enumerate(planes.fragments):
        for plane in planes.names:
            yield from cut(plane, f, *fragment.span(*planes.slices[f]), getattr(planes, plane)[f])


def _report(prefix: str, error: DamagedError) -> None:
    print(f"checkpoint {prefix} is passed over: {error}", flush=True)
