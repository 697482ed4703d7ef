"""The folder that `prepare` makes: token shards, where their documents end, and an index written last.

index.json          counts, checksums and the tokenizer, of all shards
train-00000.tokens  ids one after the other, little-endian uint8, uint16 or uint32 (`dtype`)
train-00000.sums    BLAKE3 of each MiB of these, 32 bytes each: what a reader of a part checks it by
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
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from ckpt.store import MissingError, Store, StoreError
from diloco.errors import ConfigError

INDEX, PLAN, SKIPPED, PARTS = "index.json", "plan.json", "skipped.txt", "parts"
FORMAT = "diloco tokens 2"
CHUNK = 1 << 20
"""Bytes of a shard that have a digest of their own."""
ENDINGS = ("tokens", "sums", "ends")
SPLITS = ("train", "heldout")
DTYPES = ("<u1", "<u2", "<u4")
_NAME, _SHA256 = re.compile(r"[a-z]+-[0-9]+"), re.compile(r"[0-9a-f]{64}")
READERS = 4
"""Files of a folder that are read at once to verify it."""


@dataclass(frozen=True)
class Split:
    """The shards of a split, column by column: an index of thousands of shards is read in milliseconds."""

    names: Sequence[str] = ()
    tokens: Sequence[int] = ()
    documents: Sequence[int] = ()
    bytes: Sequence[int] = ()
    """Of text, in UTF-8."""
    sha256: Sequence[str] = ()
    """Of the digests of the tokens' chunks."""
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
    return next(name for name in DTYPES if vocab <= 1 << 8 * np.dtype(name).itemsize)


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


@lru_cache(maxsize=64)
def store_of(place: str) -> Store:
    """One client for each folder and process: making one takes a tenth of a second."""
    return Store(place)


def read_index(place: str | Path, key: str) -> Index:
    """Of a directory or a URL. key: the setting that named it. Raises ConfigError."""
    try:
        values = json.loads(store_of(str(place)).read(INDEX))
        if values.pop("format") != FORMAT:
            raise ValueError(f"not of the format {FORMAT!r}")
        train, heldout = (Split(**values.pop(name)) for name in SPLITS)
        index = Index(**values, train=train, heldout=heldout)
        _check(index)
    except MissingError:
        raise ConfigError(
            f"{key}={place} holds no {INDEX}: make it with python -m diloco.data prepare SRC... OUT, and copy it there"
        ) from None
    except StoreError as error:
        raise ConfigError(f"{key}={place} cannot be read ({error}): set it to a prepared folder or its URL") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}={place}/{INDEX} cannot be read ({error}): prepare the folder anew") from error
    names = [*index.train.names, *index.heldout.names]
    if odd := [name for name in names if not _NAME.fullmatch(name)]:  # they become paths
        raise ConfigError(f"{key}={place}/{INDEX} names {odd[0]!r}, which is no shard's name: prepare the folder anew")
    wanted = set() if is_url(place) else {f"{name}.{ending}" for ending in ENDINGS for name in names}
    if missing := wanted - set(os.listdir(place) if wanted else ()):
        raise ConfigError(f"{key}={place} lacks {min(missing)}, which its index names: copy it again")
    return index


def _check(index: Index) -> None:
    """What comes from a bucket may be anything. Raises ValueError."""
    if index.dtype not in DTYPES or not _counts([index.vocab], 1) or not _counts([index.skipped, index.empty]):
        raise ValueError("dtype or counts are none")
    if index.end is not None and not _counts([index.end]):
        raise ValueError(f"end={index.end!r} is no token")
    if not all(isinstance(each, str) for pair in index.tokenizer.items() for each in pair):
        raise ValueError("its tokenizer is not names and checksums")
    for split in (index.train, index.heldout):
        columns = [getattr(split, name) for name in COLUMNS]
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise ValueError("its columns are not lists of one length")
        digests = [*split.sha256, *split.ends_sha256]
        if not all(isinstance(each, str) for each in split.names) or not all(map(_is_sha256, digests)):
            raise ValueError("names or checksums are none")
        if not _counts(split.tokens, 1) or not _counts([*split.documents, *split.bytes]):
            raise ValueError("counts of tokens, documents or bytes are none")


def _counts(values: Sequence[Any], least: int = 0) -> bool:
    return all(type(value) is int and value >= least for value in values)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def wrong(place: str | Path, index: Index) -> Iterator[str]:
    """Reads everything; one sentence for each file that is not what the index says. Raises StoreError."""
    store = store_of(str(place))
    wanted: list[tuple[str, str, Hash]] = [
        (name, checksum, hashlib.sha256()) for name, checksum in index.tokenizer.items()
    ]
    for split in (index.train, index.heldout):
        for name, tokens, ends in zip(split.names, split.sha256, split.ends_sha256, strict=True):
            wanted.append((f"{name}.tokens", tokens, ChunkSums()))
            wanted += [(f"{name}.sums", tokens, hashlib.sha256()), (f"{name}.ends", ends, hashlib.sha256())]
    with ThreadPoolExecutor(READERS) as pool:
        for (name, checksum, _), seen in zip(
            wanted, pool.map(lambda w: _digest(store, w[0], w[2]), wanted), strict=True
        ):
            if seen != checksum:
                yield f"{store.url}/{name} is {'damaged' if seen else 'missing'}: its sha256 is not {checksum}"


def _digest(store: Store, name: str, into: Hash) -> str:
    """Empty if there is no such file."""
    at = 0
    try:
        while part := store.read(name, at, at + 8 * CHUNK):
            into.update(part)
            at += len(part)
    except MissingError:
        return ""
    return into.hexdigest()


class Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class ChunkSums:
    """sha256 of the BLAKE3s of a file's chunks. `sums`: these, 32 bytes for each chunk, once `hexdigest` was asked."""

    def __init__(self) -> None:
        self.sums = b""
        self._open, self._room = blake3(), CHUNK

    def update(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            self._open.update(rest[: self._room])
            taken = min(self._room, len(rest))
            rest, self._room = rest[taken:], self._room - taken
            if not self._room:
                self._close()

    def hexdigest(self) -> str:
        if self._room < CHUNK:
            self._close()
        return hashlib.sha256(self.sums).hexdigest()

    def _close(self) -> None:
        self.sums += self._open.digest()
        self._open, self._room = blake3(), CHUNK


def write_whole(path: Path, data: bytes) -> None:
    """All of it or nothing, also after a kill or a loss of power."""
    with Pending(path) as file:
        file.write(data)


class Pending:
    """A file under a temporary name until it is complete; removed if that fails. Counts a digest as it is written."""

    def __init__(self, path: Path, hash: Hash | None = None) -> None:
        self.path = path
        self._hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._hidden.open("wb")
        self._hash: Hash = hash or hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

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
