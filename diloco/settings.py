"""What all members of a run must do alike: fixed by `open`, changed by `set`. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


class JournalError(RuntimeError):
    """An entry that no correct member can have written: a bug or an intruder. The run must stop."""


@dataclass(frozen=True)
class Settings:
    sync_every: int
    lr: float
    momentum: float
    boundary: str
    rounds: int | None
    tokens: int | None
    seq_len: int
    seed: int
    ahead: int
    """Inner steps that a member's leases must be enough for."""
    lease_rounds: int
    """Rounds without a sign of a member after which its leases return and it has to join again."""
    start_regions: int
    """Leases are granted once this many members have joined, in order of their ids: so it does not matter who came first."""
    samples: int | None = None
    """The run ends once every sample of `data` below this is settled: of run.epochs."""
    max_norm_ratio: float = 10.0
    """Contributions beyond this multiple of the median norm get no weight (`diloco.norms`); 0: all do."""

    def __post_init__(self) -> None:
        counts = [self.sync_every, self.seq_len, self.ahead, self.lease_rounds, self.start_regions]
        limits = [limit for limit in (self.rounds, self.tokens, self.samples) if limit is not None]
        whole = all(type(n) is int and n > 0 for n in counts + limits)
        rates = (self.lr, self.momentum, self.max_norm_ratio)
        if (
            not whole
            or not all(type(x) in (int, float) and 0 <= x < 1e6 for x in rates)
            or self.ahead < self.sync_every
        ):
            raise JournalError("the run's settings are not those of a run that can make a round")


LIVE = {
    "outer.lr": "lr",
    "outer.momentum": "momentum",
    "outer.sync_every": "sync_every",
    "outer.boundary": "boundary",
    "run.rounds": "rounds",
    "run.tokens": "tokens",
    "elastic.max_norm_ratio": "max_norm_ratio",
}
"""Keys of the config that `set` may change -> fields of Settings."""
RULES = ("outer.sync_every", "elastic.max_norm_ratio")
"""Those of them that the weights of a round depend on: an attempt that began before such a change is void."""


def wrong(changes: Mapping[str, Any], fragments: int) -> str | None:
    """Why these values cannot be set, naming key, value and fix; None if they can."""
    if not changes:
        return "nothing is set: name KEY=VALUE"
    for key, value in changes.items():
        if key not in LIVE:
            return f"{key} cannot be set while a run goes on: what can is {', '.join(LIVE)}"
        if fix := _fix(key, value, fragments):
            return f"{key}={value}: {fix}"
    return None


def _fix(key: str, value: Any, fragments: int) -> str | None:
    number = type(value) in (int, float) and math.isfinite(value)
    count = type(value) is int and value > 0
    good, fix = {
        "outer.lr": (number and 0 < value < 1e6, "set it to a number above 0"),
        "outer.momentum": (number and 0 <= value < 1, "set it to a number from 0 to below 1"),
        "outer.sync_every": (
            count and value % fragments == 0 and value < 10**6,
            f"set it to a multiple of the run's {fragments} fragment(s)",
        ),
        "outer.boundary": (value in ("steps", "first"), "set it to steps or first"),
        "run.rounds": (count or value is None, "set it to a positive number, or null"),
        "run.tokens": (count or value is None, "set it to a positive number, or null"),
        "elastic.max_norm_ratio": (
            number and (value == 0 or 1 < value < 1e6),
            "set it to a number above 1, or 0 for no limit",
        ),
    }[key]
    return None if good else fix


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """After a `set`. Leases keep what the run was opened with beyond one round of steps, so that setting H back undoes it."""
    after = {LIVE[key]: value for key, value in changes.items()}
    ahead = settings.ahead + after.get("sync_every", settings.sync_every) - settings.sync_every
    return replace(settings, **{**after, "ahead": ahead})
