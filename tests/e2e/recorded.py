"""`diloco.train` that also writes down, per round and rank, the local parameters it put in and the planes it got out.

RECORD names the directory; files are <region>/<seq>-<fragment>-r<rank>-<what>.npy, flat slices: local (the snapshot), before
and after (local parameters around the merge), theta and momentum (after it), residual (if there is one); and what
tests/e2e/sampled.py writes. SLOW makes every exchange take as many inner steps, unless the region waits for it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from torch import Tensor

from diloco import train, trainer
from diloco.control import Order
from diloco.fold import State
from elastic.coordinator import Commands
from elastic.order import Outcome
from tests.e2e.sampled import Sampled


class Recorded(Sampled):
    def train(self) -> Order:
        if self.links.coordinator is not None:
            self._slow_down(int(os.environ.get("SLOW", 0)))
        return super().train()

    def _slow_down(self, steps: int) -> None:
        """The coordinator hears of the end of an exchange later than it was."""
        coordinator = self.links.coordinator
        assert coordinator is not None
        hear, take, ended = coordinator.ranks.on_outcome, coordinator.take, list[tuple[int, int, Outcome]]()
        heard: tuple[list[int], float] = [], 0.0
        """What was merged when an end was last heard of, and when."""

        def slow_take(timeout: float = 0.0) -> Commands:
            nonlocal heard
            bases, now = list(self.planes.bases), time.monotonic()
            due = [end for end in ended if self.clock.steps >= end[0] + steps]
            # The region waits for the first of them only: the others stay in flight when that is merged.
            if ended and not due and timeout > 0 and (bases != heard[0] or now > heard[1] + 1):
                due = [end for end in ended if end[2].attempt == ended[0][2].attempt]
            for end in due:
                heard = bases, now
                ended.remove(end)
                hear(end[1], end[2])
            return take(min(timeout, 0.05))

        coordinator.ranks.on_outcome = lambda rank, outcome: ended.append((self.clock.steps, rank, outcome))
        coordinator.take = slow_take  # type: ignore[method-assign]

    def _record(self, seq: int, fragment: int, what: str, flat: Tensor) -> None:
        path = self._directory / f"{seq}-{fragment}-r{self.region.rank}-{what}.npy"
        np.save(path.with_suffix(".part.npy"), flat.numpy())
        path.with_suffix(".part.npy").rename(path)

    def merge(self, before: State, entry: dict[str, Any]) -> None:
        f, seq = entry["fragment"], entry["seq"]
        if self.planes.bases[f] >= seq:
            return super().merge(before, entry)  # it came with the planes of who sent them: nothing is merged
        if before.rounds == 0:
            for g in range(len(self.fragments)):
                self._record(0, g, "theta", self.planes.theta[g])
        if f in self.snapshots:
            self._record(seq, f, "local", self.snapshots[f].flat)
        self._record(seq, f, "before", self.shards.read(f))
        super().merge(before, entry)
        self._record(seq, f, "after", self.shards.read(f))
        self._record(seq, f, "theta", self.planes.theta[f])
        self._record(seq, f, "momentum", self.planes.momentum[f])
        if self.planes.residual is not None:
            self._record(seq, f, "residual", self.planes.residual[f])


if __name__ == "__main__":
    trainer.Trainer = Recorded  # type: ignore[misc]
    train.leave(train.main())
