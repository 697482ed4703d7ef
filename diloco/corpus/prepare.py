"""`python -m diloco.data prepare`: text to a folder of token shards, in parallel, and on from where it was killed."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from diloco.corpus.documents import Piece, splits
from diloco.corpus.folder import (
    FORMAT,
    INDEX,
    PARTS,
    PLAN,
    SKIPPED,
    SPLITS,
    Index,
    Split,
    dtype_of,
    read_index,
    write_whole,
)
from diloco.corpus.inputs import inputs
from diloco.corpus.tokenizing import Tokenizer, load
from diloco.corpus.worker import MEND, Options, part_path
from diloco.errors import ConfigError

TASK_BYTES = (1 << 20, 1 << 30)
"""Least and most stored bytes of a task, 1 MiB and 1 GiB; between them 1/64 of all."""
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 10.0
"""Between two progress lines."""

Task = list[Piece]


def plan(files: Sequence[tuple[str, int | None]], wanted: str) -> list[Task]:
    """Pieces of all files in order, some to a task: a function of names and sizes alone. wanted: the format."""
    least, most = TASK_BYTES
    size = min(max(sum(total or 0 for _, total in files) // 64, least), most)
    tasks: list[Task] = []
    room = 0
    for path, total in files:
        for piece in _pieces(path, total, size, wanted):
            if room < piece.bytes:
                tasks.append([])
                room = size
            tasks[-1].append(piece)
            room -= piece.bytes
    return tasks


def _pieces(path: str, total: int | None, size: int, wanted: str) -> Iterator[Piece]:
    """total: None if nobody knows; then the file is taken for a task's `size`."""
    if total is None or not splits(path, wanted) or total <= size:
        if total != 0:
            yield Piece(path, 0, -1, size if total is None else total)
        return
    for start in range(0, total, size):
        yield Piece(path, start, min(start + size, total), min(size, total - start))


def prepare(sources: Sequence[str], options: Options, workers: int) -> Index:
    """Makes the folder `options.out`, or what is missing of it. Raises ConfigError."""
    out = Path(options.out)
    if "://" in options.out:
        raise ConfigError(f"OUT {out} is a URL: prepare into a directory, and copy that")
    tokenizer = load(options.tokenizer, options.end)
    files, lost = inputs(sources, out)
    if lost and options.on_error == "stop":
        raise ConfigError(MEND.format(lost[0]))
    tasks = plan(files, options.format)
    if not tasks:
        raise ConfigError(f"SRC {' '.join(sources)} holds nothing but empty files: name files with text")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    with _alone(out):
        if _begin(out, options, tokenizer, tasks):
            return read_index(out, "OUT")
        for name, data in tokenizer.files().items():
            write_whole(out / name, data)
        todo = [task for task in range(len(tasks)) if not part_path(out, task).exists()]
        if todo:
            print(f"{len(files):,} files · {len(tasks):,} tasks, {len(tasks) - len(todo):,} done before", flush=True)
            _Team(tasks, todo, replace(options, out=str(out)), min(workers, len(todo))).run()
        return _finish(out, options, tokenizer, len(tasks), lost)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with (out / PARTS / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"OUT {out} is being prepared by another process: wait for it") from None
        yield


def _begin(out: Path, options: Options, tokenizer: Tokenizer, tasks: list[Task]) -> bool:
    """Sets down what is made of what, or checks that it is what was begun. True: all is done."""
    made = {key: value for key, value in asdict(options).items() if key in ("field", "format", "holdout")}
    made |= {"shards": FORMAT, "tokenizer": _checksums(tokenizer), "end": tokenizer.end, "tasks": tasks}
    data = json.dumps(made, indent=1, sort_keys=True).encode() + b"\n"
    if (out / PLAN).exists():
        if (out / PLAN).read_bytes() != data:
            raise ConfigError(
                f"OUT {out} was begun with other files or options, or by another version ({PLAN} has them): name another, or "
                "empty it"
            )
    elif others := [path.name for path in out.iterdir() if path.name != PARTS]:
        raise ConfigError(f"OUT {out} holds {min(others)}, which is not of a preparation: name an empty directory")
    for path in [*out.glob(".*.tmp"), *(out / PARTS).glob(".*.tmp")]:
        path.unlink(missing_ok=True)
    write_whole(out / PLAN, data)
    return (out / INDEX).exists()


