"""`diloco.train` that also writes down which samples it trained on, and which of its steps each contribution holds.

RECORD names the directory; <region>/samples.jsonl has, in the order in which it happened, by whatever process of the region,
[inner step, sample ids] of every step, and {"round": [fragment, epoch, base], "member": …, "steps": [first, last]} of every
contribution. Lines of a later life of the region overrule those of the same steps before.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diloco import train, trainer
from diloco.control import Order
from diloco.reading import Reader


class Noted:
    """A reader of which somebody hears what is taken. A copy, which only looks ahead, is a plain one."""

    def __init__(self, reader: Reader, note: Callable[[list[int]], None]) -> None:
        self._reader, self._note = reader, note

    def take(self, count: int) -> list[int]:
        ids = self._reader.take(count)
        self._note(ids)
        return ids

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        return copy.deepcopy(self._reader, memo)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


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
        self._file = (self._directory / "samples.jsonl").open("a", buffering=1)

        def note(ids: list[int]) -> None:
            self._file.write(json.dumps([self.clock.steps + 1, ids]) + "\n")

        self.reader = Noted(self.reader, note)  # type: ignore[assignment]

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
