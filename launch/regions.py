"""`regions=...`: which regions to start, from text or from a config's list."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from diloco.errors import ConfigError

_EXAMPLE = "'regions=[{name: eu, nproc: 4, overrides: [parallel.tp=2]}, us]'"
_KEYS = ("name", "nproc", "overrides")


@dataclass(frozen=True)
class Region:
    """One torchrun job."""

    name: str
    nproc: int = 1
    """Ranks."""
    overrides: tuple[str, ...] = ()
    """Of this region only; they come after those of all."""


def naming(name: str) -> str:
    """The override that names a region: its file in configs/region, or the name alone where there is none."""
    known = resources.files("configs") / "region" / f"{name}.yaml"
    return f"+region={name}" if known.is_file() else override("region.name", name)


def parse_regions(text: str) -> list[Region]:
    """Regions from `[{name: eu, nproc: 4, overrides: [parallel.tp=2]}, us]` (YAML). Raises ConfigError."""
    try:
        return check_regions(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"regions={text} is not a list in YAML: write it like {_EXAMPLE}") from error


def check_regions(value: Any) -> list[Region]:
    """Regions from a list of names or of mappings with name, nproc and overrides. Raises ConfigError."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"regions={value} names no regions: write a list like {_EXAMPLE}")
    regions = [_region(entry) for entry in value]
    names = [region.name for region in regions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"regions names {twice[0]} more than once: give each region a name of its own")
    return regions


def _region(entry: Any) -> Region:
    fields = entry if isinstance(entry, dict) else {"name": entry}
    if unknown := [key for key in fields if key not in _KEYS]:
        near = difflib.get_close_matches(str(unknown[0]), _KEYS, 1)
        hint = f"did you mean {near[0]}" if near else "a region has the keys " + ", ".join(_KEYS)
        raise ConfigError(f"regions has the unknown key {unknown[0]} in {entry}: {hint}")
    name, nproc, overrides = fields.get("name"), fields.get("nproc", 1), fields.get("overrides") or []
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
        raise ConfigError(
            f"regions has name={name} in {entry}: give a name of letters, digits, . and -, in quotes if need be"
        )
    if not isinstance(nproc, int) or isinstance(nproc, bool) or nproc < 1:
        raise ConfigError(f"regions has nproc={nproc} in {entry}: set it to the number of ranks, 1 or more")
    if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
        raise ConfigError(f"regions has overrides={overrides} in {entry}: write a list such as [parallel.tp=2]")
    return Region(name, nproc, tuple(overrides))


def split_own(argv: Sequence[str], defaults: Mapping[str, str], flag: str) -> tuple[dict[str, str], list[str]]:
    """The values of a command's own keys, and the other arguments, which are overrides. flag: one that it knows besides, for the
    sentence of the ConfigError that another one raises."""
    own, overrides = dict(defaults), []
    for text in argv:
        key, equals, value = text.partition("=")
        if text.startswith("-"):
            raise ConfigError(f"{text} is not known here: {flag} is, everything else is key=value")
        if equals and key in own:
            own[key] = value
        else:
            overrides.append(text)
    return own, overrides


def parse_override(text: str) -> Override:
    """One override in Hydra's grammar. Raises ConfigError."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"{text} is not an override: write key=value, with quotes around odd characters") from error


def find_override(overrides: Sequence[str], key: str) -> Any:
    """The value that the last of `overrides` gives to `key`, None if none does. Raises ConfigError."""
    parsed = [parse_override(text) for text in overrides]
    return next((o.value() for o in reversed(parsed) if o.key_or_group == key), None)


def override(key: str, value: str) -> str:
    """`key=value` with the value quoted as Hydra's grammar wants it: any text without ${ arrives as it is."""
    if re.fullmatch(r"(/|\w+://)[\w./:-]*", value, re.ASCII):
        return f"{key}={value}"
    # A backslash escapes only in a run of backslashes that ends at a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"{key}='{escaped}'"
