"""`python -m tests.bench.join [--millions M] [--repeat N]`: how long a joiner takes to fetch θ and momentum over the WAN lab, as
a multiple of its bytes over what the donors' uplinks carry, measured with raw TCP streams in the same run. Needs root.

The joiner has 1 Gbit/s down, each donor 100 Mbit/s up, a round trip takes 100 ms. "Held up" is how long the main loop of a
donor waited for the interpreter or for the lock of its planes; the same without a joiner is beside it, since other programs on
the machine show in both. CPU-seconds include those of the loop that looks. Ends with exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.wan import Lab, WanConfig
from tests.bench._table import Row, at_most, number, show
from tests.bench.exchange import MTU, RTT, Wan

DONORS = ("eu", "us", "asia")
UP, DOWN = 100e6, 1e9
LIMIT = 1.3


class Joining(Wan):
    """A joiner, region 0, and donors that all hold the same state."""

    def __init__(self, lab: Lab, elements: int, journal: Path) -> None:
        super().__init__(lab, ["joiner", *DONORS], "tests.bench._joining")
        self.nbytes, self.journal = 8 * elements, journal
        self.journal.touch()
        self.donors = list(range(1, 1 + len(DONORS)))
        for k in range(1 + len(DONORS)):
            self.tell(k, "hold", elements=elements, seed=7 if k else None)
        self.roots = [self.answer(k) for k in range(1 + len(DONORS))][1]["roots"]
        self.rate = {k: max(self.raw(k, 0) for _ in range(2)) for k in self.donors}

    def floor(self, donors: Sequence[int]) -> float:
        """Seconds."""
        return self.nbytes / sum(self.rate[k] for k in donors)

    def named(self, donors: Sequence[int]) -> list[list[str]]:
        return [[f"m{k}_{k}", self.endpoints[k]] for k in donors]

    def spent(self) -> dict[int, dict[str, float]]:
        for k in self.donors:
            self.tell(k, "spent")
        return {k: self.answer(k) for k in self.donors}

    def start(self, donors: Sequence[int]) -> None:
        self.tell(0, "fetch", donors=self.named(donors), journal=str(self.journal))

    def commit(self, seq: int) -> tuple[str, float]:
        """Journal first, then the donors merge. Returns the digest of θ then, and the seconds of the outer step."""
        entry = {
            "kind": "round",
            "seq": seq,
            "fragment": 0,
            "base": 1,
            "theta": self.roots[0],
            "momentum": self.roots[1],
        }
        self.journal.write_text(json.dumps(entry) + "\n")
        for k in self.donors:
            self.tell(k, "commit", seq=seq)
        answers = [self.answer(k) for k in self.donors]
        return answers[0]["digest"], max(answer["seconds"] for answer in answers)


def joins(w: Joining, repeat: int) -> Iterator[Row]:
    w.spent()
    time.sleep(10)
    idle = w.spent()
    for k in w.donors:
        yield Row(f"raw TCP stream from donor {k}", w.rate[k] * 8e-6, "Mbit/s")
    busy: list[dict[str, float]] = []
    for count in range(1, 1 + len(DONORS)):
        donors, ratios = w.donors[:count], []
        before = w.spent()
        for _ in range(repeat):
            w.start(donors)
            ratios.append(w.answer(0)["seconds"] / w.floor(donors))
        after = w.spent()
        print(f"# {count} donors: {[f'{r:.3f}' for r in ratios]}", file=sys.stderr, flush=True)
        cpu = sum(after[k]["cpu"] - before[k]["cpu"] for k in donors)
        busy += [after[k] for k in donors]
        name = f"{count} donor{'s' * (count > 1)}"
        yield Row(f"{name}: bytes ÷ summed uplinks", w.floor(donors), "s")
        yield at_most(f"{name}: fetched ÷ that", statistics.median(ratios), "x", LIMIT)
        yield Row(f"{name}: CPU that donors spent", cpu / (repeat * w.nbytes / 1e9), "s/GB")
    for what, seen in (("without a joiner", list(idle.values())), ("serving", busy)):
        for key in ("usual", "longest"):
            yield Row(f"a donor's loop held up, {what}: {key}", 1e3 * max(one[key] for one in seen), "ms")


def commit_half_way(w: Joining) -> Iterator[Row]:
    floor = w.floor(w.donors)
    w.start(w.donors)
    time.sleep(floor / 2)
    expected, step = w.commit(2)
    fetched = w.answer(0)
    assert fetched["bases"] == [1, 2], "the round was to come in the middle"
    w.tell(0, "replay", donors=w.named(w.donors), seq=2)
    replayed = w.answer(0)
    assert replayed["digest"] == expected, "the joiner has another θ than the donors"
    yield Row("a donor's outer step, three at a time on this machine", step, "s")
    name = "3 donors, a commit half-way"
    yield at_most(f"{name}: fetched ÷ (floor + that)", fetched["seconds"] / (floor + step), "x", LIMIT)
    yield Row("the same: replay, its bits fetched", replayed["seconds"], "s")
    yield at_most("the same: bytes ÷ state", sum(fetched["served"].values()) / w.nbytes, "x", LIMIT)


def donor_dies(w: Joining) -> Iterator[Row]:
    """The last one: there are fewer afterwards."""
    floor = w.floor(w.donors)
    w.start(w.donors)
    time.sleep(floor / 2)
    w.processes[w.donors[-1]].kill()
    fetched = w.answer(0)
    rest = w.nbytes / 2 / sum(w.rate[k] for k in w.donors[:-1]) + floor / 2
    yield at_most("3 donors, one killed half-way: fetched ÷ floor", fetched["seconds"] / rest, "x", LIMIT)
    yield at_most("the same: bytes ÷ state", sum(fetched["served"].values()) / w.nbytes, "x", LIMIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=25)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    config = WanConfig(up=UP, down=DOWN, rtt=RTT, mtu=MTU)
    rows = []
    with tempfile.TemporaryDirectory() as directory, Lab(config, ["joiner", *DONORS]) as lab:
        w = Joining(lab, given.millions * 10**6, Path(directory) / "journal")
        for figures in (joins(w, given.repeat), commit_half_way(w), donor_dies(w)):
            for row in figures:
                rows.append(row)
                print(f"# {row.case}: {number(row.value)} {row.unit}", file=sys.stderr, flush=True)
    return show("join", rows)


if __name__ == "__main__":
    sys.exit(main())
