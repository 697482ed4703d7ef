"""How much of its time a region waits for the exchange: blocking rounds against streaming fragments with overlap.

python -m tests.bench.overlap [waiting] [slowdown]     both by default, about ten minutes on two cores; root

waiting: two regions run the real loop over the WAN lab, but for the compute of their inner steps, which is a timed sleep as
long as a GPU's step; it is chosen so that blocking rounds take the 17 % that INTELLECT-1 reports (arXiv 2412.01152).
slowdown: real inner steps on these cores while an exchange fills the link, the region's own and somebody else's.

The store is a directory of this machine and ckpt.durable=false; nothing is evaluated or saved but at the end.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from diloco.metrics import read_metrics
from diloco.train import leave
from launch.wan import HUB, Lab, WanConfig
from tests.bench._slowdown import slowdown
from tests.bench._table import Row, at_most, number, show

REGIONS = ("eu", "us")
WAN = {"up": 200e6, "down": 200e6, "rtt": 0.1, "mtu": 9000}
MODEL = "model.args={vocab: 256, dim: 512, layers: 8, heads: 8, kv_heads: 2, ffn: 1408, tied: true}"
"""22.7M parameters, most of them in blocks, so that fragments are even."""
SYNC_EVERY = 24
SHARE = 0.17
"""Of the time that blocking rounds wait: one less INTELLECT-1's compute utilization across the globe, 83 %."""
FIRST_PACE = 0.25
WARM, CYCLES = 2, 8
"""Rounds of every fragment that do not count yet, and that do."""
DEADLINE = 400.0
OVERRIDES = [
    MODEL,
    "inner.batch=1",
    "inner.seq_len=32",
    f"outer.sync_every={SYNC_EVERY}",
    "codec=int8",
    "run.eval_every=0",
    "run.eval_sequences=1",
    "run.report_every=1000000",
    "ckpt.every=1000000",
    "ckpt.durable=false",
    "elastic.start_regions=2",
]


@dataclass(frozen=True)
class Variant:
    fragments: int = 1
    overlap: int = 0
    cycles: int = CYCLES
    more: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        rounds = (WARM + self.cycles) * self.fragments
        return [
            f"outer.fragments={self.fragments}",
            f"outer.max_overlap_steps={self.overlap}",
            f"run.rounds={rounds}",
            *self.more,
        ]


@dataclass(frozen=True)
class Seen:
    """What a region saw from round WARM on: seconds per cycle (a round of every fragment), and the main thread's verbs as
    [how often, seconds per cycle, longest]."""

    cycle: float
    waited: float
    work: float
    """Of the main loop: neither steps nor waiting."""
    cpu: float
    main_cpu: float
    sent: float
    """Bytes."""
    exchange: float
    """Seconds of the median exchange, without what comes before and after it: answers, the journal."""
    verbs: dict[str, list[float]]


# ---- waiting ----


def waiting(directory: Path) -> Iterator[Row]:
    pace, blocking = FIRST_PACE, Variant()
    found = play(directory / "first", Variant(cycles=4), pace)
    pace = paced(found)
    found = play(directory / "blocking", blocking, pace)
    yield Row("one sleep as an inner step", 1e3 * pace, "ms")
    yield from told(f"blocking, H={SYNC_EVERY}", found)
    for fragments, overlap in ((4, 5), (8, 5)):
        variant = Variant(fragments, overlap)
        found = play(directory / f"streaming-{fragments}", variant, pace)
        yield from told(f"{fragments} fragments, overlap {overlap}", found, limit=1.0)


def paced(found: list[Seen]) -> float:
    """The step with which what these rounds waited would be SHARE of the time."""
    waited, work = mean(seen.waited for seen in found), mean(seen.work for seen in found)
    return max(0.01, (waited / SHARE - waited - work) / SYNC_EVERY)


