"""Documents of text, JSON lines and Parquet files: local or at any fsspec URL, plain or compressed.

A file is read in *pieces*: whole, or, where lines can be found from anywhere, the lines that begin in a range of
bytes. What cannot be read is a `Damage` among the documents; who reads decides what becomes of it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec

from diloco.errors import ConfigError

CHUNK = 1 << 20
WINDOW = 1 << 31
"""Bytes: of zstd's frames the longest, as of --long=31. A frame takes what it needs."""
LINES = ("jsonl", "ndjson", "json")
"""Endings of JSON lines; `.json` is what many corpora call them."""
COMPRESSED = ("gz", "zst")
FORMATS = ("text", "jsonl", "parquet")


class Piece(NamedTuple):
    """Lines of a file that begin in its bytes [start, stop); stop = -1: all of it."""

    path: str
    start: int
    stop: int
    bytes: int
    """Of the file's, as stored: for the progress line."""


@dataclass(frozen=True)
class Document:
    line: int
    """Where it begins, from 1, in its piece; of Parquet the row."""
    text: str
    path: str = field(default="", compare=False)
    first: int = field(default=0, compare=False)
    """The byte of the file where the lines of its piece begin."""

    def damage(self, reason: str) -> Damage:
        return Damage(self.path, _lines_before(self.path, self.first) + self.line, reason)


@dataclass(frozen=True)
class Damage:
    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


Items = Iterator[Document | Damage]


def format_of(path: str, wanted: str = "auto") -> str:
    """text, jsonl or parquet, by the name's ending."""
    if wanted != "auto":
        return wanted
    ending = _plain(path).rpartition(".")[2].lower()
    return "jsonl" if ending in LINES else "parquet" if ending == "parquet" else "text"


def splits(path: str, wanted: str) -> bool:
    """Whether lines can be found from the middle of the file."""
    return format_of(path, wanted) == "jsonl" and _compression(path) == ""


def documents(piece: Piece, wanted: str, field: str, seen: Callable[[int], None] = lambda n: None) -> Items:
    """All documents of the piece. field: of JSON lines and Parquet. seen: told how many stored bytes were read. Raises
    OSError if the file is not there or its store fails, ConfigError if a package is missing."""
    with fsspec.open(piece.path, "rb") as opened:
        stored = _Stored(piece.path, opened)
        file = cast(BinaryIO, stored)
        match format_of(piece.path, wanted):
            case "parquet":
                yield from _parquet(piece.path, stored, field)
                seen(piece.bytes)
            case "jsonl":
                yield from _json_lines(piece, file, field, seen)
            case _:
                yield from _text(piece.path, _chunks(piece.path, file, seen))


def _plain(path: str) -> str:
    stem, _, ending = path.rpartition(".")
    return stem if ending.lower() in COMPRESSED else path


def _compression(path: str) -> str:
    ending = path.rpartition(".")[2].lower()
    return ending if ending in COMPRESSED else ""


# ---- bytes ----


class _Stored:
    """A file of a store, whose failures are OSErrors whatever its client raises. They are no damage: the store may be back."""

    def __init__(self, path: str, file: Any) -> None:
        self._path, self._file = path, file
        self.failure: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        return cast(bytes, self._asked(self._file.read, size))

    def seek(self, *where: int) -> int:
        return cast(int, self._asked(self._file.seek, *where))

    def _asked(self, what: Callable[..., Any], *arguments: int) -> Any:
        try:
            return what(*arguments)
        except Exception as error:
            reason = str(error) or type(error).__name__
            self.failure = OSError(f"{self._path} cannot be read ({reason}): the same command goes on when it can")
            raise self.failure from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _CutOff(Exception):
    """The rest of a file cannot be read."""


def _chunks(path: str, file: BinaryIO, seen: Callable[[int], None]) -> Iterator[bytes]:
    """The file's bytes, decompressed. Raises _CutOff."""
    stored = _counted(file, seen)
    match _compression(path):
        case "gz":
            return _gzip(stored)
        case "zst":
            return _zstd(stored)
    return stored


