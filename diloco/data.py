"""Training data: a random-access token stream, and the seeded order in which its samples are read.

A sample is a *window* of seq_len + 1 tokens; windows step by seq_len, so that every token but the first is
predicted once an epoch, and those at the end that fill no window never. The order is computed, never stored
(diloco/shuffle.py): global sample index i is a window of epoch i // train_windows, on every machine alike. Who may read
which indices is the ledger's business (diloco/ledger.py).
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from diloco.errors import ConfigError
from diloco.shuffle import Order, splitmix

BLOCK_TOKENS = 1 << 23
"""Of neighbours that stay together in the order: many chunks of a shard, so that few are fetched for a part of them."""
# Of the standard library: what others installed there, and tests, which are half of it, full of tables and
# not in every build of Python.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass
class DataConfig:
    """What to train on."""

    source: str = "diloco.data.text_bytes"
    """Dotted path of a callable: (DataConfig) -> TokenSource; called twice, to check the settings and to train."""
    path: list[str] | str | None = None
    """Files or directories. None: the source of Python's own standard library, which is always there."""
    pattern: str | None = None
    """Glob below a directory; None: every file (the standard library: every .py)."""
    holdout: float = 0.02
    """Share of the windows that is kept for evaluation, 0 to 0.5."""
    args: dict[str, Any] = field(default_factory=dict)
    """For sources of your own."""
    shuffle: int = 1 << 28
    """Tokens among which samples are shuffled, parts from all over the corpus; 0: all. A cache has to hold twice as many."""
    cache: str = "~/.cache/diloco"
    """Directory for what is streamed from a URL; ranks, regions and runs of a machine share it."""
    cache_bytes: int = 16_000_000_000
    """What the cache may take on disk."""
    patience: float = 600.0
    """Seconds to try again for while the URL does not answer; then the region ends."""
    workers: int = 0
    """Processes of each rank that read samples ahead; 0: the rank reads them itself."""
    sources: list[Any] = field(default_factory=list)
    """A mixture: of each source its weight, its name for reports, and what it has in place of the keys above:
    {name: books, weight: 0.5, path: DIR}."""
    phases: list[Any] = field(default_factory=list)
    """Later weights: {tokens: when, of all regions; weights: one for each source}."""


def check_cache(cfg: DataConfig, least: int) -> None:
    """least: bytes that the cache needs. Raises ConfigError."""
    if cfg.cache_bytes < least:
        raise ConfigError(
            f"data.cache_bytes={cfg.cache_bytes} does not hold twice the tokens of data.shuffle={cfg.shuffle}: set it to {least} "
            "or more, or data.shuffle to less in all regions"
        )


class Tokens(Protocol):
    """A long 1-D array of token ids that need not be in memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@runtime_checkable
class Fetched(Protocol):
    """Tokens that come from elsewhere."""

    def fetches(self, starts: np.ndarray, length: int) -> list[Callable[[], None]]:
        """For the tokens [start, start + length) of each start, int64 [n]: what to call to have them on this machine."""
        ...


class TokenSource(Protocol):
    """What a data source is: its tokens, and what one has to know of them."""

    @property
    def vocab(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the original text per token, on average: for bits per byte."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of the data, hex: regions that disagree on it must not train together."""
        ...

    @property
    def tokens(self) -> Tokens:
        """To train on. A source may also have `heldout`, Tokens that never are; `data.holdout` has to be 0 then."""
        ...


def build_source(cfg: DataConfig) -> TokenSource:
    """The source that `data.source` names. Raises ConfigError."""
    module, _, name = cfg.source.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"data.source={cfg.source} cannot be loaded ({error}): set it to the dotted path of a "
            "function that takes a DataConfig and returns a TokenSource, such as diloco.data.text_bytes"
        ) from error
    source: TokenSource = factory(cfg)
    return source


# ---- files ----