def told(case: str, found: list[Seen], limit: float | None = None) -> Iterator[Row]:
    """Rows of a variant: of the region that is worse off."""
    share = max(100 * seen.waited / seen.cycle for seen in found)
    yield Row(f"{case}: waits", share, "%") if limit is None else at_most(f"{case}: waits", share, "%", limit)
    yield Row(f"{case}: waits per H steps", max(seen.waited for seen in found), "s")
    yield Row(f"{case}: an exchange, median", max(seen.exchange for seen in found), "s")
    worst = max(found, key=lambda seen: seen.work / seen.cycle)
    yield Row(f"{case}: main loop's own work", 100 * worst.work / worst.cycle, "%")
    yield Row(f"{case}: main loop's own work per H steps", worst.work, "s")
    for verb, (count, seconds, longest) in sorted(worst.verbs.items()):
        yield Row(
            f"{case}: in {verb}, {count:.0f} times, longest {1e3 * longest:.0f} ms", 100 * seconds / worst.cycle, "%"
        )
    yield Row(f"{case}: CPU per GB sent, and as much received", max(1e9 * s.cpu / s.sent for s in found), "s/GB")
    yield Row(f"{case}: the main thread's share of it", max(1e9 * s.main_cpu / s.sent for s in found), "s/GB")


def play(directory: Path, variant: Variant, pace: float, wan: dict[str, float] = WAN) -> list[Seen]:
    """Runs the regions to their end."""
    directory.mkdir()
    os.environ.setdefault("DILOCO_SECRET", secrets.token_hex(16))  # the lab's addresses are not loopback
    print(f"{directory.name}: {variant.overrides}, {1e3 * pace:.0f} ms a step …", flush=True)
    with Lab(WanConfig(**wan), REGIONS) as lab, lighthouse(lab) as address:
        processes = {name: start(lab, name, address, directory, variant, pace) for name in REGIONS}
        codes = {name: process.wait(DEADLINE) for name, process in processes.items()}
    if any(codes.values()):
        logs = "\n".join((directory / f"{name}.log").read_text()[-3000:] for name in REGIONS)
        raise RuntimeError(f"regions ended with {codes}:\n{logs}")
    return [look(directory, name, variant, pace) for name in REGIONS]


@contextmanager
def lighthouse(lab: Lab) -> Iterator[str]:
    command = [sys.executable, "-u", "-m", "elastic.lighthouse", "--bind", f"{lab.hub}:0"]
    process = lab.popen(HUB, command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield next(line for line in process.stdout if line.startswith("lighthouse http")).split()[1]


def start(lab: Lab, name: str, address: str, directory: Path, variant: Variant, pace: float) -> subprocess.Popen[Any]:
    arguments = [
        f"region.name={name}",
        f"run.dir={directory}",
        f"elastic.lighthouse={address}",
        f"elastic.host={lab.address(name)}",
        *OVERRIDES,
        *variant.overrides,
    ]
    warm = WARM * variant.fragments
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PACE": str(pace), "PACED": str(directory), "WARM": str(warm)}
    with (directory / f"{name}.log").open("w") as log:
        command = [sys.executable, "-u", "-m", "tests.bench._paced", *arguments]
        return lab.popen(name, command, env=env, stdout=log, stderr=subprocess.STDOUT)


def look(directory: Path, name: str, variant: Variant, pace: float) -> Seen:
    records = list(read_metrics(directory / name / "metrics.jsonl", "round"))[WARM * variant.fragments - 1 :]
    spans = [(after["time"] - before["time"], after) for before, after in itertools.pairwise(records)]
    n = len(spans) / variant.fragments
    found = json.loads((directory / f"{name}.json").read_text())
    return Seen(
        cycle=sum(seconds for seconds, _ in spans) / n,
        waited=sum(seconds * record["waiting"] for seconds, record in spans) / n,
        work=(found["wall"] - found["waited"] - found["steps"] * pace) / n,
        cpu=found["cpu"] / n,
        main_cpu=found["main_cpu"] / n,
        sent=sum(record["bytes_up"] for _, record in spans) / n,
        exchange=median(record["exchange_seconds"] for _, record in spans),
        verbs={verb: [count, seconds / n, longest] for verb, (count, seconds, longest) in found["verbs"].items()},
    )


def main(wanted: list[str]) -> int:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        figures = {"waiting": lambda: waiting(Path(directory)), "slowdown": lambda: slowdown(WAN)}
        for name in wanted:
            for row in figures[name]():
                print(f"  {row.case}: {number(row.value)} {row.unit}", flush=True)
                rows.append(row)
    return show("overlap", rows)


if __name__ == "__main__":
    leave(main(sys.argv[1:] or ["waiting", "slowdown"]))
