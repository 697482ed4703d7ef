"""Training samples of one source, or of several by weight: what `data` asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from typing import Any, Protocol, get_type_hints

import numpy as np
import torch
from torch import Tensor

from diloco.data import DataConfig, Dataset, TokenSource, build_source, check_cache
from diloco.errors import ConfigError
from diloco.mixture import Mixture, Schedule
from diloco.shuffle import splitmix
from diloco.typed import convert


class Facts(Protocol):
    """What one has to know of data, without its tokens; as in diloco.data.TokenSource."""

    @property
    def vocab(self) -> int: ...
    @property
    def bytes_per_token(self) -> float: ...
    @property
    def digest(self) -> str: ...


class Samples(Protocol):
    """Training samples by global index, and held-out windows: as in diloco.data.Dataset."""

    @property
    def source(self) -> Facts: ...
    @property
    def train_windows(self) -> int: ...
    @property
    def heldout_windows(self) -> int: ...
    def batch(self, indices: Iterable[int]) -> Tensor: ...
    def heldout(self, i: int, of: int | None = None) -> np.ndarray: ...
    @property
    def heldout_bytes_per_token(self) -> float: ...
    @property
    def mixture(self) -> dict[str, Any] | None:
        """For the run's fingerprint, if there are several sources: their names, and Schedule.describe()."""
        ...

    @property
    def shuffle(self) -> list[int]:
        """For the fingerprint: of each source, windows of a group of its order; 0: it is one permutation."""
        ...

    @property
    def readahead(self) -> int:
        """Samples to look ahead; 0: there is no need to."""
        ...

    def fetches(self, indices: Iterable[int]) -> list[Callable[[], None]]:
        """What to call to have what these samples need on this machine, in the order of their needing it. They raise OSError."""
        ...

    def describe(self) -> str: ...


def build_samples(cfg: DataConfig, seq_len: int, seed: int) -> Samples:
    """The samples that `data` asks for. Raises ConfigError."""
    if not cfg.sources:
        if cfg.phases:
            raise ConfigError(f"data.phases={cfg.phases} has no data.sources to weigh: set these, or no phases")
        one = Dataset(build_source(cfg), seq_len, cfg.holdout, seed, cfg.shuffle)
        _check_room(cfg, [one])
        return one
    parts = [
        build_part(cfg, f"data.sources[{k}]", part, seq_len, splitmix(seed + k)) for k, part in enumerate(cfg.sources)
    ]
    for k, part in enumerate(parts):
        check_tokenizer(f"data.sources[{k}]", part.source, "data.sources", _first_index(parts))
    _check_room(cfg, parts)
    names = [str(part.get("name", k)) for k, part in enumerate(cfg.sources)]
    return Mixed(parts, names, _schedule(cfg, seq_len))


def _check_room(cfg: DataConfig, parts: Sequence[Dataset]) -> None:
    """The cache of what is streamed holds what is read from and what is fetched ahead."""
    if cfg.shuffle < 0:
        raise ConfigError(
            f"data.shuffle={cfg.shuffle} is no number of tokens: set it to 0 (all), or more, in all regions"
        )
    check_cache(cfg, sum(getattr(part.source, "room", 0) for part in parts))


def build_part(cfg: DataConfig, where: str, part: Any, seq_len: int, seed: int) -> Dataset:
    """One source of several. where: its key. Raises ConfigError."""
    if not isinstance(part, Mapping) or "weight" not in part:
        raise ConfigError(f"{where}={part} has no weight: write it as {{path: DIR, weight: 0.5}}")
    own = {key: value for key, value in part.items() if key not in ("weight", "name")}
    one, source = source_of(cfg, where, own)
    with naming(where):
        return Dataset(source, seq_len, one.holdout, seed, one.shuffle)


def source_of(cfg: DataConfig, key: str, own: Mapping[Any, Any]) -> tuple[DataConfig, TokenSource]:
    """`cfg` with some keys of its own, and what they name. Raises ConfigError naming `key`."""
    hints = get_type_hints(DataConfig)
    known = hints.keys() - {"sources", "phases"}
    if unknown := sorted(map(str, own.keys() - known)):
        raise ConfigError(f"{key}.{unknown[0]} is not known: there is weight, name, {', '.join(sorted(known))}")
    typed = {name: convert(value, hints[name], f"{key}.{name}") for name, value in own.items()}
    one = replace(cfg, sources=[], phases=[], **typed)
    with naming(key):
        return one, build_source(one)