@lru_cache(maxsize=256)  # each has a file open, and processes may open 1,024
def _mapped(path: Path | str, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r")


class Joined(ABC):
    """Many files as one array of tokens."""

    def __init__(self, paths: Sequence[Path | str], sizes: Sequence[int], dtype: str = "u1") -> None:
        """sizes: elements of each file, none of them 0."""
        self.paths, self.dtype = list(paths), np.dtype(dtype)
        self.ends = np.cumsum(np.asarray(sizes, dtype=np.int64))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """dtype [stop - start]; slices of step 1 only. Raises OSError."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read in slices of step 1")
        parts = []
        file = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin, end = int(self.ends[file - 1]) if file else 0, int(self.ends[file])
            parts.append(self.part(file, end - begin, start - begin, min(stop, end) - begin))
            start, file = end, file + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=self.dtype), *parts])

    def rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Row i of `out` is the tokens from starts[i], int64 [n], on: as many slices, without looking for the file of each."""
        length = out.shape[1]
        files, sizes, places = self.locate(starts)
        columns = (array.tolist() for array in (files, sizes, places, starts))
        for row, file, size, place, start in zip(out, *columns, strict=True):
            whole = place + length <= size
            row[:] = self.part(file, size, place, place + length) if whole else self[start : start + length]

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [n] each: the files of these tokens, the files' sizes, and the tokens' places in them."""
        files = np.searchsorted(self.ends, places, side="right")
        sizes = np.diff(self.ends, prepend=0)[files]
        return files, sizes, places - (self.ends[files] - sizes)

    @abstractmethod
    def part(self, file: int, size: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a file, of `size`. Raises OSError."""


class FileTokens(Joined):
    """Local files, memory-mapped when they are read."""

    def part(self, file: int, size: int, start: int, stop: int) -> np.ndarray:
        """Raises OSError if the file is not as long as it was."""
        try:
            data = _mapped(self.paths[file], self.dtype.str)
        except ValueError as error:  # it is empty, or ends inside of a token
            raise OSError(f"{self.paths[file]} is not {size:,} tokens, as it was: copy it again") from error
        if len(data) != size:
            raise OSError(f"{self.paths[file]} has {len(data):,} tokens, and had {size:,}: copy it again")
        return data[start:stop]


@dataclass(frozen=True)
class ByteSource:
    """Text as its bytes: vocabulary 256, one byte per token."""

    tokens: FileTokens
    paths: Sequence[Path]
    vocab: int = 256
    bytes_per_token: float = 1.0

    @cached_property
    def digest(self) -> str:
        """Of the joined bytes; they are read when somebody asks."""
        return _sha256(self.paths)


def text_bytes(cfg: DataConfig) -> ByteSource:
    """The bytes of `data.path`'s files, one after the other: paths in the order given, files of a directory
    sorted by their relative path. Raises ConfigError if nothing is there."""
    paths = [path for path in _files(cfg) if path.stat().st_size]
    if not paths:
        raise ConfigError(
            f"data.path={cfg.path} holds no text (data.pattern={cfg.pattern}): set data.path to files or "
            "directories that do, or to null for the source of Python's standard library"
        )
    return ByteSource(FileTokens(paths, [path.stat().st_size for path in paths]), paths)


def _files(cfg: DataConfig) -> Iterable[Path]:
    if cfg.path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from (p for p in _below(root, cfg.pattern or "**/*.py") if not _SKIPPED & set(p.relative_to(root).parts))
        return
    for name in [cfg.path] if isinstance(cfg.path, str) else cfg.path:
        path = Path(name).expanduser()
        if not path.exists():
            raise ConfigError(f"data.path={name} does not exist: set data.path to existing files or directories")
        yield from _below(path, cfg.pattern or "**/*") if path.is_dir() else [path]


def _below(root: Path, pattern: str) -> list[Path]:
    """Regular files, sorted the same on every machine; what is hidden stays so."""
    if pattern.startswith("/"):
        raise ConfigError(f"data.pattern={pattern} is absolute: set it to a glob below data.path, such as **/*.txt")
    files = {path.relative_to(root).as_posix(): path for path in root.glob(pattern) if path.is_file()}
    return [files[name] for name in sorted(files) if not any(part.startswith(".") for part in name.split("/"))]


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


# ---- samples ----


class Dataset:
    """Samples of a source by global index, and its held-out windows.

    Every k-th window (k = 1 / holdout, rounded) is held out: spread evenly, and the same whatever the seed. Or the source
    has tokens for that.
    """

    mixture = None

    def __init__(self, source: TokenSource, seq_len: int, holdout: float, seed: int, shuffle: int = 0) -> None:
        """Raises ConfigError if the data is too short for one training and, if holdout > 0, one held-out
        window."""
        if not 0 <= holdout <= 0.5:
            raise ConfigError(f"data.holdout={holdout} is not a share from 0 to 0.5: set it to about 0.02")
        self.source, self.seq_len, self.seed = source, seq_len, seed
        self._every = round(1 / holdout) if holdout else 0
        windows = max(0, (len(source.tokens) - 1) // seq_len)
        self.heldout_windows = windows // self._every if self._every else 0
        self.train_windows = windows - self.heldout_windows
        self._heldout: Tokens | None = getattr(source, "heldout", None)
        if self._heldout is not None:
            if holdout:
                raise ConfigError(f"data.holdout={holdout}, but the data has documents held out already: set it to 0")
            self.heldout_windows = max(0, (len(self._heldout) - 1) // seq_len)
        block = max(1, min(shuffle, BLOCK_TOKENS) // seq_len)
        self.order = Order(self.train_windows, block, max(1, shuffle // seq_len // block) * block if shuffle else 0)
        needed = max(1, self._every)
        if windows < needed:
            raise ConfigError(
                f"inner.seq_len={seq_len} is too long for the data: its {len(source.tokens):,} tokens are "
                f"{windows} windows, and data.holdout={holdout} needs {needed}: set a shorter "
                "inner.seq_len, or give more data"
            )

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_len + 1]: the training sample of a global index >= 0; epochs follow each other without
        end."""
        epoch, i = divmod(index, self.train_windows)
        t = self.order.window(i, splitmix(self.seed ^ splitmix(epoch)))
        return self._window(t + t // (self._every - 1) if self._every else t, self.source.tokens)

    def batch(self, indices: Iterable[int]) -> Tensor:
        """int32 [n, seq_len + 1]: `sample` of n global indices."""
        starts, tokens = self._places(indices) * self.seq_len, self.source.tokens
        out = np.empty((len(starts), self.seq_len + 1), dtype=np.int32)
        if isinstance(tokens, Joined):
            tokens.rows(starts, out)
        else:
            for row, start in zip(out, starts.tolist(), strict=True):
                row[:] = tokens[start : start + self.seq_len + 1]
        return torch.from_numpy(out)

    def _places(self, indices: Iterable[int]) -> np.ndarray:
        """int64 [n]: their windows in the tokens."""
        epochs, i = np.divmod(np.fromiter(indices, dtype=np.int64), self.train_windows)
        found = np.empty_like(i)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            found[mine] = self.order.windows_of(i[mine], splitmix(self.seed ^ splitmix(epoch)))
        return found + found // (self._every - 1) if self._every else found

    def fetches(self, indices: Iterable[int]) -> list[Callable[[], None]]:
        """What to call to have on this machine what these samples need, as far as they are of two groups of the order, in the
        order of their needing it. They raise OSError."""
        tokens = self.source.tokens
        if not isinstance(tokens, Fetched):
            return []
        return tokens.fetches(self._places(self._of_two_groups(indices)) * self.seq_len, self.seq_len + 1)

    def _of_two_groups(self, indices: Iterable[int]) -> np.ndarray:
        """int64: those of the first two, which the cache has room for."""
        found = np.fromiter(indices, dtype=np.int64)
        epochs, i = np.divmod(found, self.train_windows)
        groups = epochs * self.train_windows + i // (self.order.group or self.train_windows)
        _, firsts = np.unique(groups, return_index=True)
        return found[np.isin(groups, groups[np.sort(firsts)[:2]])]

    @property
    def readahead(self) -> int:
        """Samples to look ahead: one group of the order is read while the next one is fetched. 0: there is no need to."""
        if not isinstance(self.source.tokens, Fetched):
            return 0
        return min(2 * self.order.group or self.train_windows, self.train_windows)

    @property
    def shuffle(self) -> list[int]:
        """For the run's fingerprint: windows of a group of the order, 0 where it is one permutation."""
        return [self.order.group if self.order.group < self.train_windows else 0]

    def heldout(self, i: int, of: int | None = None) -> np.ndarray:
        """int64 [seq_len + 1]: held-out window i of so many that are spread evenly over all, of all by default. Raises
        IndexError unless 0 <= i < of <= heldout_windows."""
        of = self.heldout_windows if of is None else of
        if not 0 <= i < of <= self.heldout_windows:
            raise IndexError(f"held-out window {i} of {of}, there are {self.heldout_windows}")
        window = i * self.heldout_windows // of
        if self._heldout is not None:
            return self._window(window, self._heldout)
        return self._window(window * self._every + self._every - 1, self.source.tokens)

    @property
    def heldout_bytes_per_token(self) -> float:
        """Of what is evaluated, on average: for bits per byte."""
        return self.source.bytes_per_token

    def describe(self) -> str:
        left = (len(self.source.tokens) - 1) % self.seq_len
        rest = f", {left:,} token{'s' * (left > 1)} at the end in none" if left else ""
        return f"{self.train_windows:,} training sequences, {self.heldout_windows:,} held out{rest}"

    def _window(self, w: int, tokens: Tokens) -> np.ndarray:
        start = w * self.seq_len
        return np.asarray(tokens[start : start + self.seq_len + 1], dtype=np.int64)


if __name__ == "__main__":
    import sys

    from diloco.corpus.command import serve

    sys.exit(serve(sys.argv[1:]))
