"""θ₀ of a new run: the fresh model's parameters, or those of a checkpoint of another run or an import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckpt.catalog import facts, named, one
from ckpt.checkpoint import DamagedError, load_manifest
from ckpt.errors import RequestError
from ckpt.layout import THETA, Slot, Theta
from ckpt.reading import Reader, Want
from ckpt.store import MissingError, Store, StoreError
from diloco.checkpointing import source
from diloco.checkpoints import Checkpoints
from diloco.config import Config, store_url
from diloco.errors import ConfigError
from diloco.parallel import on_rank_0
from diloco.trainer import Trainer

MOMENTUM = "momentum"


def start(trainer: Trainer, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Fills θ of the planes for a run that is to be opened, and the outer momentum if the checkpoint that was named has one
    of the same kind; moments are zeros otherwise. Returns what the first checkpoint says of that. Raises ConfigError on all
    ranks. Collective."""
    planes, url = trainer.planes, source(trainer.cfg.ckpt)
    if not url:
        for f in range(len(trainer.fragments)):
            planes.theta[f].copy_(trainer.shards.read(f))
        _begin(trainer, with_momentum=False)
        return None
    manifest = on_rank_0(trainer.region, lambda: _find(url, checkpoints.what))
    store = named(url).store
    with_momentum = planes.names == (THETA, MOMENTUM) == _planes(manifest)
    names = (THETA, MOMENTUM) if with_momentum else (THETA,)
    try:
        wants = list(_wants(trainer, Theta(store, manifest).slots, names))
        checkpoints.agreed(manifest["prefix"], lambda: Reader(store, manifest).read_into(wants))
    except (DamagedError, StoreError) as error:
        raise _unusable(url, error) from error
    _begin(trainer, with_momentum)
    if trainer.region.rank == 0:
        moments = "parameters and outer momentum" if with_momentum else "parameters"
        print(
            f"{trainer.cfg.region.name}: a new run with the {moments} of {store.url} {manifest['prefix']}", flush=True
        )
    return {"named": url, "prefix": manifest["prefix"], "digest": manifest["digest"], "planes": list(names)}


def _begin(trainer: Trainer, with_momentum: bool) -> None:
    for f in range(len(trainer.fragments)):
        for name in trainer.planes.names[1:]:
            if not (with_momentum and name == MOMENTUM):
                getattr(trainer.planes, name)[f].zero_()
        trainer.planes.arrived(f, 0, ())


def _planes(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Of a checkpoint, θ first."""
    there = {piece["plane"] for shard in manifest["shards"] for piece in shard["pieces"]}
    return tuple(sorted(there, key=lambda name: (name != THETA, name)))


def _find(url: str, mine: dict[str, Any]) -> dict[str, Any]:
    """Rank 0: the manifest of the checkpoint that was named, if it is of this model."""
    try:
        what = named(url)
        manifest = one(what)
        facts(what.store, manifest)
        theirs = Theta(what.store, manifest).slots
    except (RequestError, DamagedError, StoreError) as error:
        raise _unusable(url, error) from error
    _check_model(url, manifest["model"], mine["model"])
    shapes = {slot["name"]: tuple(slot["shape"]) for fragment in mine["layout"] for slot in fragment}
    for name in sorted({*theirs, *shapes}):
        there, here = (theirs[name].shape if name in theirs else None), shapes.get(name)
        if there != here:
            raise ConfigError(
                f"ckpt.resume={url} is of another model, {name} is {there and list(there)} there and {here and list(here)} "
                "here: set model to its values, or name another checkpoint"
            )
    return manifest


def _check_model(url: str, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Shapes alone do not tell: two values of rope_theta make two models. The length of sequences may change."""
    there = {"model.target": theirs["target"], **{f"model.args.{key}": value for key, value in theirs["args"].items()}}
    here = {"model.target": mine["target"], **{f"model.args.{key}": value for key, value in mine["args"].items()}}
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            raise ConfigError(
                f"ckpt.resume={url} is of another model, {key} is {there.get(key)} there and {here.get(key)} here: set "
                f"{key}={there.get(key)}, or name another checkpoint"
            )


def _wants(trainer: Trainer, theirs: dict[str, Slot], names: tuple[str, ...]) -> Iterator[Want]:
    """This rank's slices, parameter by parameter: fragments may be cut in another way there."""
    for f, fragment in enumerate(trainer.fragments):
        first, last = trainer.shards.span(f)
        for slot in fragment.slots:
            a, b = max(first, slot.start), min(last, slot.stop)
            for name in names if a < b else ():
                there = theirs[slot.name]
                out = getattr(trainer.planes, name)[f][a - first : b - first]
                yield Want(name, there.fragment, there.start + a - slot.start, out)


def check_start(cfg: Config, store: Store, run: str) -> None:
    """Raises ConfigError if the run in the store did not start from what this region names. Rank 0."""
    if not (url := source(cfg.ckpt)):
        return
    try:
        began = load_manifest(store, f"checkpoints/{run}/0").get("started")
    except (DamagedError, MissingError):
        began = None
    if began is None or began.get("named") != url:
        where = f"from {began['named']}" if began else "from none"
        raise ConfigError(
            f"ckpt.resume={url} is for a new run, and run.store={store_url(cfg)} holds one that began {where}: set "
            "ckpt.resume=auto to go on with that, or run.dir and run.store to new places"
        )


def _unusable(url: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"ckpt.resume={url} cannot be used ({error}): name a checkpoint that python -m ckpt verify finds right"
    )
