"""What every benchmark prints: a table for people and, last, one line of JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
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


def show(bench: str, rows: Sequence[Row]) -> None:
    """The table, then the line of JSON, which is the last thing a benchmark prints."""
    width = max(len(row.case) for row in rows)
    print(f"\n{bench} · {machine()}")
    for row in rows:
        verdict = "" if row.target is None else f"target {row.target}  {'ok' if row.ok else 'MISSED'}"
        print(f"  {row.case:<{width}}  {number(row.value):>10} {row.unit:<9} {verdict}".rstrip())
    line = {"bench": bench, "machine": machine(), "rows": [asdict(row) for row in rows]}
    print(json.dumps(line, ensure_ascii=False), flush=True)
