"""How much memory processes take together, with what they share counted once: watched from outside while they work."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.e2e.cluster import children

TICK = 0.1
"""Seconds between two looks."""


def pss(pid: int) -> int:
    """Proportional set size in bytes: shared pages count in parts, which add up. 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def together(pid: int) -> int:
    """Of a process and all below it."""
    return sum(map(pss, [pid, *children(pid)]))


class Peak:
    """`with Peak(pid) as peak`: afterwards peak.bytes is the most that a process and all below it took at any look."""

    def __init__(self, pid: int) -> None:
        self.pid, self.bytes = pid, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, together(self.pid))
            if self._over.wait(TICK):
                return
