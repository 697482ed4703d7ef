"""A process that turns tasks of `prepare` into shards: lines of JSON in, lines of JSON out.

A task is a list of pieces of files and makes at most one shard of each split, the same whoever does it and when. Its
record, `parts/NNNNN.json`, is written last: a task with a record is done. The process ends when its pipes do.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diloco.corpus.documents import Damage, Document, Piece, documents
from diloco.corpus.folder import PARTS, SPLITS, ChunkSums, Pending, dtype_of, write_whole
from diloco.corpus.tokenizing import Tokenizer, load
from diloco.errors import ConfigError

BATCH = 1 << 20
"""Characters that are tokenized at once."""
REPORT_SECONDS = 0.5
NAMED = 1000
"""Damages of a task that are named; all are counted."""
MEND = "{}: mend it, or skip what is damaged with --on-error skip"

FALSE_END = "the text has the token that ends documents, {}, inside (another --end or none allows it)"


@dataclass(frozen=True)
class Options:
    out: str
    tokenizer: str
    end: str
    field: str
    format: str
    holdout: float
    on_error: str


class Stopped(Exception):
    """Damaged input, and nobody said to skip it."""


@dataclass
class Done:
    """A task's record."""

    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: int = 0
    empty: int = 0
    damages: list[str] = field(default_factory=list)


def part_path(out: Path, task: int) -> Path:
    return out / PARTS / f"{task:05d}.json"


def held_out(text: bytes, share: float) -> bool:
    """Whether a document is held out: by its hash, so the same in every corpus, and so are copies of it."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < share * 2.0**64


class _Shard:
    """The files of one shard while they are written."""

    def __init__(self, out: Path, name: str, dtype: str, end: int | None) -> None:
        self.name, self._dtype, self._end = name, dtype, end
        self._path, self._sums = out / name, ChunkSums()
        self._tokens, self._ends = Pending(out / f"{name}.tokens", self._sums), Pending(out / f"{name}.ends")
        self.tokens = self.documents = self.bytes = 0

    def add(self, ids: np.ndarray, size: int) -> None:
        """ids: of a document of `size` bytes."""
        data = np.empty(len(ids) + (self._end is not None), dtype=self._dtype)
        data[: len(ids)] = ids
        data[len(ids) :] = self._end or 0
        self._tokens.write(data.data)
        self.tokens += len(data)
        self._ends.write(np.asarray([self.tokens], dtype="<u8").data)
        self.documents += 1
        self.bytes += size

    def close(self, *failure: Any) -> None:
        for file in (self._tokens, self._ends):
            file.__exit__(*failure or (None,))
        if not any(failure):
            self._sums.hexdigest()
            write_whole(self._path.with_suffix(".sums"), self._sums.sums)

    def record(self) -> dict[str, Any]:
        return {
            "names": self.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256": self._tokens.sha256,
            "ends_sha256": self._ends.sha256,
        }


class _Progress:
    """Tells the parent how far it is, now and then."""

    def __init__(self, task: int) -> None:
        self.task, self.bytes, self.tokens, self._next = task, 0, 0, 0.0

    def seen(self, count: int) -> None:
        self.bytes += count

    def tell(self) -> None:
        if time.monotonic() > self._next:
            say(task=self.task, bytes=self.bytes, tokens=self.tokens)
            self._next = time.monotonic() + REPORT_SECONDS


def work(task: int, pieces: Sequence[Piece], options: Options, tokenizer: Tokenizer, progress: _Progress) -> Done:
    """Writes the task's shards. Raises Stopped, OSError, ConfigError."""
    done, out, dtype = Done(), Path(options.out), dtype_of(tokenizer.vocab)
    shards: dict[str, _Shard] = {}
    with ExitStack() as stack:
        for batch in _batches(_readable(pieces, options, done, progress)):
            encoded = tokenizer.encode([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                if tokenizer.end is not None and tokenizer.end in ids:
                    _skip(document.damage(FALSE_END.format(tokenizer.end)), options, done)
                    continue
                text = document.text.encode()
                split = SPLITS[held_out(text, options.holdout)]
                if split not in shards:
                    shards[split] = _Shard(out, f"{split}-{task:05d}", dtype, tokenizer.end)
                    stack.push(shards[split].close)
                shards[split].add(ids, len(text))
            progress.tokens = sum(shard.tokens for shard in shards.values())
            progress.tell()
    done.shards = {split: shard.record() for split, shard in shards.items() if shard.tokens}
    write_whole(part_path(out, task), json.dumps(asdict(done), sort_keys=True).encode())
    return done


def _readable(pieces: Sequence[Piece], options: Options, done: Done, progress: _Progress) -> Iterator[Document]:
    for piece in pieces:
        for item in documents(piece, options.format, options.field, progress.seen):
            if isinstance(item, Damage):
                _skip(item, options, done)
                progress.tell()
            elif item.text:
                yield item
            else:
                done.empty += 1


def _skip(damage: Damage, options: Options, done: Done) -> None:
    if options.on_error == "stop":
        raise Stopped(MEND.format(damage))
    done.skipped += 1
    if len(done.damages) < NAMED:
        done.damages.append(" ".join(str(damage).splitlines()))


def _batches(items: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def say(**what: Any) -> None:
    """Ends the process if nobody listens: whoever handed it the task was killed."""
    try:
        print(json.dumps(what), flush=True)
    except BrokenPipeError:
        os._exit(1)


def main() -> int:
    try:
        options = Options(**json.loads(sys.stdin.readline()))
        tokenizer = load(options.tokenizer, options.end)
        for line in sys.stdin:
            order = json.loads(line)
            progress = _Progress(order["task"])
            work(order["task"], [Piece(*piece) for piece in order["pieces"]], options, tokenizer, progress)
            say(task=order["task"], bytes=sum(piece[3] for piece in order["pieces"]), tokens=progress.tokens, done=True)
    except KeyboardInterrupt:
        return 130
    except (Stopped, OSError, ConfigError) as error:
        say(failed=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