def check_tokenizer(key: str, source: Facts, of: str, index: Any) -> None:
    """Both prepared with one tokenizer, as far as they are prepared. of: the key of the other. Raises ConfigError."""
    own = index_of(source)
    if own is not None and index is not None and (own.tokenizer, own.end) != (index.tokenizer, index.end):
        raise ConfigError(
            f"{key} is of the tokenizer {_tokenizer(own)}, and {of} of {_tokenizer(index)}: prepare all with one "
            "--tokenizer and --end"
        )


def check_like_data(key: str, source: Facts, data: Facts) -> None:
    """Its tokens are those of `data`, as far as can be told. Raises ConfigError."""
    check_tokenizer(key, source, "data", index_of(data))
    if source.vocab != data.vocab:
        raise ConfigError(
            f"{key} has a vocabulary of {source.vocab}, and data one of {data.vocab}: prepare both with one tokenizer"
        )


def check_end(loss_args: Mapping[str, Any], data: Facts) -> None:
    """The documents of `data` end where the loss takes them to, as far as can be told. Raises ConfigError."""
    end, index = loss_args.get("end"), index_of(data)
    if end is not None and index is not None and end != index.end:
        raise ConfigError(
            f"model.loss_args.end={end}, but the documents of data end with {index.end}: set model.loss_args.end to that, or "
            "to null for windows of one text each"
        )


def index_of(source: Facts) -> Any:
    """The diloco.corpus.folder.Index of a prepared folder, or of the first in a mixture; None: there is none."""
    return getattr(source, "index", None)


def _first_index(parts: Sequence[Dataset]) -> Any:
    return next((index for part in parts if (index := index_of(part.source)) is not None), None)


def _tokenizer(index: Any) -> str:
    files = " ".join(f"{name}:{checksum[:8]}" for name, checksum in sorted(index.tokenizer.items()))
    return f"{files or 'bytes'} with end {index.end}"


