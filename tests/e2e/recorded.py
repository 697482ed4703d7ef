"""`diloco.train` that also writes down, per round and rank, the local parameters it put in and the planes it got out.

RECORD names the directory; files are <region>/<seq>-<fragment>-r<rank>-{local,theta,momentum}.npy, flat slices.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diloco import train, trainer
from diloco.fold import State


class Recorded(trainer.Trainer):
    def _record(self, seq: int, fragment: int, what: str, flat: Tensor) -> None:
        directory = Path(os.environ["RECORD"]) / self.cfg.region.name
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / f"{seq}-{fragment}-r{self.region.rank}-{what}.npy", flat.numpy())

    def merge(self, before: State, entry: dict[str, Any]) -> None:
        f, seq = entry["fragment"], entry["seq"]
        if before.rounds == 0:
            for g in range(len(self.fragments)):
                self._record(0, g, "theta", self.planes.theta[g])
        if self.snapshot is not None:
            self._record(seq, f, "local", self.snapshot.flat)
        super().merge(before, entry)
        self._record(seq, f, "theta", self.planes.theta[f])
        self._record(seq, f, "momentum", self.planes.momentum[f])


if __name__ == "__main__":
    trainer.Trainer = Recorded  # type: ignore[misc]
    train.leave(train.main())
