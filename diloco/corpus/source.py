"""A prepared folder as a data source: data=prepared data.path=DIR, or its URL. Opening reads the index, and no tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from diloco.corpus.cache import RUN, RUN_BYTES, Cache, Run, Shard
from diloco.corpus.folder import CHUNK, Index, Split, is_url, read_index
from diloco.data import BLOCK_TOKENS, DataConfig, FileTokens, Joined, check_cache
from diloco.errors import ConfigError

ALONE = 16
"""Chunks that are fetched one by one, before any run of them."""
SHARDS = "diloco-shards"
"""In data.cache: all below it may be removed."""


@dataclass(frozen=True)
class Prepared:
    index: Index
    tokens: Joined
    heldout: Joined | None
    room: int = 0
    """Bytes of the cache that it needs; 0: it is on this machine."""

    @property
    def vocab(self) -> int:
        return self.index.vocab

    @property
    def bytes_per_token(self) -> float:
        """Of what is evaluated, if something was held out."""
        split = self.index.heldout if self.heldout else self.index.train
        return sum(split.bytes) / sum(split.tokens)

    @cached_property
    def digest(self) -> str:
        return self.index.digest


def prepared(cfg: DataConfig) -> Prepared:
    """The folder at `data.path`, a directory or a URL. Raises ConfigError."""
    if not isinstance(cfg.path, str) or cfg.pattern is not None:
        raise ConfigError(
            f"data.path={cfg.path} with data.pattern={cfg.pattern} is not one prepared folder: set data.path to one, "
            "data.pattern=null, and data.sources for several"
        )
    remote = is_url(cfg.path)
    place = cfg.path.rstrip("/") if remote else str(Path(cfg.path).expanduser())
    index = read_index(place, "data.path")
    if not index.train.names:
        raise ConfigError(f"data.path={place} has no tokens to train on: prepare it anew from more text")
    room = room_for(index, cfg.shuffle) if remote else 0
    check_cache(cfg, room)
    splits = [split for split in (index.train, index.heldout) if split.names]
    cache = _cache(cfg, place, index) if remote else None
    train, *heldout = [_tokens(place, index, split, cache) for split in splits]
    return Prepared(index, train, heldout[0] if heldout else None, room)


def _tokens(folder: str, index: Index, split: Split, cache: Cache | None) -> Joined:
    if cache is not None:
        return CachedTokens(cache, split, index.dtype)
    return FileTokens([f"{folder}/{name}.tokens" for name in split.names], split.tokens, index.dtype)


class CachedTokens(Joined):
    """Shards in object storage, as far as they are read."""

    def __init__(self, cache: Cache, split: Split, dtype: str) -> None:
        super().__init__(split.names, split.tokens, dtype)
        self._cache, width = cache, self.dtype.itemsize
        columns = zip(split.names, split.tokens, split.sha256, strict=True)
        self._shards = [Shard(name, tokens * width, checksum) for name, tokens, checksum in columns]

    def part(self, file: int, size: int, start: int, stop: int) -> np.ndarray:
        """Raises OSError if the tokens are damaged, or their store stays away."""
        width = self.dtype.itemsize
        return np.frombuffer(self._cache.read(self._shards[file], start * width, stop * width), dtype=self.dtype)

    def rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """As of all files, but looks at each run of chunks once. Raises OSError as `part` does."""
        length, run = out.shape[1], RUN_BYTES // self.dtype.itemsize
        files, sizes, places = self.locate(starts)
        whole = (places % run + length <= run) & (places + length <= sizes)
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        columns = (array.tolist() for array in (whole, files, places // run, places % run, starts))
        for row, (inside, file, number, place, start) in enumerate(zip(*columns, strict=True)):
            if inside:
                wanted.setdefault((file, number), []).append((row, place))
            else:
                out[row] = self[start : start + length]
        chunk = run // RUN
        for (file, number), rows in wanted.items():
            spans = {(place // chunk, (place + length - 1) // chunk) for _, place in rows}
            chunks = {at for first, last in spans for at in range(first, last + 1)}
            tokens = np.frombuffer(self._cache.run(Run(self._shards[file], number), chunks), dtype=self.dtype)
            for row, place in rows:
                out[row] = tokens[place : place + length]

    def fetches(self, starts: np.ndarray, length: int) -> list[Callable[[], None]]:
        """As diloco.data.Fetched wants it: the chunks of both ends, and of shorter windows that is all. The first are fetched
        alone, so that training begins; then all that is needed of a run at once."""
        files, _, places = self.locate(np.stack([starts, np.minimum(starts + length, len(self)) - 1], axis=1).ravel())
        chunks = places * self.dtype.itemsize // CHUNK
        _, firsts = np.unique(files << 32 | chunks, return_index=True)
        needed = [(int(files[k]), int(chunks[k])) for k in np.sort(firsts)]
        runs: dict[tuple[int, int], list[int]] = {}
        for file, chunk in needed:
            runs.setdefault((file, chunk // RUN), []).append(chunk % RUN)
        ranges = [(file, chunk // RUN, chunk % RUN, chunk % RUN + 1) for file, chunk in needed[:ALONE]]
        ranges += [(file, run, min(inside), max(inside) + 1) for (file, run), inside in runs.items()]
        return [partial(self._cache.bring, Run(self._shards[file], run), a, b) for file, run, a, b in ranges]


def _cache(cfg: DataConfig, url: str, index: Index) -> Cache:
    """Raises ConfigError unless it may be written to."""
    root = Path(cfg.cache).expanduser() / SHARDS
    nearest = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"data.cache={cfg.cache} cannot be written to, because of {nearest}: set it to a directory of yours"
        )
    return Cache(url, root, index.digest[:16], cfg.cache_bytes, cfg.patience)


def room_for(index: Index, shuffle: int) -> int:
    """Bytes that the cache needs: two groups of the order with the chunks that their blocks end in, or all, and some room."""
    width, tokens = np.dtype(index.dtype).itemsize, sum(index.train.tokens)
    group = max(shuffle, 1)
    blocks = group // min(group, BLOCK_TOKENS) + 1
    wanted = min(2 * (group * width + blocks * CHUNK), tokens * width) if shuffle else tokens * width
    return wanted * 5 // 4 + RUN_BYTES
