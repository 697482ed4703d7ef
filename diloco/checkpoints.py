"""When and what a region saves: the global planes for everyone, its own inner planes for itself, both in flat space."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from ckpt.checkpoint import DamagedError, Piece, commit_manifest, load_manifest, save_shard
from ckpt.layout import encode_layout
from ckpt.pieces import cut, groups
from ckpt.reading import Reader, newest, verify
from ckpt.store import Store, StoreError
from diloco.config import ModelConfig
from diloco.errors import ConfigError
from diloco.fold import State, counters
from diloco.inner import Inner
from diloco.journal import Journal, entries_of
from diloco.lineage import belongs, on_path, origin, path_of, rounds_after
from diloco.parallel import Region
from diloco.planes import Planes
from diloco.shards import Select, Shards
from diloco.slices import load_slices, spans

MOMENTS = ("exp_avg", "exp_avg_sq")
RESIDUAL = "residual"


class Checkpoints:
    """The checkpoints of one run, as one rank of one region sees them. All methods but the queries are collective."""

    def __init__(
        self, store: Store, run: str, region: Region, shards: Shards, keep: int, model: dict[str, Any]
    ) -> None:
        """model: what `describe` says of it."""
        self.store, self.region, self.shards, self.keep = store, region, shards, keep
        layout = encode_layout([[(slot.name, slot.shape) for slot in f.slots] for f in shards.fragments])
        self.what = {"model": model, "layout": layout}
        """In every global checkpoint, so that it can be exported without this code."""
        self.root = f"checkpoints/{run}"
        self.own_root = f"regions/{run}"
        self.bits_root = _bits_root(run)

    # Global: θ, momentum, and the counters that a rewind goes back to

    def save_first(self, planes: Planes) -> str:
        """θ₀, before the run is opened. Returns its prefix."""
        start = {
            "rounds": 0,
            "cursor": 0,
            "applied": 0,
            "dropped": 0,
            "rejected": 0,
            "skipped": 0,
            "pool": [],
            "fragments": [{} for _ in planes.fragments],
        }
        body = {"seq": 0, "hash": "", "epoch": 0, "counters": start, **self.what}
        return self._save(f"{self.root}/0", "r", body, _global_pieces(planes))

    def save(self, planes: Planes, state: State, member: str) -> str:
        """The state after entry `state.seq`: every fragment's planes are those of `state`."""
        entry = {"seq": state.seq, "hash": state.hash, "epoch": state.epoch, "counters": counters(state)}
        body = {**entry, **self.what}
        prefix = self._save(f"{self.root}/{state.seq}", f"{member}-r", body, _global_pieces(planes))
        self._prune(self.root, spare=origin(state.checkpoint))
        return prefix

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Manifests that load, newest first; a damaged one is reported and passed over. Rank 0 asks."""
        return newest(self.store, self.root, _report)

    def newest_whole(self, manifests: Iterable[dict[str, Any]], entries: Sequence[bytes]) -> dict[str, Any] | None:
        """The first that is on the path to the journal's head, and whose every byte verifies. Rank 0 asks."""
        path = path_of(entries)
        for manifest in manifests:
            if belongs(manifest, entries) and on_path(manifest["seq"], path):
                try:
                    verify(self.store, manifest)
                except DamagedError as error:
                    _report(manifest["prefix"], error)
                else:
                    return manifest
        return None

    def load(self, manifest: dict[str, Any], planes: Planes) -> None:
        """This rank's slices of θ and momentum."""
        reader = Reader(self.store, manifest)
        for f, fragment in enumerate(manifest["counters"]["fragments"]):
            flats = [reader.read(plane, f, *self.shards.span(f)) for plane in planes.names]
            planes.load(f, fragment.get("base", 0), *flats)

    def load_fragment(self, prefix: str, fragment: int, planes: Planes) -> tuple[set[int], list[Tensor]]:
        """This rank's slices of one fragment's θ and moments, and the seq of the last round in them."""
        manifest = load_manifest(self.store, prefix)
        reader, span = Reader(self.store, manifest), self.shards.span(fragment)
        flats = [reader.read(plane, fragment, *span) for plane in planes.names]
        return {manifest["counters"]["fragments"][fragment]["base"]}, flats

    def load_prefix(self, state: State, planes: Planes) -> None:
        """From the checkpoint that the current epoch starts from."""
        self.load(load_manifest(self.store, state.checkpoint), planes)

    # A region's own: local parameters, AdamW's moments, error-feedback residual, and where its steps stand

    def save_own(self, name: str, state: State, inner: Inner, planes: Planes, progress: dict[str, Any]) -> None:
        """progress: the trainer's own counters (JSON)."""
        body = {"seq": state.seq, "hash": state.hash, "progress": progress}
        root = f"{self.own_root}/{name}"
        self._save(f"{root}/{state.seq}", "r", body, self._own_pieces(inner, planes))
        self._prune(root)

    def _own_pieces(self, inner: Inner, planes: Planes) -> Iterator[Piece]:
        for plane, select in _selections(inner).items():
            for f in range(len(self.shards.fragments)):
                yield from cut(plane, f, *self.shards.span(f), self.shards.read(f, select))
        for f, residual in enumerate(planes.residual or []):
            yield from cut(RESIDUAL, f, *self.shards.span(f), residual)

    def own(self, name: str) -> Iterator[dict[str, Any]]:
        """Manifests of the region's own planes that load, newest first. Rank 0 asks."""
        return newest(self.store, f"{self.own_root}/{name}", _report)

    def load_own(self, manifest: dict[str, Any], inner: Inner, planes: Planes, moments_only: bool) -> None:
        """Local parameters, residual (if there is one, there and here) and AdamW's moments, whatever mesh wrote them; or the
        moments alone."""
        reader = Reader(self.store, manifest)
        inner.materialise()
        for plane, select in _selections(inner).items():
            for f in range(len(self.shards.fragments)):
                if plane in MOMENTS or not moments_only:
                    self.shards.write(f, reader.read(plane, f, *self.shards.span(f)), select)
        inner.set_updates(manifest["progress"]["adam"])
        has_residual = any(piece["plane"] == RESIDUAL for shard in manifest["shards"] for piece in shard["pieces"])
        for f, residual in enumerate(planes.residual or []):
            if has_residual and not moments_only:
                residual.copy_(reader.read(RESIDUAL, f, *self.shards.span(f)))

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

    def drop_bits(self, stored: dict[int, str]) -> dict[int, str]:
        """Deletes the bits of rounds that every kept checkpoint includes. stored: seq -> attempt. Returns the rest."""
        with _left_for_later():
            oldest = min(self._numbers(self.root)[1:], default=0)
            for seq in [seq for seq in stored if seq <= oldest]:
                for key in self._bits(stored[seq]):
                    self.store.delete(key)
            return {seq: attempt for seq, attempt in stored.items() if seq > oldest}
        return stored

    def _bits(self, attempt: str) -> list[str]:
        return self.store.list(f"{self.bits_root}/{attempt}/")

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

    def _numbers(self, root: str) -> list[int]:
        keys = [key for key in self.store.list(root) if key.endswith("/manifest.json")]
        return sorted(int(key.split("/")[-2]) for key in keys)

    def _prune(self, root: str, spare: int = 0) -> None:
        """Keeps the first, the last `keep`, and the one that a region may still have to rewind to. The manifest goes first, so
        that nothing half there looks whole."""
        if self.region.rank != 0:
            return
        with _left_for_later():
            for number in [n for n in self._numbers(root)[: -self.keep] if n not in (0, spare)]:
                self.store.delete(f"{root}/{number}/manifest.json")
                for key in self.store.list(f"{root}/{number}/"):
                    self.store.delete(key)


