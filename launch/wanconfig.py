"""`+wan=NAME wan.KEY=VALUE`: the config group of the WAN lab, from configs/wan/NAME.yaml and overrides."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from diloco.errors import ConfigError
from launch.links import DEFAULTS, HUB, PAIR, REGION, SIZE, TIME, Kind, WanConfig
from launch.regions import parse_override

KEYS = [f.name for f in dataclasses.fields(WanConfig) if f.name != "queue_bytes"]


def split_wan(overrides: Sequence[str], regions: Sequence[str]) -> tuple[WanConfig | None, list[str]]:
    """The lab that `+wan=NAME` and `wan.KEY=VALUE` ask for, None without them, and the other overrides. Raises
    ConfigError."""
    name, changes, rest = None, [], []
    for text in overrides:
        parsed = parse_override(text)
        if parsed.key_or_group == "wan":
            name = str(parsed.value())
        elif parsed.key_or_group.startswith("wan."):
            changes.append((parsed.key_or_group.removeprefix("wan."), parsed.value()))
        else:
            rest.append(text)
    if name is None and changes:
        raise ConfigError(f"wan.{changes[0][0]}={changes[0][1]} needs a WAN to change: add +wan={options()[0]}")
    if HUB in regions and name:
        raise ConfigError(f"regions names {HUB}, which is the launcher's own place under +wan: use another name")
    return (load_wan(name, changes, regions) if name else None), rest


def options() -> list[str]:
    """Names of the ready-made ones."""
    return sorted(
        f.name.removesuffix(".yaml") for f in (resources.files("configs") / "wan").iterdir() if f.name.endswith(".yaml")
    )


def load_wan(name: str, changes: Sequence[tuple[str, Any]] = (), regions: Sequence[str] = ()) -> WanConfig:
    """configs/wan/`name`.yaml with `changes` of dotted keys: ("up", "50mbit"), ("pairs.eu-us.rtt", "80ms"). Changes of a
    region or a pair must be of `regions`, if any are given. Raises ConfigError."""
    if name not in options():
        raise ConfigError(f"wan={name} is not there: set it to one of {', '.join(options())}")
    values: dict[str, Any] = yaml.safe_load((resources.files("configs") / "wan" / f"{name}.yaml").read_text()) or {}
    changed: dict[str, Any] = {}
    for key, value in changes:
        _set(changed, key, value)
        _set(values, key, value)
    if regions:
        _check_names(changed, regions)
    return parse_wan(values)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Names may hold dots, so only the first one, and a known last part, are taken off."""
    group, _, rest = key.partition(".")
    if not rest:
        values[key] = value
        return
    if group not in ("regions", "pairs"):
        raise _unknown(key)
    name, _, last = rest.rpartition(".")
    entry = values.setdefault(group, {})
    if not isinstance(entry, dict):
        return  # which parse_wan says
    if last in (REGION if group == "regions" else PAIR) and name:
        given = entry.get(name, {})
        entry[name] = {**(given if isinstance(given, dict) else {"rtt": given}), last: value}
    else:
        entry[rest] = value


def _check_names(changed: Mapping[str, Any], regions: Sequence[str]) -> None:
    """Ready-made links may name regions that this run does not have, changes may not: nothing would change."""
    pairs = {f"{a}-{b}" for a in regions for b in regions if a != b}
    for group, known in (("regions", set(regions)), ("pairs", pairs)):
        given = changed.get(group)
        for name in set(given if isinstance(given, Mapping) else ()) - known:
            raise ConfigError(f"wan.{group}.{name} changes no link of this run: its regions are {', '.join(regions)}")


def parse_wan(values: Mapping[str, Any]) -> WanConfig:
    """From texts with units, as YAML gives them. Raises ConfigError."""
    if unknown := [key for key in values if key not in KEYS]:
        raise _unknown(unknown[0])
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in DEFAULTS:
            found[key] = _number(key, value, DEFAULTS[key])
        elif key == "queue":
            found |= _queue(value)
        elif key == "subnet":
            found[key] = str(value or "")
        else:
            found[key] = _group(key, value)
    return WanConfig(**found)


def _unknown(key: str) -> ConfigError:
    near = difflib.get_close_matches(key, KEYS, 1)
    return ConfigError(
        f"unknown key wan.{key}: " + (f"did you mean wan.{near[0]}?" if near else f"it has {', '.join(KEYS)}")
    )


def _group(group: str, value: Any) -> dict[str, dict[str, float]]:
    example = "{us: {up: 50mbit}}" if group == "regions" else "{eu-us: 80ms} or {eu-us: {rtt: 80ms, loss: 1%}}"
    kinds, found = (REGION if group == "regions" else PAIR), {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"wan.{group}={value} is not a mapping: write it like {example}")
    for name, entry in value.items():
        entry = {"rtt": entry} if group == "pairs" and not isinstance(entry, Mapping) else entry
        if not isinstance(entry, Mapping) or set(entry) - set(kinds) or (group == "pairs" and "-" not in str(name)):
            raise ConfigError(f"wan.{group}.{name}={entry} does not fit: write it like {example}")
        found[str(name)] = {key: _number(f"{group}.{name}.{key}", v, kinds[key]) for key, v in entry.items()}
    return found


def _queue(value: Any) -> dict[str, float]:
    if value == "auto":
        return {}
    match = _QUANTITY.fullmatch(str(value))
    if match and match[2].lower() in SIZE.units:
        return {"queue_bytes": _number("queue", value, SIZE)}
    return {"queue": _number("queue", value, Kind(SIZE.fix, TIME.units, high=TIME.high))}


_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z%]*)(?:/s)?\s*")


def _number(key: str, value: Any, kind: Kind) -> float:
    """The value in the unit of WanConfig. A zero needs no unit."""
    if not kind.units:
        kind.check(key, value, value)
        if not isinstance(value, int):
            raise ConfigError(f"wan.{key}={value} cannot be: set it to {kind.fix}")
        return value
    match = _QUANTITY.fullmatch(str(value))
    unit = match[2].lower() if match else ""
    if not match or (unit not in kind.units and (unit or float(match[1]))):
        raise ConfigError(f"wan.{key}={value} cannot be: set it to {kind.fix}")
    number = float(match[1]) * kind.units.get(unit, 1.0)
    kind.check(key, value, number)
    return number
