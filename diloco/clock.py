"""A region's own counters: its inner steps, its boundaries, and what each fragment's next contribution holds. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stamp:
    """Where the clock stood when a fragment was snapshotted."""

    at: int
    """Inner steps of the region then."""
    gap: int
    """Inner steps since its last boundary, of those that count."""
    steps: int
    tokens: int
    """Since the fragment's last contribution that was used."""


class Clock:
    """Counts. interval: inner steps between two boundaries (H / fragments), the run's."""

    def __init__(self, fragments: int) -> None:
        self.steps = 0
        """Inner steps of this region in this run."""
        self.since = 0
        """Inner steps since the last boundary."""
        self.overdue = 0
        """Boundaries that are due at once: those of snapshots that a restart threw away."""
        self.work = [[0, 0] for _ in range(fragments)]
        """[steps, tokens] of each fragment since its last contribution that was used."""
        self.dropped = 0.0
        """Samples whose work `outer.merge=mix` threw away, since this member joined."""

    def step(self, tokens: int) -> None:
        self.steps, self.since = self.steps + 1, self.since + 1
        for work in self.work:
            work[0] += 1
            work[1] += tokens

    def snapshot(self, fragment: int, interval: int) -> Stamp:
        """A boundary: the fragment's work so far goes into a round."""
        if self.overdue:
            self.overdue, gap = self.overdue - 1, interval
        else:
            self.since, gap = 0, min(self.since, interval)
        return Stamp(self.steps, gap, *self.work[fragment])

    def used(self, fragment: int, stamp: Stamp) -> None:
        """A round holds the contribution: what came after it is what is left."""
        steps, tokens = self.work[fragment]
        self.work[fragment] = [steps - stamp.steps, tokens - stamp.tokens]

    def missed(self) -> None:
        """A round went by for which this region had no snapshot: steps count from there."""
        if self.overdue:
            self.overdue -= 1
        else:
            self.since = 0

    def start_over(self) -> None:
        """Everything since the last merges is gone."""
        self.since = self.overdue = 0
        self.work = [[0, 0] for _ in self.work]
        self.dropped = 0.0

    def own_rounds(self, in_flight: Iterable[Stamp], interval: int) -> float:
        """How many rounds this region is ahead of the committed ones: its progress neither jumps at a snapshot nor goes back
        when rounds are committed, in whatever order."""
        steps = min(self.since, interval) + sum(stamp.gap for stamp in in_flight)
        return self.overdue + steps / interval

    def save(self, in_flight: int, counted: int) -> dict[str, Any]:
        """For `load` after a restart, which loses the snapshots in flight: their boundaries are due at once then. counted:
        the dropped samples that the journal knows of."""
        return {**vars(self), "overdue": self.overdue + in_flight, "dropped": self.dropped - counted}

    def load(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
