"""A prepared folder as a data source: data=prepared data.path=DIR. Opening reads the index, and no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diloco.corpus.folder import Index, Split, read_index
from diloco.data import DataConfig, FileTokens
from diloco.errors import ConfigError


@dataclass(frozen=True)
class Prepared:
    index: Index
    tokens: FileTokens
    heldout: FileTokens | None

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
    """The folder at `data.path`. Raises ConfigError."""
    if not isinstance(cfg.path, str) or cfg.pattern is not None:
        raise ConfigError(
            f"data.path={cfg.path} with data.pattern={cfg.pattern} is not one prepared folder: set data.path to one, "
            "data.pattern=null, and data.sources for several"
        )
    folder = Path(cfg.path).expanduser()
    index = read_index(folder, "data.path")
    if not index.train.names:
        raise ConfigError(f"data.path={folder} has no tokens to train on: prepare it anew from more text")
    heldout = _tokens(folder, index, index.heldout) if index.heldout.names else None
    return Prepared(index, _tokens(folder, index, index.train), heldout)


def _tokens(folder: Path, index: Index, split: Split) -> FileTokens:
    return FileTokens([f"{folder}/{name}.tokens" for name in split.names], split.tokens, index.dtype)
