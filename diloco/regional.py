"""Sources that one region holds alone, `region.sources`. Their tokens stay there; the journal has names, shares and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor

from diloco.data import DataConfig, Dataset
from diloco.errors import ConfigError
from diloco.mixing import (
    Facts,
    Samples,
    build_part,
    check_like_data,
    fetches_in_turn,
    gather,
    least_readahead,
)
from diloco.reading import SOURCE
from elastic.security import REGION_NAME


@dataclass
class RegionConfig:
    """This region."""

    name: str = ""
    sources: list[Any] = field(default_factory=list)
    """What only this region holds: {name: archive, weight: 0.25, path: DIR}, with the keys of `data` that differ. weight: its
    share of this region's samples; the rest is of `data`."""


@dataclass(frozen=True)
class Own:
    """A source that this region holds alone."""

    name: str
    share: Fraction
    """Of the region's samples."""
    samples: Dataset

    @property
    def digest(self) -> str:
        """Of what its sample indices mean: the data, how it is cut, and the order."""
        of = self.samples
        facts = [of.source.digest, of.seq_len, of.train_windows, of.seed, of.shuffle]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def build_own(cfg: RegionConfig, data: DataConfig, of: Facts, seq_len: int, seed: int) -> list[Own]:
    """of: what `data` is. Raises ConfigError."""
    found: list[Own] = []
    for k, part in enumerate(cfg.sources):
        where = f"region.sources[{k}]"
        name, share = _name(where, part, [own.name for own in found]), _share(where, part)
        order = hashlib.sha256(f"{seed}/{cfg.name}/{name}".encode()).digest()
        samples = build_part(data, where, part, seq_len, int.from_bytes(order[:8], "big"))
        check_like_data(f"{where} ({name})", samples.source, of)
        found.append(Own(name, share, samples))
    if (total := sum(own.share for own in found)) > 1:
        raise ConfigError(
            f"region.sources: the weights sum to {float(total):g}, which is more than all samples of this region: set them to "
            "shares that sum to 1 at most"
        )
    return found


def _name(where: str, part: Any, others: Sequence[str]) -> str:
    name = part.get("name") if isinstance(part, Mapping) else None
    if not isinstance(name, str) or not REGION_NAME.fullmatch(name):
        raise ConfigError(
            f"{where}={part} has no name: write it as {{name: archive, weight: 0.25, path: DIR}} (letters, digits, . and -)"
        )
    if name in others:
        raise ConfigError(f"{where}.name={name} is the name of another one: give each its own")
    return name


def _share(where: str, part: Mapping[str, Any]) -> Fraction:
    try:
        share = Fraction(str(part.get("weight")))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(
            f"{where}.weight={part.get('weight')} is not a share of this region's samples: set it above 0, and to 1 at most"
        )
    return share


def shares_of(own: Sequence[Own], region: str) -> dict[str, Fraction]:
    """Source as the ledger names it -> its share of the region's samples, `data` first."""
    return {
        "": 1 - sum((each.share for each in own), Fraction(0)),
        **{f"{region}/{each.name}": each.share for each in own},
    }


def heldout_of(own: Sequence[Own], region: str) -> dict[str, Dataset]:
    """Evaluation sets that only this region can evaluate, named as in the ledger."""
    return {f"{region}/{each.name}": each.samples for each in own if each.samples.heldout_windows}


class Regional:
    """Samples of `data` and of a region's own sources, by the ids that `diloco.reading` gives."""

    def __init__(self, data: Samples, own: Sequence[Own]) -> None:
        self.data, self.own = data, own

    def batch(self, ids: Iterable[int]) -> Tensor:
        """int32 [n, seq_len + 1]."""
        if not self.own:
            return self.data.batch(ids)
        return gather(self._parts, [divmod(each, SOURCE) for each in ids], self.own[0].samples.seq_len)

    @property
    def readahead(self) -> int:
        return least_readahead(self._parts)

    def fetches(self, ids: Iterable[int]) -> list[Callable[[], None]]:
        return fetches_in_turn(self._parts, [divmod(each, SOURCE) for each in ids])

    @property
    def _parts(self) -> list[Samples | Dataset]:
        return [self.data, *(own.samples for own in self.own)]

    def describe(self) -> str:
        alone = [
            f"{100 * float(own.share):.3g} % of {own.name} ({own.samples.train_windows:,}), held here alone"
            for own in self.own
        ]
        return " · ".join([self.data.describe(), *alone])