def _counted(file: BinaryIO, seen: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        seen(len(chunk))
        yield chunk


class _Pulled:
    """An iterator of bytes as what gzip reads from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._chunks, b"")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def _gzip(stored: Iterator[bytes]) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=cast(BinaryIO, _Pulled(stored))) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _CutOff(f"the gzip stream is damaged ({error})") from error


def _zstd(stored: Iterator[bytes]) -> Iterator[bytes]:
    """All frames. zstandard's own stream_reader, which fsspec uses, ends without an error where a file is cut off, and
    after the first frame."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError("a .zst file needs the package zstandard: pip install 'diloco[data]'") from None
    frame = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
    begun = False
    try:
        for chunk in stored:
            while chunk:
                begun = True
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj(), False
    except zstandard.ZstdError as error:
        raise _CutOff(f"the zstd stream is damaged ({error})") from error
    if begun:
        raise _CutOff("the zstd stream ends too early")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends; time linear in a line's length, however many chunks it takes."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for line in others:
            yield b"".join(parts)
            parts = [line]
    if rest := b"".join(parts):
        yield rest


# ---- formats ----


def _text(path: str, chunks: Iterator[bytes]) -> Items:
    """A text file is one document."""
    parts: list[bytes] = []
    try:
        parts.extend(chunks)
        yield Document(1, b"".join(parts).decode(), path)
    except UnicodeDecodeError as error:
        yield Damage(path, error.object[: error.start].count(b"\n") + 1, _undecodable(error))
    except _CutOff as cut:
        yield Damage(path, sum(part.count(b"\n") for part in parts) + 1, str(cut))


def _undecodable(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x})"


def _json_lines(piece: Piece, file: BinaryIO, field: str, seen: Callable[[int], None]) -> Items:
    at = max(piece.start - 1, 0)
    if at:
        file.seek(at)
    lines = _split_lines(_chunks(piece.path, file, seen))
    if piece.start > 0:
        at += len(next(lines, b"")) + 1  # of the piece before: it began there, or ends just before this one
    first, number = at, 0

    def damage(reason: str) -> Damage:
        return Damage(piece.path, _lines_before(piece.path, first) + number, reason)

    try:
        while piece.stop < 0 or at < piece.stop:
            number += 1
            if (line := next(lines, None)) is None:
                return
            at += len(line) + 1
            if line.strip():
                text = _field(line, field, first=at == len(line) + 1)
                yield damage(text.reason) if isinstance(text, _Wrong) else Document(number, text, piece.path, first)
    except _CutOff as cut:
        yield damage(f"{cut}; the rest of the file is lost")


@lru_cache(maxsize=8)
def _lines_before(path: str, stop: int) -> int:
    """Line ends in the first `stop` bytes: read for the sentence about damage only."""
    count = 0
    if stop:
        with fsspec.open(path, "rb") as file:
            while stop > 0 and (chunk := file.read(min(CHUNK, stop))):
                count += chunk.count(b"\n")
                stop -= len(chunk)
    return count


class _Wrong(NamedTuple):
    reason: str


def _field(line: bytes, field: str, first: bool) -> str | _Wrong:
    """The text of a JSON line; first: of its file, where a byte order mark may stand."""
    try:
        value = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return _Wrong(_undecodable(error))
    except (ValueError, RecursionError) as error:
        return _Wrong(f"not JSON ({error})")
    if not isinstance(value, dict):
        return _Wrong(f"a JSON {type(value).__name__}, not an object with the field {field}")
    return _checked(value.get(field), field, value)


def _checked(text: Any, field: str, fields: Iterable[str]) -> str | _Wrong:
    if not isinstance(text, str):
        return _Wrong(f"no text in the field {field} (there is {', '.join(list(fields)[:8]) or 'nothing'})")
    try:
        text.encode()
    except UnicodeEncodeError:
        return _Wrong(f"half a surrogate pair in the field {field}")
    return text


def _parquet(path: str, file: _Stored, field: str) -> Items:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("a Parquet file needs the package pyarrow: pip install 'diloco[data]'") from None
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if field not in names:
            yield Damage(path, 0, f"no column {field} (there is {', '.join(names[:8])})")
            return
        for batch in table.iter_batches(256, columns=[field]):
            for value in batch.column(0):
                row += 1
                text = _value(value, field)
                yield Damage(path, row, text.reason) if isinstance(text, _Wrong) else Document(row, text, path)
    except (pyarrow.ArrowException, OSError) as error:
        if file.failure is not None:
            raise file.failure from error
        yield Damage(path, row + 1, f"the Parquet file is damaged ({str(error).strip()}); the rest of it is lost")


def _value(value: Any, field: str) -> str | _Wrong:
    try:
        return _checked(value.as_py(), field, [field])
    except UnicodeDecodeError as error:
        return _Wrong(_undecodable(error))
