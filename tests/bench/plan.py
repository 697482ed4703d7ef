"""Whether the planner predicts what the WAN lab shows: compute utilization of six ways to exchange, predicted and measured.

python -m tests.bench.plan [NAME ...]     about six minutes on two cores; root

Two regions as in tests.bench.overlap: the real loop, but for inner steps that are timed sleeps. The planner is told the lines'
rates, the round trip and the length of a step. Measured: the share of the time that steps take; the rest is waiting and the
main loop's own work (snapshots, merges, digests), which the planner does not count: on a machine that does other things as well,
predictions come out high.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from diloco.composing import compose_config
from diloco.train import leave
from launch.plan import build_work
from launch.planning import Site, Way, traffic
from launch.simulating import Schedule, simulate
from tests.bench._table import Row, number, show
from tests.bench.overlap import OVERRIDES, REGIONS, SYNC_EVERY, WAN, Variant, play

LINES = {**WAN, "up": 50e6, "down": 50e6}
MODEL = "model.args={vocab: 256, dim: 256, layers: 8, heads: 8, kv_heads: 2, ffn: 704, tied: true}"
"""5.7M parameters over a quarter of that bench's rate: exchanges as long, for a quarter of the CPU time."""
PACE = 0.25
"""Seconds of a step."""
POINTS = 5.0
"""How far a prediction may be off."""
CYCLES = 3
SETTINGS = {
    # name: (fragments, overlap, codec)
    "blocking-int8": (1, 0, "int8"),
    "blocking-none": (1, 0, "none"),
    "blocking-int4": (1, 0, "int4"),
    "streaming-int8": (4, 0, "int8"),
    "overlap-none": (4, 2, "none"),
    "overlap-int8": (1, 2, "int8"),
}


def predicted(fragments: int, overlap: int, codec: str) -> float:
    """Compute utilization, 0 to 1."""
    work = build_work(compose_config(["region.name=eu", *OVERRIDES, MODEL]))
    rate = LINES["up"] / 8
    sites = [Site(name, 1, 1.0, 1.0, 1.0, rate, LINES["down"] / 8, 1) for name in REGIONS]
    schedule = Schedule(SYNC_EVERY, fragments, overlap)
    sizes = Way(schedule, codec).encoded(work)
    seconds = [traffic(sites, size, codec, LINES["rtt"], durable=False).seconds for size in sizes]
    return min(simulate(schedule, [PACE] * len(REGIONS), seconds).utilization)


def measured(directory: Path, fragments: int, overlap: int, codec: str) -> float:
    seen = play(directory, Variant(fragments, overlap, CYCLES, (MODEL, f"codec={codec}")), PACE, LINES)
    return mean(1 - (region.waited + region.work) / region.cycle for region in seen)


def rows(name: str, directory: Path) -> Iterator[Row]:
    ours, real = 100 * predicted(*SETTINGS[name]), 100 * measured(directory / name, *SETTINGS[name])
    yield Row(f"{name}: predicted", ours, "%")
    yield Row(f"{name}: measured", real, "%")
    off = ours - real
    yield Row(f"{name}: predicted - measured", off, "points", f"within {POINTS:g}", abs(off) <= POINTS)


def main(wanted: list[str]) -> int:
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in wanted or SETTINGS:
            for row in rows(name, Path(directory)):
                print(f"  {row.case}: {number(row.value)} {row.unit}", flush=True)
                found.append(row)
    return show("plan", found)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
