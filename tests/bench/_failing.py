"""`diloco.train` that can be made to fail at a given moment: started by tests.bench.failover, with real steps of a tiny model
that are drawn out to PACE seconds. Nothing else in it differs from the product.

PACE: seconds a step. HOLD: a file; while it is there, an exchange stops where this member has sums to send, and says so by
HOLD.reached. SIGUSR1: the main loop hangs in its next step, and all other threads go on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from diloco import train, trainer
from diloco.averaging import Averaging
from diloco.config import Config
from diloco.inner import Inner, StepStats
from diloco.parallel import Region

PACE, HOLD = float(os.environ.get("PACE", 0)), os.environ.get("HOLD", "")
hung = threading.Event()


def drawn_out(inner: Inner) -> Callable[[Tensor, float], StepStats]:
    """Its step, followed by a sleep: as on a device, which leaves the host's cores alone."""
    real = inner.step

    def step(tokens: Tensor, progress: float) -> StepStats:
        if hung.is_set():
            threading.Event().wait()
        until = time.monotonic() + PACE
        stats = real(tokens, progress)
        time.sleep(max(0.0, until - time.monotonic()))
        return stats

    return step


def hold() -> None:
    """Stays here for good if HOLD is there."""
    if HOLD and Path(HOLD).exists():
        Path(f"{HOLD}.reached").touch()
        threading.Event().wait()


def hang_on_signal() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: hung.set())


class Failing(trainer.Trainer):
    def __init__(self, cfg: Config, region: Region) -> None:
        super().__init__(cfg, region)
        self.inner.step = drawn_out(self.inner)  # type: ignore[method-assign]


def held(self: Averaging, *arguments: Any) -> Tensor:
    hold()
    return reduce(self, *arguments)


if __name__ == "__main__":
    hang_on_signal()
    reduce = Averaging.reduce
    Averaging.reduce = held  # type: ignore[method-assign]
    trainer.Trainer = Failing  # type: ignore[misc]
    train.leave(train.main())
