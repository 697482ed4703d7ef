"""What a fault costs the regions that survive it: ours, blocking and overlapped, against stock torchft 0.2.0.

python -m tests.bench.failover [FAULT ...]     all by default, about a quarter of an hour; FAULT: a part of a fault's name
Ends with exit code 1 if a target is missed.

Three regions on loopback train the same tiny model with the same drawn-out steps; every silence that is to be noticed is one of
5 s in both systems. Faults between syncs come shortly before a boundary, where they cost most. A pause is the longest
between two inner steps, less a step; in blocking rounds an exchange is part of it, so its limit is detection plus a
usual round's pause in the same run.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diloco.train import leave
from tests.bench._faults import (
    BLOCKING,
    FAULTS,
    OVERLAPPED,
    PACE,
    SURVIVORS,
    SYNC_EVERY,
    TORCHFT,
    Cost,
    Fault,
    System,
    play,
)
from tests.bench._table import Row, at_most, number, show

SYSTEMS = (BLOCKING, OVERLAPPED, TORCHFT)
OVERLAPPED_PAUSE = 0.1

Costs = dict[str, dict[str, Cost]]
"""fault -> system -> cost."""


def rows(fault: Fault, costs: dict[str, Cost]) -> Iterator[Row]:
    for name, cost in costs.items():
        case = f"{fault.name}: {name}"
        if name == TORCHFT.name:
            yield Row(f"{case}, steps lost", cost.lost, "steps")
            yield Row(f"{case}, stood still", cost.still, "s")
            yield Row(f"{case}, survivors that crashed", cost.crashed, "")
            yield Row(f"{case}, digests equal", cost.equal, "")
            continue
        yield at_most(f"{case}, steps lost", cost.lost, "steps", 0)
        limit = OVERLAPPED_PAUSE if name == OVERLAPPED.name else fault.detection + cost.usual
        yield at_most(f"{case}, stood still", cost.still, "s", limit)
        if cost.detected is not None:
            yield at_most(f"{case}, noticed after", cost.detected, "s", fault.detection)
        yield Row(f"{case}, digests equal", cost.equal, "", ">= 1", cost.equal)


def columns(all_costs: Costs) -> str:
    """The table for people: a line per fault, three columns per system."""
    lines = [["", *(f"{s.name}: lost" for s in SYSTEMS), *(f"{s.name}: still" for s in SYSTEMS)]]
    lines[0] += [*(f"{s.name}: equal" for s in SYSTEMS), "noticed after", "usual pause"]
    for fault, costs in all_costs.items():
        found = [costs[s.name] for s in SYSTEMS]
        still = [f"{number(c.still)} s" if not c.crashed else f"{c.crashed} crashed" for c in found]
        noticed = [number(c.detected) for c in found[:2] if c.detected is not None]
        tail = [f"{' / '.join(noticed) or '–'} s", f"{number(found[0].usual)} s"]
        lines.append(
            [fault, *(str(c.lost) for c in found), *still, *("yes" if c.equal else "no" for c in found), *tail]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def told(system: System, cost: Cost) -> str:
    return (
        f"  {system.name}: {cost.lost} steps lost, stood still {number(cost.still)} s, usually {number(cost.usual)} s, "
        f"noticed after {'–' if cost.detected is None else number(cost.detected)} s, digests "
        f"{'equal' if cost.equal else 'NOT equal'}, {cost.crashed} of {len(SURVIVORS)} crashed"
    )


def main(wanted: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left behind
    all_costs: Costs = {}
    found: list[Row] = [Row("an inner step", 1e3 * PACE, "ms"), Row("H", SYNC_EVERY, "steps")]
    with tempfile.TemporaryDirectory() as directory:
        for fault in FAULTS:
            if wanted and not any(part in fault.name for part in wanted):
                continue
            print(f"{fault.name} …", flush=True)
            costs = all_costs.setdefault(fault.name, {})
            for system in SYSTEMS:
                place = Path(directory) / f"{len(all_costs)}-{system.name}"
                costs[system.name] = play(system, fault, place)
                print(told(system, costs[system.name]), flush=True)
            found += rows(fault, costs)
    print(f"\n{columns(all_costs)}")
    return show("failover", found)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
