"""The folder that `prepare` makes: token shards, where their documents end, and an index written last.

index.json          counts, checksums and the tokenizer, of all shards
train-00000.tokens  ids one after the other, little-endian uint8, uint16 or uint32 (`dtype`)
train-00000.ends    where each document ends, in tokens of its shard: uint64, ascending
heldout-…           the same of documents that are never trained on
tokenizer.json …    the tokenizer's own files
plan.json           what it was made of; not part of the data
skipped.txt         what was damaged, file and line
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diloco.errors import ConfigError

INDEX, PLAN, SKIPPED, PARTS = "index.json", "plan.json", "skipped.txt", "parts"
FORMAT = "diloco tokens 1"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Split:
    """The shards of a split, column by column: an index of thousands of shards is read in milliseconds."""

    names: Sequence[str] = ()
    tokens: Sequence[int] = ()
    documents: Sequence[int] = ()
    bytes: Sequence[int] = ()
    """Of text, in UTF-8."""
    sha256: Sequence[str] = ()
    """Of the tokens."""
    ends_sha256: Sequence[str] = ()

    @staticmethod
    def of(shards: Sequence[Mapping[str, Any]]) -> Split:
        return Split(*([shard[column] for shard in shards] for column in COLUMNS))


COLUMNS = ("names", "tokens", "documents", "bytes", "sha256", "ends_sha256")


@dataclass(frozen=True)
class Index:
    dtype: str
    vocab: int
    end: int | None
    """Token that follows every document."""
    tokenizer: Mapping[str, str]
    """Its files -> sha256."""
    holdout: float
    skipped: int
    """Damaged documents, or rests of files."""
    empty: int
    """Documents without text."""
    train: Split = field(default_factory=Split)
    heldout: Split = field(default_factory=Split)

    @property
    def digest(self) -> str:
        """sha256, hex, of everything that training sees: of the checksums, so without reading the shards."""
        seen = [self.dtype, self.vocab, self.end, self.tokenizer]
        seen += [[list(split.tokens), split.sha256, split.ends_sha256] for split in (self.train, self.heldout)]
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    def encode(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, indent=0).encode() + b"\n"


def dtype_of(vocab: int) -> str:
    """The narrowest that holds all ids."""
    return next(name for name in ("<u1", "<u2", "<u4") if vocab <= 1 << 8 * np.dtype(name).itemsize)


def read_index(folder: Path, key: str) -> Index:
    """key: the setting that named the folder. Raises ConfigError."""
    try:
        values = json.loads((folder / INDEX).read_bytes())
        if values.pop("format") != FORMAT:
            raise ValueError(f"not of the format {FORMAT!r}")
        train, heldout = (Split(**values.pop(name)) for name in SPLITS)
        index = Index(**values, train=train, heldout=heldout)
    except FileNotFoundError:
        raise ConfigError(
            f"{key}={folder} holds no {INDEX}: make it with python -m diloco.data prepare SRC... {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}={folder}/{INDEX} cannot be read ({error}): prepare the folder anew") from error
    names = [*index.train.names, *index.heldout.names]
    if missing := {f"{name}.{ending}" for ending in ("tokens", "ends") for name in names} - set(os.listdir(folder)):
        raise ConfigError(f"{key}={folder} lacks {min(missing)}, which its index names: copy it again")
    return index


def wrong(folder: Path, index: Index) -> Iterator[str]:
    """Reads everything; one sentence for each file that is not what the index says."""
    for name, checksum in index.tokenizer.items():
        if not (folder / name).is_file() or sha256(folder / name) != checksum:
            yield f"{folder / name} is not the tokenizer's file that the tokens were made with"
    for split in (index.train, index.heldout):
        for name, tokens, ends in zip(split.names, split.sha256, split.ends_sha256, strict=True):
            for ending, checksum in ((".tokens", tokens), (".ends", ends)):
                if sha256(folder / f"{name}{ending}") != checksum:
                    yield f"{folder / name}{ending} is damaged: its sha256 is not {checksum}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """All of it or nothing, also after a kill or a loss of power."""
    with Pending(path) as file:
        file.write(data)


class Pending:
    """A file under a temporary name until it is complete; removed if that fails. Counts a sha256 as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._hidden.open("wb")
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def __enter__(self) -> Pending:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file as file:
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
        if kind is None:
            self._hidden.rename(self.path)
        else:
            self._hidden.unlink(missing_ok=True)
