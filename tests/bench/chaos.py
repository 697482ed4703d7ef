"""`python -m tests.bench.chaos [--minutes 30] [--seed 0] [--regions 4] [--gap 13] [--directory DIR]`: a run under fire.

Regions in a WAN lab (root) train while a schedule drawn from the seed kills (regions, ranks, uploaders, the lighthouse), freezes,
partitions, cuts and slows them, or lets them leave and come back, at random moments and at named ones: while blocks are
exchanged, between a result and its entry, just after an entry, while a joiner fetches. Whatever ends is started again by what
stands for a service manager. After every journal entry all of this is checked (tests/chaos/checker.py): digests of all members,
samples and inner steps, each once and none lost, and that rounds go on, with every region that nothing is done to.
Ends with exit code 1 if anything was violated, or a target is missed: as many faults as are asked for, and a round for each.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.wan import Lab, load_wan
from tests.bench._table import Row, at_least, at_most, show
from tests.chaos.drill import Drill, dismiss, gather, write_log
from tests.chaos.fleet import Fleet
from tests.chaos.schedule import Fault, schedule
from tests.e2e.cluster import SMALL

LINKS = [("rtt", "40ms"), ("up", "16mbit"), ("down", "16mbit")]
SETTINGS = [
    *SMALL,
    "outer.sync_every=24",
    "outer.fragments=2",
    "outer.max_overlap_steps=8",
    "run.rounds=1000000",
    "run.report_every=48",
    "run.eval_every=50",
    "ckpt.every=5",
    "elastic.lease_rounds=100",
    "elastic.stall_timeout=8",
]
RESTARTS_A_MINUTE = 1.0
RESTARTS = 30
FAULTS, IN_MINUTES = 100, 30.0
"""At least so many in that time, and as many of a shorter or longer one."""
START_SECONDS = 300.0
"""Until the first round of all: starting takes each region some seconds of a core."""


def faults_of(minutes: float, seed: int, regions: int, gap: float) -> list[Fault]:
    restarts = min(RESTARTS, max(6, round(RESTARTS_A_MINUTE * minutes)))
    return schedule(seed, 60.0 * minutes, places_of(regions), gap, restarts)


def places_of(regions: int) -> list[str]:
    return [chr(ord("a") + i) for i in range(regions)]


def chaos(
    directory: Path, minutes: float, faults: list[Fault], regions: int, ranks: int = 2, module: str = "diloco.train"
) -> Drill:
    """The whole of it. ranks: of the second region; the others have one. module: what a region runs."""
    places = places_of(regions)
    say = write_log(directory / "chaos.log", time.monotonic())
    with Lab(load_wan("lan", LINKS, places), places, directory) as lab:
        overrides = [*SETTINGS, f"elastic.start_regions={regions}"]
        fleet = Fleet(lab, directory, places, [ranks if i == 1 else 1 for i in range(regions)], overrides, module)
        drill = Drill(lab, fleet, say)
        gather(drill, "at the start", START_SECONDS)
        say(f"all {regions} regions have contributed; {len(faults)} faults follow")
        if not drill.violations:
            drill.run(faults, 60.0 * minutes)
            gather(drill, "at the end")
        dismiss(drill)
    return drill


def rows(drill: Drill, minutes: float) -> list[Row]:
    tally, checker = drill.tally, drill.watch.checker
    rounds = len(checker.rounds)
    found = [Row(f"faults: {kind}", count, "") for kind, count in sorted(tally.faults.items())]
    found += [Row(f"at the moment: {moment}", count, "") for moment, count in sorted(tally.moments.items())]
    return [
        *found,
        Row("faults whose moment did not come, or who met nobody", tally.missed + tally.idle, ""),
        at_least("faults", tally.all, "", FAULTS * minutes / IN_MINUTES),
        at_most("of them restarts", tally.restarts, "", RESTARTS),
        at_least("rounds a fault", rounds / max(tally.all, 1), "", 1.0),
        Row("digests compared", checker.compared, ""),
        Row("contributions whose inner steps were compared", checker.steps_checked, ""),
        Row("longest time without a round", drill.rounds.longest, "s"),
        Row("longest time until a region contributes again", max(d.longest for d in drill.places.values()), "s"),
        at_most("violations", len(drill.violations), "", 0),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--regions", type=int, default=4)
    parser.add_argument("--gap", type=float, default=13.0, help="mean seconds between two faults")
    parser.add_argument(
        "--directory", type=Path, help="where everything is left; default: a new one, removed if all is well"
    )
    arguments = parser.parse_args(argv)
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="chaos-"))
    faults = faults_of(arguments.minutes, arguments.seed, arguments.regions, arguments.gap)
    drill = chaos(directory, arguments.minutes, faults, arguments.regions)
    found = rows(drill, arguments.minutes)
    for text in drill.violations:
        print(f"violation: {text}")
    code = show(f"chaos --seed {arguments.seed}", found)
    if not code and arguments.directory is None:
        shutil.rmtree(directory)
    else:
        print(f"everything is left in {directory}")
    return code


if __name__ == "__main__":
    sys.exit(main())
