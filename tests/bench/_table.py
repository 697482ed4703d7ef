"""What every benchmark prints: a table for people and, last, one line of JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One figure. target: None for what is only told; else ">= 95" or "<= 4.8", in the row's unit."""

    case: str
    value: float
    unit: str
    target: str | None = None
    ok: bool = True


def at_least(case: str, value: float, unit: str, target: float) -> Row:
    return Row(case, value, unit, f">= {number(target)}", value >= target)


def at_most(case: str, value: float, unit: str, target: float) -> Row:
    return Row(case, value, unit, f"<= {number(target)}", value <= target)


def number(value: float) -> str:
    """Four significant digits, large numbers whole."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> str:
    """What the figures were seen on."""
    system = f"{platform.system()} {platform.machine()}"
    return f"{cpu()}, {os.cpu_count()} cores, {system}, Python {platform.python_version()}, torch {torch.__version__}"


def cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def _cpu_time() -> tuple[int, int]:
    """(what the host gave to others, all) of this machine's CPU time, in ticks."""
    with suppress(OSError), open("/proc/stat") as file:
        ticks = [int(text) for text in file.readline().split()[1:9]]
        return ticks[7], sum(ticks)
    return 0, 0


_BEGAN = _cpu_time()


def stolen() -> float:
    """Percent of the cores' time since the benchmark began: a figure that misses its target by less says little."""
    before, now = _BEGAN, _cpu_time()
    return 100 * (now[0] - before[0]) / max(1, now[1] - before[1])


def show(bench: str, rows: Sequence[Row]) -> int:
    """The table, then the line of JSON, which is the last thing a benchmark prints. Returns its exit code: 1 if a target is
    missed."""
    width = max(len(row.case) for row in rows)
    print(f"\n{bench} · {machine()}; the host took {stolen():.1f} % of the cores' time")
    for row in rows:
        verdict = "" if row.target is None else f"target {row.target}  {'ok' if row.ok else 'MISSED'}"
        print(f"  {row.case:<{width}}  {number(row.value):>10} {row.unit:<9} {verdict}".rstrip())
    line = {"bench": bench, "machine": machine(), "stolen": stolen(), "rows": [asdict(row) for row in rows]}
    print(json.dumps(line, ensure_ascii=False), flush=True)
    return int(not all(row.ok for row in rows))
