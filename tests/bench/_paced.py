"""`diloco.train` whose inner steps are timed sleeps, as long as a GPU's would be: started by tests.bench.overlap.

PACE: seconds a step; PACED: directory for <region>.json; WARM: rounds before the clocks start. All else in the loop is real.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diloco import train, trainer
from diloco.config import Config
from diloco.fold import State
from diloco.inner import StepStats, lr_at
from diloco.parallel import Region
from tests.bench._worker import cpu_seconds

PACE, WARM = float(os.environ.get("PACE", 0)), int(os.environ.get("WARM", 0))
CHANGE = 1e-4
"""What a step adds to the norms' parameters, so that there is something to exchange."""


class Paced(trainer.Trainer):
    """Also notes how long each verb takes, from the WARM-th round on."""

    def __init__(self, cfg: Config, region: Region) -> None:
        super().__init__(cfg, region)
        self.inner.step = self.pretend  # type: ignore[method-assign]
        self.norms = [p for p in self.inner.params if p.ndim == 1]
        self.sign = 1 if cfg.region.name < "m" else -2
        self.verbs: dict[str, list[float]] = {}
        self.from_here()

    def from_here(self) -> None:
        self.verbs.clear()
        control = getattr(getattr(self, "links", None), "control", None)
        waited = control.waited if control else 0.0
        self.begun = (time.monotonic(), self.clock.steps, waited, cpu_seconds(), time.thread_time())

    def pretend(self, tokens: Tensor, progress: float) -> StepStats:
        """Not a step, but as long as one; a GPU's host thread sleeps, too, without Python's lock."""
        until = time.monotonic() + PACE
        with torch.no_grad():
            for parameter in self.norms:
                parameter.add_(CHANGE * self.sign)
        time.sleep(max(0.0, until - time.monotonic()))
        return StepStats(torch.tensor(1.0), 1.0, lr_at(self.inner.cfg, progress), True)

    @contextmanager
    def timed(self, verb: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.verbs.setdefault(verb, []).append(time.monotonic() - begin)

    def inner_step(self) -> None:
        with self.timed("inner step"):
            super().inner_step()

    def contribute(self, *arguments: Any) -> None:
        with self.timed("contribute"):
            super().contribute(*arguments)

    def digest(self, *arguments: Any) -> str:
        with self.timed("digests, of both"):
            return super().digest(*arguments)

    def settle(self, *arguments: Any) -> None:
        with self.timed("merge: residual"):
            super().settle(*arguments)

    def outer_step(self, *arguments: Any) -> Tensor:
        with self.timed("merge: outer step"):
            return super().outer_step(*arguments)

    def merge(self, before: State, entry: dict[str, Any]) -> None:
        if self.state.rounds == WARM:
            self.from_here()
        if self.state.finished is not None:
            self.tell()
        with self.timed("merge"):
            super().merge(before, entry)

    def tell(self) -> None:
        """When the last round is committed, before its evaluation and checkpoint."""
        begun, steps, waited, cpu, main = self.begun
        control = self.links.control
        assert control is not None
        found = {
            "wall": time.monotonic() - begun,
            "steps": self.clock.steps - steps,
            "waited": control.waited - waited,
            "cpu": cpu_seconds() - cpu,
            "main_cpu": time.thread_time() - main,
            "verbs": {verb: [len(times), sum(times), max(times)] for verb, times in self.verbs.items()},
        }
        (Path(os.environ["PACED"]) / f"{self.cfg.region.name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    trainer.Trainer = Paced  # type: ignore[misc]
    train.leave(train.main())
