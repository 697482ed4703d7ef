"""What a run under fire leaves on disk, read as it appears and handed to the checker; and the moments that faults wait for.

Nothing in the product tells of these moments: they are seen in its store, and in the packets of the WAN lab.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from diloco.journal import entry_key
from launch.wan import HUB, Lab
from tests.chaos.checker import Checker

BULK = 6
"""Packets between two looks that say that more than signs of life is on its way."""
FETCHED = 25
"""Packets towards a region that starts, after which it is fetching."""


class Watch:
    """The journal and the regions' metrics."""

    def __init__(self, run: Path) -> None:
        self.run, self.store, self.checker = run, run / "store", Checker()
        self.entries: list[bytes] = []
        self.joined: dict[str, int] = {}
        """Region -> how many of its starts became members."""
        self.members: dict[str, str] = {}
        """Region -> its newest member."""
        self._read: dict[Path, int] = {}

    def look(self) -> list[dict[str, Any]]:
        """Reads what is new. Returns the new entries."""
        new = []
        while (path := self.store / entry_key(len(self.entries))).exists():
            data = path.read_bytes()
            self.entries.append(data)
            self.checker.entry(data)
            new.append(json.loads(data))
        for path in self.run.glob("*/metrics.jsonl"):
            self._reports(path)
        for seq in range(max(len(self.entries) - 8, 0), len(self.entries)):
            self._again(seq)
        return new

    def _reports(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path] = self._read.get(path, 0) + len(whole)
        region = path.parent.name
        for line in whole.splitlines():
            report = json.loads(line)
            if report["kind"] == "run":
                self.joined[region] = self.joined.get(region, 0) + 1
                self.members[region] = report["member"]
            self.checker.report(region, report)

    def _again(self, seq: int) -> None:
        self.checker.again(seq, (self.store / entry_key(seq)).read_bytes())

    def finish(self) -> None:
        """Everything once more, now that nobody writes any more."""
        self.look()
        for seq in range(len(self.entries)):
            self._again(seq)
        self.checker.finish()

    def attempts(self) -> set[Path]:
        """The folders of attempts whose results are being stored, or are."""
        state = self.checker.state
        with suppress(OSError):
            return set((self.store / "rounds" / state.run).iterdir()) if state else set()
        return set()


class Moments:
    """`probe` of a moment: a function that says whether it has come, counted from now."""

    def __init__(self, watch: Watch, lab: Lab, joining: Callable[[], list[str]]) -> None:
        """joining: the places whose region runs and is not a member yet."""
        self.watch, self.lab, self.joining = watch, lab, joining

    def probe(self, moment: str, place: str) -> Callable[[], bool]:
        makers = {"exchange": self._exchange, "held": self._held, "commit": self._commit, "fetch": self._fetch}
        return makers[moment](place) if moment in makers else lambda: True

    def _held(self, place: str) -> Callable[[], bool]:
        """A result is stored: all that is missing is that all say that they hold it, and the entry."""
        before = self.watch.attempts()
        return lambda: any(any(folder.iterdir()) for folder in self.watch.attempts() - before)

    def _commit(self, place: str) -> Callable[[], bool]:
        seq = len(self.watch.entries)
        return (self.watch.store / entry_key(seq)).exists

    def _exchange(self, place: str) -> Callable[[], bool]:
        before = [self._packets(place, out=True)]

        def begun() -> bool:
            now = self._packets(place, out=True)
            before.append(now)
            return now - before.pop(0) >= BULK

        return begun

    def _fetch(self, place: str) -> Callable[[], bool]:
        before: dict[str, int] = {}

        def fetches() -> bool:
            now = {joiner: self._packets(joiner, out=False) for joiner in self.joining()}
            return any(count - before.setdefault(joiner, count) >= FETCHED for joiner, count in now.items())

        return fetches

    def _packets(self, place: str, out: bool) -> int:
        """Between it and the other regions, one way."""
        links = self.lab.counters()
        pairs = [(place, other) if out else (other, place) for other in links if other not in (place, HUB)]
        return sum(links[a][b]["sent" if out else "delivered"] for a, b in pairs)
