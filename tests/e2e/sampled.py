"""`diloco.train` that also writes down which samples it trained on, and which of its steps each contribution holds.

RECORD names the directory; <region>/samples.jsonl has, in the order in which it happened, by whatever process of the region,
[inner step, sample ids] of every step, and {"round": [fragment, epoch, base], "member": …, "steps": [first, last]} of every
contribution. Lines of a later life of the region overrule those of the same steps before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diloco import train, trainer
from diloco.control import Order


class Sampled(trainer.Trainer):
    def train(self) -> Order:
        if self.links.coordinator is not None:
            self._record_samples()
        return super().train()

    @property
    def _directory(self) -> Path:
        directory = Path(os.environ["RECORD"]) / self.cfg.region.name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _record_samples(self) -> None:
        take, self._file = self.reader.take, (self._directory / "samples.jsonl").open("a", buffering=1)

        def recorded_take(count: int) -> list[int]:
            ids = take(count)
            self._file.write(json.dumps([self.clock.steps + 1, ids]) + "\n")
            return ids

        self.reader.take = recorded_take  # type: ignore[method-assign]

    def contribute(self, fragment: int, epoch: int, base: int) -> None:
        steps = self.clock.work[fragment][0]
        if self.links.coordinator is not None and self.in_step and not self.behind:
            line = {"round": [fragment, epoch, base], "member": self.links.member}
            self._file.write(json.dumps({**line, "steps": [self.clock.steps - steps + 1, self.clock.steps]}) + "\n")
        super().contribute(fragment, epoch, base)


def lines(record: Path, region: str) -> Iterator[Any]:
    """Of a region; what a kill cut off is left out."""
    path = record / region / "samples.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def contributions(record: Path, region: str) -> dict[tuple[str, int, int, int], list[int]]:
    """(member, fragment, epoch, base) -> the ids of the samples that its contribution was made of."""
    trained: dict[int, list[int]] = {}
    found = {}
    for line in lines(record, region):
        if isinstance(line, list):
            trained[line[0]] = line[1]
        else:
            first, last = line["steps"]
            ids = [i for step in range(first, last + 1) for i in trained[step]]
            found[line["member"], *line["round"]] = ids
    return found


if __name__ == "__main__":
    trainer.Trainer = Sampled  # type: ignore[misc]
    train.leave(train.main())