@contextmanager
def naming(key: str) -> Iterator[None]:
    """A ConfigError inside is one about `key`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _schedule(cfg: DataConfig, seq_len: int) -> Schedule:
    """data.phases count tokens of all regions; a phase begins with the first sample that begins at its token or later."""
    phases = [(0, _weights("data.sources", [part["weight"] for part in cfg.sources]))]
    for k, phase in enumerate(cfg.phases):
        key = f"data.phases[{k}]"
        if not isinstance(phase, Mapping) or phase.keys() != {"tokens", "weights"}:
            raise ConfigError(f"{key}={phase} is not a phase: write it as {{tokens: 1000000, weights: [1, 2]}}")
        start, weights = phase["tokens"], phase["weights"]
        if not isinstance(start, int) or -(-start // seq_len) <= phases[-1][0]:
            raise ConfigError(
                f"{key}.tokens={start} is not after the phase before: set it to a larger number of tokens"
            )
        if not isinstance(weights, Sequence) or len(weights) != len(cfg.sources):
            raise ConfigError(
                f"{key}.weights={weights}: set it to a list of {len(cfg.sources)} weights, one for each source"
            )
        phases.append((-(-start // seq_len), _weights(key, weights)))
    return Schedule(phases)


def _weights(key: str, weights: Sequence[Any]) -> list[Fraction]:
    """Exact, as they are written: 0.1 is a tenth."""
    try:
        exact = [Fraction(str(weight)) for weight in weights]
        Mixture(exact)
        return exact
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"{key}: the weights {weights} are no mixture: set them to 0 or more, one of them above 0"
        ) from None


Places = Sequence[tuple[int, int]]
"""Of samples: the number of the part, and the index in it."""


def gather(parts: Sequence[Samples | Dataset], places: Places, seq_len: int) -> Tensor:
    """int32 [n, seq_len + 1]: these samples."""
    out = torch.empty(len(places), seq_len + 1, dtype=torch.int32)
    for number, part in enumerate(parts):
        if rows := [row for row, (of, _) in enumerate(places) if of == number]:
            out[rows] = part.batch(places[row][1] for row in rows)
    return out


def fetches_in_turn(parts: Sequence[Samples | Dataset], places: Places) -> list[Callable[[], None]]:
    found = [part.fetches(i for of, i in places if of == number) for number, part in enumerate(parts)]
    return [call for together in zip_longest(*found) for call in together if call is not None]


def least_readahead(parts: Sequence[Samples | Dataset]) -> int:
    """Of the part that allows least: its samples are a part of them only."""
    return min((part.readahead for part in parts if part.readahead), default=0)


@dataclass(frozen=True)
class MixedFacts:
    vocab: int
    bytes_per_token: float
    digest: str
    index: Any
    """See index_of."""


class Mixed:
    """Samples of several datasets, by weight."""

    def __init__(self, parts: Sequence[Dataset], names: Sequence[str], schedule: Schedule) -> None:
        self.parts, self.names, self.schedule = parts, list(names), schedule
        shares, bytes_per_token = schedule.mixtures[0].shares, [part.source.bytes_per_token for part in parts]
        self.source = MixedFacts(
            max(part.source.vocab for part in parts),
            _mean(bytes_per_token, shares),
            _digest(parts, schedule),
            _first_index(parts),
        )
        self.train_windows = sum(part.train_windows for part in parts)
        self._held = [s for s, part in enumerate(parts) if part.heldout_windows and shares[s]]
        self._heldout = Mixture([shares[s] for s in self._held]) if self._held else None
        self.heldout_windows = self._heldout_length()
        self.heldout_bytes_per_token = self.source.bytes_per_token
        if self._heldout is not None:
            self.heldout_bytes_per_token = _mean([bytes_per_token[s] for s in self._held], self._heldout.shares)

    def batch(self, indices: Iterable[int]) -> Tensor:
        """int32 [n, seq_len + 1]: the training samples of n global indices."""
        return gather(self.parts, [self.schedule.locate(index) for index in indices], self.parts[0].seq_len)

    def heldout(self, i: int, of: int | None = None) -> np.ndarray:
        """int64 [seq_len + 1]: held-out windows of all sources that have some, by their first weights; those of each source are
        spread over all that it has. Raises IndexError."""
        of = self.heldout_windows if of is None else of
        if not 0 <= i < of <= self.heldout_windows:
            raise IndexError(f"held-out window {i} of {of}, there are {self.heldout_windows}")
        assert self._heldout is not None
        source, j = self._heldout.locate(i)
        return self.parts[self._held[source]].heldout(j, self._heldout.counts(of)[source])

    @property
    def shuffle(self) -> list[int]:
        return [group for part in self.parts for group in part.shuffle]

    @property
    def readahead(self) -> int:
        return least_readahead(self.parts)

    def fetches(self, indices: Iterable[int]) -> list[Callable[[], None]]:
        return fetches_in_turn(self.parts, [self.schedule.locate(index) for index in indices])

    def _heldout_length(self) -> int:
        """Up to the first that its source does not have."""
        if self._heldout is None:
            return 0
        limits = [self.parts[s].heldout_windows for s in self._held]
        low, high = 0, sum(limits)
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(n <= limit for n, limit in zip(self._heldout.counts(middle), limits, strict=True))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    @property
    def mixture(self) -> dict[str, Any]:
        return {"names": self.names, "phases": self.schedule.describe()}

    def describe(self) -> str:
        shares = self.schedule.mixtures[0].shares
        parts = [
            f"{name} {100 * float(share):.3g} % ({part.train_windows:,})"
            for name, share, part in zip(self.names, shares, self.parts, strict=True)
        ]
        return f"training sequences of {', '.join(parts)}, {self.heldout_windows:,} held out"


def _mean(values: Sequence[float], shares: Sequence[Fraction]) -> float:
    return sum(float(share) * value for share, value in zip(shares, values, strict=True))


def _digest(parts: Sequence[Dataset], schedule: Schedule) -> str:
    seen = [[part.source.digest, part.train_windows] for part in parts]
    return hashlib.sha256(json.dumps([seen, schedule.describe()]).encode()).hexdigest()
