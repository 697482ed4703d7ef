"""Processes of a launcher: their lines on one queue, a polite end with a deadline, and nothing left behind.
Linux."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

Lines = queue.Queue[tuple[str, str]]
_MARK = "DILOCO_LAUNCHED_AS"


class Job:
    """A started command, with all processes that come of it: they inherit a mark in their environment, by
    which they are found even where they made sessions of their own, as torchrun's workers do, or lost their
    parent. Jobs of a job have the marks of both."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], lines: Lines, relays: bool = False
    ) -> None:
        """Puts (name, line) on `lines` for every line that it says. Call it from the main thread: the process
        ends with the thread that started it (launch/child.py). relays: it is a launcher, which stops its jobs itself."""
        self.name = name
        self.mark = uuid.uuid4().hex
        self._relays = relays
        self._asked: set[int] = set()
        self.process = subprocess.Popen(
            command,
            env={**env, _MARK: f"{env.get(_MARK, '')}:{self.mark}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C reaches the launcher only, which passes it on once
        )
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()

    def _read(self, lines: Lines) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.put((self.name, line.rstrip("\r\n")))

    @property
    def code(self) -> int | None:
        """None while it runs, else its exit code, 128 + n if signal n ended it. SIGTERM that was asked for is
        0."""
        code = self.process.poll()
        if code is None:
            return None
        code = code if code >= 0 else 128 - code
        return 0 if self._asked and code == 128 + signal.SIGTERM else code

    def ask_to_stop(self) -> None:
        """SIGTERM, once each, to its direct children, or to itself if it has none (yet) or relays it. torchrun's own
        handling of SIGTERM would kill workers after 30 s and lose their exit codes; told directly, they end
        as they choose, and torchrun with them. Call it again and again: children may come late."""
        children = [pid for pid, parent in self.processes() if parent == self.process.pid and not self._relays]
        for pid in children or ([] if self._asked else [self.process.pid]):
            if pid not in self._asked:
                self._asked.add(pid)
                _signal(pid, signal.SIGTERM)

    def processes(self) -> Iterator[tuple[int, int]]:
        """(pid, parent's pid) of every living process of this job."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    marked = self.mark.encode() in (entry / "environ").read_bytes()
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if marked else 0
                except OSError:  # ended meanwhile, or somebody else's
                    continue
                if marked:
                    yield int(entry.name), parent

    def kill(self) -> None:
        """SIGKILL to whatever is left of it; returns when all of it is gone and its last line is on the
        queue."""
        while left := [pid for pid, _ in self.processes()]:
            for pid in left:
                _signal(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()
        self._reader.join(timeout=5)  # a process that threw its environment away may still hold the pipe


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was quicker
        os.kill(pid, number)


class Stop:
    """How often somebody asked for an end, by Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self) -> None:
        self.times = 0

    @contextmanager
    def on_signals(self) -> Iterator[Stop]:
        """Within it, those signals count here and do nothing else. Main thread only."""

        def count(*_: object) -> None:
            self.times += 1

        before = {n: signal.signal(n, count) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def child_command(module: str, *arguments: str, netns: str | None = None) -> list[str]:
    """The command for a Python module, or `torchrun`, that ends with this process; netns: the file of its network
    namespace."""
    place = [] if netns is None else ["--netns", netns]
    return [sys.executable, "-u", "-m", "launch.child", str(os.getpid()), *place, module, *arguments]


def supervise(
    jobs: Iterable[Job],
    lines: Lines,
    stop: Stop,
    on_line: Callable[[str, str], None],
    on_end: Callable[[Job], bool],
    stop_seconds: float,
    servants: Sequence[Job] = (),
    at_once: int | None = None,
) -> None:
    """Hands on lines until all jobs have ended, and calls `on_end` once for each that did. When that returns
    True, or when somebody asks for a stop, every job is asked to stop; after `stop_seconds`, or when somebody
    asks a second time, what is left is killed. Nobody waits for `servants`, but on_end hears of their end, too.
    at_once: so many of `jobs` are taken at a time, which may start each as it is taken; none after a stop."""
    running = list(jobs) if at_once is None else []  # whatever was asked before: these are there and have to end
    todo, serving, deadline = iter(jobs), list(servants), None
    while True:
        if at_once is not None and deadline is None and not stop.times:
            running += islice(todo, at_once - len(running))
        if not running:
            return
        forward(lines, on_line, wait=0.1)
        for job in [job for job in [*running, *serving] if job.code is not None]:
            (running if job in running else serving).remove(job)
            job.kill()  # what it left behind
            forward(lines, on_line)
            if on_end(job) and deadline is None:
                deadline = time.monotonic() + stop_seconds
        if stop.times and deadline is None:
            deadline = time.monotonic() + stop_seconds
        if deadline is not None:
            _end(running, stop.times > 1 or time.monotonic() > deadline, on_line)


def _end(jobs: Sequence[Job], now: bool, on_line: Callable[[str, str], None]) -> None:
    for job in jobs:
        if now:
            on_line(job.name, "has not stopped in time: killed")
            job.kill()
        else:
            job.ask_to_stop()


def forward(lines: Lines, on_line: Callable[[str, str], None], wait: float = 0.0) -> None:
    """Hands on every line that is there, after waiting for the first for up to `wait` seconds."""
    try:
        on_line(*lines.get(timeout=wait) if wait else lines.get_nowait())
        while True:
            on_line(*lines.get_nowait())
    except queue.Empty:
        return
