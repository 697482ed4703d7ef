"""`regions=[{name: eu, gpus: 64, gpu: h100, up: 1gbit, down: 2gbit}, ...]`: machines and lines of a plan's regions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from diloco.errors import ConfigError
from launch.links import RATE, Kind, WanConfig
from launch.regions import check_regions

EXAMPLE = (
    "'regions=[{name: eu, gpus: 64, gpu: h100, up: 1gbit, down: 2gbit}, {name: us, gpus: 32, gpu: a100, up: 500mbit}]'"
)
KEYS = ("name", "gpus", "gpu", "up", "down", "batch", "mfu", "tflops", "memory")


@dataclass(frozen=True)
class Gpu:
    """Dense peaks of the vendor's data sheet, without sparsity."""

    bf16: float
    """TFLOP/s."""
    fp32: float
    memory: float
    """GB."""


GPUS = {
    "b200": Gpu(2250, 75, 180),
    "h200": Gpu(989, 67, 141),
    "h100": Gpu(989, 67, 80),
    "h100-pcie": Gpu(756, 51, 80),
    "a100": Gpu(312, 19.5, 80),
    "a100-40": Gpu(312, 19.5, 40),
    "l40s": Gpu(362, 91.6, 48),
    "l4": Gpu(121, 30.3, 24),
    "4090": Gpu(165, 82.6, 24),
    "3090": Gpu(71, 35.6, 24),
    "mi300x": Gpu(1307, 163, 192),
}


@dataclass(frozen=True)
class Place:
    """A region as the command line names it."""

    name: str
    gpus: int
    gpu: str
    tflops: float | None
    """Peak of one GPU, if given."""
    memory: float
    """Bytes of one GPU."""
    mfu: float | None
    up: float
    """Bytes per second."""
    down: float
    batch: int | None

    def peak(self, dtype: str) -> float:
        """FLOP/s of one GPU in `float32` or `bfloat16`."""
        known = GPUS.get(self.gpu)
        tflops = self.tflops or (known.bf16 if dtype == "bfloat16" else known.fp32) if known else self.tflops
        assert tflops is not None  # checked as it was parsed
        return tflops * 1e12


def names_of(text: str) -> list[str]:
    """Names of the regions, for who needs them before their lines. Raises ConfigError."""
    return [region.name for region in check_regions([{"name": _entry(entry).get("name")} for entry in _listed(text)])]


def parse_places(text: str, wan: WanConfig | None) -> list[Place]:
    """Regions from YAML. wan: rates of who names none. Raises ConfigError."""
    return [_place(_entry(entry), wan) for entry in _listed(text)]


def _listed(text: str) -> list[Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"regions={text} is not a list in YAML: write it like {EXAMPLE}") from error
    if not isinstance(value, list) or not value:
        raise ConfigError(f"regions={text} names no regions: write a list like {EXAMPLE}")
    return value


def _entry(entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"regions has {entry}, of which a plan needs to know more: write a list like {EXAMPLE}")
    if unknown := [key for key in entry if key not in KEYS]:
        near = difflib.get_close_matches(str(unknown[0]), KEYS, 1)
        hint = f"did you mean {near[0]}?" if near else f"a region has the keys {', '.join(KEYS)}"
        raise ConfigError(f"regions has the unknown key {unknown[0]} in {dict(entry)}: {hint}")
    return entry


def _place(entry: Mapping[str, Any], wan: WanConfig | None) -> Place:
    name = entry["name"]
    key = f"regions.{name}"
    gpu, tflops = (
        str(entry.get("gpu", "")).lower(),
        _positive(f"{key}.tflops", entry.get("tflops"), "TFLOP/s of one GPU"),
    )
    if gpu not in GPUS and tflops is None:
        raise ConfigError(
            f"{key}.gpu={gpu or None} is not known: set it to one of {', '.join(GPUS)}, or give {key}.tflops, its peak, and "
            f"{key}.memory in GB"
        )
    memory = _positive(f"{key}.memory", entry.get("memory"), "GB of one GPU")
    if memory is None and gpu not in GPUS:
        raise ConfigError(f"{key}.memory is not set, and gpu={gpu or None} is not known: set it to GB of one GPU")
    gpus = _positive(f"{key}.gpus", entry.get("gpus", 1), "the number of GPUs", whole=True)
    batch = _positive(f"{key}.batch", entry.get("batch"), "sequences per inner step", whole=True)
    mfu = None if entry.get("mfu") is None else share(f"{key}.mfu", entry["mfu"])
    up, down = _lines(key, entry, wan)
    size = (memory if memory is not None else GPUS[gpu].memory) * 1e9
    return Place(name, int(gpus or 1), gpu or "gpu", tflops, size, mfu, up, down, None if batch is None else int(batch))


def _lines(key: str, entry: Mapping[str, Any], wan: WanConfig | None) -> tuple[float, float]:
    """Bytes per second up and down; a line without `down` is as fast both ways."""
    found = {way: quantity(f"{key}.{way}", entry[way], RATE) for way in ("up", "down") if entry.get(way) is not None}
    if wan is not None:
        found = {way: wan.rate(entry["name"], way) for way in ("up", "down")} | found
    if "up" not in found:
        raise ConfigError(f"{key}.up is not set: set it to {RATE.fix}, or add +wan=global")
    return found["up"] / 8, found.get("down", found["up"]) / 8


def quantity(key: str, value: Any, kind: Kind) -> float:
    """A rate in bits per second, or a time in seconds, from text with a unit. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)(?:/s)?\s*", str(value))
    unit = match[2].lower() if match else ""
    if not match or (unit not in kind.units and (unit or float(match[1]))):
        raise ConfigError(f"{key}={value} cannot be: set it to {kind.fix}")
    number = float(match[1]) * kind.units.get(unit, 1.0)
    if not kind.low <= number <= kind.high or (kind.above and number == kind.low):
        raise ConfigError(f"{key}={value} cannot be: set it to {kind.fix}")
    return number


def share(key: str, value: Any) -> float:
    """Above 0 and at most 1. Raises ConfigError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number <= 1:
        raise ConfigError(f"{key}={value} is not a share: set it to a number above 0 and at most 1, such as 0.4")
    return number


def _positive(key: str, value: Any, what: str, whole: bool = False) -> float | None:
    if value is None:
        return None
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and 0 < value < 1e9
    if not fits:
        raise ConfigError(
            f"{key}={value} cannot be: set it to {what}, {'a whole number' if whole else 'a number'} above 0"
        )
    return float(value)
