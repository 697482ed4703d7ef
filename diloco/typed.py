"""Plain values as the fields of a dataclass take them."""

from __future__ import annotations

import types
import typing
from typing import Any

from diloco.errors import ConfigError


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as a dataclass's field of that hint has it. Raises ConfigError naming `key`."""
    if (isinstance(value, bool) and hint is not bool) or not _fits(value, hint):
        name = getattr(hint, "__name__", str(hint)) if not isinstance(hint, types.UnionType) else str(hint)
        raise ConfigError(f"{key}={value!r} is not of the type {name}: set it to a value of that type")
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    origin = typing.get_origin(hint) or hint
    return isinstance(value, (int, float) if origin is float else origin)
