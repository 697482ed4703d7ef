"""Experiment trackers, all optional. The default tracks nothing, so that no caller has to ask whether one is
there."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from diloco.errors import ConfigError


@dataclass
class TrackerConfig:
    """Where numbers go besides metrics.jsonl."""

    kind: str = "none"
    """none, tensorboard, wandb or trackio; all but none are extras: pip install 'diloco[wandb]'."""
    project: str = "diloco"


class Tracker(Protocol):
    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Takes one record. Its numbers become series named kind/field over the record's step, or its
        round."""
        ...

    def close(self) -> None: ...


class NullTracker:
    """Tracks nothing."""

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoardTracker:
    """Scalars to TensorBoard event files below a directory."""

    def __init__(self, directory: Path) -> None:
        _load("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        for name, value in numbers(kind, fields).items():
            self._writer.add_scalar(name, value, position(fields))

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Scalars to Weights & Biases, or to trackio, which has the same calls."""

    def __init__(self, library: ModuleType, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._library = library
        library.init(project=project, name=name, config=dict(config))

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        # Not as `step=`: both refuse one that goes back, and steps and rounds count apart.
        if series := numbers(kind, fields):
            self._library.log({**series, f"{kind}/position": position(fields)})

    def close(self) -> None:
        self._library.finish()


def validate(cfg: TrackerConfig) -> None:
    """Raises ConfigError for an unknown kind, or one whose extra is not installed."""
    if cfg.kind not in ("none", "tensorboard", "wandb", "trackio"):
        raise ConfigError(f"tracker.kind={cfg.kind} is unknown: set it to none, tensorboard, wandb or trackio")
    if cfg.kind != "none":
        _load(cfg.kind)


def build_tracker(cfg: TrackerConfig, directory: Path, name: str, config: Mapping[str, Any]) -> Tracker:
    """directory: the region's, for trackers that write files; name: of this run and region; config: what to
    show of the settings. Raises ConfigError for an unknown kind, or one whose extra is not installed."""
    validate(cfg)
    if cfg.kind == "none":
        return NullTracker()
    if cfg.kind == "tensorboard":
        return TensorBoardTracker(directory / "tensorboard")
    return WandbTracker(_load(cfg.kind), cfg.project, name, config)


def numbers(kind: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, by kind/field."""
    return {
        f"{kind}/{name}": float(value)
        for name, value in fields.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def position(fields: Mapping[str, Any]) -> int:
    """Where a record lies on the horizontal axis: its step, else its round, else 0."""
    return int(fields.get("step", fields.get("round", 0)))


def _load(kind: str) -> ModuleType:
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise ConfigError(
            f"tracker.kind={kind} needs a library that is not installed: run pip install 'diloco[{kind}]', "
            "or set tracker.kind=none"
        ) from error