def save_bits(store: Store, run: str, attempt: str, first: int, last: int, bits: Tensor) -> None:
    """One rank's slice, blocks [first, last), of an attempt's encoded result, before the round is committed. Any process."""
    store.create(f"{_bits_root(run)}/{attempt}/{first}-{last}", bits.numpy().tobytes())


def _bits_root(run: str) -> str:
    return f"rounds/{run}"


def go_back(member: str, checkpoints: Checkpoints, journal: Journal, lost: int) -> None:
    """Appends a `rewind` to the newest checkpoint, since nobody has the bits of round `lost`; unless another entry is first.
    Raises ConfigError if there is no whole checkpoint. Rank 0."""
    assert journal.state is not None
    entries = entries_of(journal.store, journal.state.seq)
    if (manifest := checkpoints.newest_whole(checkpoints.candidates(), entries)) is None:
        raise ConfigError(none_whole(checkpoints.store.url))
    rounds = len(rounds_after(entries, manifest["seq"]))
    print(
        f"{member}: {rounds} round(s) were committed after the newest checkpoint, and the bits of entry {lost} are neither in "
        f"the store nor with a member that answers: going back to entry {manifest['seq']}",
        flush=True,
    )
    journal.append(rewind_to(manifest, "lost"))


def rewind_to(manifest: dict[str, Any], reason: str, skip_data: bool = False) -> dict[str, Any]:
    """The fields of a `rewind`. reason: lost, or by hand."""
    there = {"checkpoint": manifest["prefix"], "counters": manifest["counters"]}
    return {"kind": "rewind", "reason": reason, "skip_data": skip_data, **there}


def none_whole(url: str) -> str:
    return f"run.store={url} has no checkpoint that is whole: restore one, or set run.dir to a new directory"


@contextmanager
def _left_for_later() -> Iterator[None]:
    """What a clean-up leaves behind, the next one finds."""
    try:
        yield
    except StoreError as error:
        print(f"clean-up: {error}; left for the next one", flush=True)


def moment(inner: Inner, name: str) -> Select:
    """One of `MOMENTS`."""

    def select(parameter: nn.Parameter) -> Tensor:
        tensor: Tensor = inner.optimizer.state[parameter][name]
        return tensor

    return select


def _selections(inner: Inner) -> dict[str, Select]:
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