def _checksums(tokenizer: Tokenizer) -> dict[str, str]:
    return {name: sha256(data).hexdigest() for name, data in tokenizer.files().items()}


def _finish(out: Path, options: Options, tokenizer: Tokenizer, tasks: int, lost: Sequence[str]) -> Index:
    """The index from the tasks' records, which are not needed any more."""
    done = [json.loads(part_path(out, task).read_bytes()) for task in range(tasks)]
    train, heldout = (Split.of([d["shards"][s] for d in done if s in d["shards"]]) for s in SPLITS)
    skipped, empty = (sum(d[count] for d in done) for count in ("skipped", "empty"))
    told = dtype_of(tokenizer.vocab), tokenizer.vocab, tokenizer.end, _checksums(tokenizer)
    index = Index(*told, options.holdout, skipped + len(lost), empty, train, heldout)
    damages = [*lost, *(damage for d in done for damage in d["damages"])]
    write_whole(out / SKIPPED, "".join(f"{damage}\n" for damage in damages).encode())
    write_whole(out / INDEX, index.encode())
    for task in range(tasks):
        part_path(out, task).unlink()
    return index


class _Team:
    """Workers, each with a thread that hands it tasks and reads its lines."""

    def __init__(self, tasks: list[Task], todo: list[int], options: Options, workers: int) -> None:
        self._tasks, self._options, self._workers = tasks, options, workers
        self._left = iter(todo)
        self._lock = threading.Lock()
        self._at: dict[int, tuple[int, int]] = {}
        """Task -> (stored bytes read, tokens)."""
        self._total = sum(piece.bytes for task in todo for piece in tasks[task])
        self._processes: list[subprocess.Popen[str]] = []
        self._stopped = False

    def run(self) -> None:
        """Raises ConfigError with what a worker said."""
        begin = time.monotonic()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                ends: set[Future[None]] = {pool.submit(self._drive) for _ in range(self._workers)}
                while ends:
                    seconds = TERMINAL_SECONDS if sys.stdout.isatty() else LOG_SECONDS
                    done, ends = wait(ends, seconds, FIRST_EXCEPTION)
                    for end in done:
                        end.result()
                    self._print(time.monotonic() - begin, last=not ends)
            finally:
                self._end()

    def _drive(self) -> None:
        with self._lock:
            if self._stopped:
                return
            process = _start(self._options)
            self._processes.append(process)
        with process:
            while (task := self._next()) is not None:
                self._do(process, task)

    def _next(self) -> int | None:
        with self._lock:
            return None if self._stopped else next(self._left, None)

    def _do(self, process: subprocess.Popen[str], task: int) -> None:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it says why
            print(json.dumps({"task": task, "pieces": self._tasks[task]}), file=process.stdin, flush=True)
        for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if "failed" in said:
                raise ConfigError(said["failed"])
            self._at[task] = said["bytes"], said["tokens"]
            if "done" in said:
                return
        if not self._stopped:
            raise ConfigError(
                f"a worker ended with code {process.wait()} at {self._tasks[task][0].path}: start again to go on"
            )

    def _end(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.poll() is None and sys.exc_info()[0] is not None:
                    process.terminate()

    def _print(self, seconds: float, last: bool) -> None:
        at = list(self._at.values())
        read, tokens = min(sum(b for b, _ in at), self._total), sum(t for _, t in at)
        left = seconds * (self._total - read) / max(read, 1)
        eta = f"took {seconds:.1f} s" if last else f"{left:.0f} s left" if read else "starting"
        line = (
            f"{read / 1e6:,.1f} of {self._total / 1e6:,.1f} MB · {tokens:,} tokens · "
            f"{read / 1e6 / max(seconds, 1e-3):.1f} MB/s · {tokens / max(seconds, 1e-3):,.0f} tokens/s · {eta}"
        )
        terminal = sys.stdout.isatty()
        print(f"\r{line:<110}" if terminal else line, end="" if terminal and not last else "\n", flush=True)


def _start(options: Options) -> subprocess.Popen[str]:
    """One core each: what `tokenizers` would do with threads of its own, more processes do better."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diloco.corpus.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )
    print(json.dumps(asdict(options)), file=process.stdin, flush=True)
    return process
