"""What a sweep came to, from the records of its jobs and the metrics of their runs: a table, a CSV and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diloco.metrics import HELD_OUT, count, read_metrics, size

RECORD = "job.json"


@dataclass(frozen=True)
class Point:
    """The held-out loss after a round, a mean over the regions that reported it."""

    round: int
    tokens: int
    """Committed until then, of all regions."""
    sent: int
    """Bytes until then, by all regions."""
    loss: float
    """Nats per token; inf if it was not finite."""
    bits_per_byte: float


@dataclass(frozen=True)
class Outcome:
    """A job of a sweep."""

    num: int
    dir: Path
    state: str
    """started, done or failed."""
    why: str
    values: Mapping[str, Any]
    course: tuple[Point, ...]

    @property
    def loss(self) -> float:
        """Final, nats per token; inf unless it is done."""
        return self.course[-1].loss if self.state == "done" and self.course else math.inf


def read_sweep(directory: Path) -> list[Outcome]:
    """Best first, then those that are not done."""
    found = []
    for path in directory.glob(f"*/{RECORD}"):
        told = json.loads(path.read_text())
        course = read_course(path.parent)
        found.append(Outcome(told["num"], path.parent, told["state"], told["why"], told["values"], course))
    return sorted(found, key=lambda job: (job.state != "done", job.loss, job.num, job.dir))


def read_course(run_dir: Path) -> tuple[Point, ...]:
    """In the order of rounds. A round that was done again, after a rewind or a restart, counts once."""
    metrics = [list(read_metrics(path)) for path in sorted(run_dir.glob("*/metrics.jsonl"))]
    tokens: dict[int, int] = {}
    sent: dict[tuple[int, int], int] = {}
    losses: dict[int, dict[int, tuple[float, float]]] = {}
    for region, records in enumerate(metrics):
        for r in records:
            if r["kind"] == "round":
                tokens[r["round"]] = r["tokens"]
                sent[r["round"], region] = r["bytes_up"]
            elif r["kind"] == "eval" and r["set"] == HELD_OUT:
                known = r["loss"] is not None
                losses.setdefault(r["round"], {})[region] = (
                    (r["loss"], r["bits_per_byte"]) if known else (math.inf, math.inf)
                )
    course, before, until = [], 0, Counter[str]()
    for number, of in sorted(losses.items()):
        for at in range(before + 1, number + 1):
            until["tokens"] += tokens.get(at, 0)
            until["sent"] += sum(sent.get((at, region), 0) for region in range(len(metrics)))
        before = number
        mean = [sum(column) / len(of) for column in zip(*of.values(), strict=True)]
        course.append(Point(number, until["tokens"], until["sent"], *mean))
    return tuple(course)


def final(run_dir: Path) -> Point | None:
    course = read_course(run_dir)
    return course[-1] if course else None


def swept(jobs: Sequence[Outcome]) -> list[str]:
    """The keys that jobs differ in."""
    keys = dict.fromkeys(key for job in sorted(jobs, key=lambda job: job.num) for key in job.values)
    return [key for key in keys if len({str(job.values.get(key)) for job in jobs}) > 1]


# ---- text ----


def table(jobs: Sequence[Outcome]) -> str:
    keys = swept(jobs)
    rows = [["", "job", *keys, "held-out", "bits/byte", "tokens", "sent", ""]]
    for job in jobs:
        last = job.course[-1] if job.course else None
        numbers = (
            [_loss(last.loss), f"{last.bits_per_byte:.3f}", count(last.tokens), size(last.sent)] if last else ["–"] * 4
        )
        note = {"done": "", "started": "not finished", "failed": f"failed: {job.why}"}[job.state]
        best = "best" if job is jobs[0] and math.isfinite(job.loss) else ""
        rows.append([best, str(job.num), *(str(job.values.get(key, "–")) for key in keys), *numbers, note])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def as_csv(jobs: Sequence[Outcome]) -> str:
    """One line a job; a loss that is not there is empty."""
    keys, text = swept(jobs), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["job", *keys, "state", "held_out_nats_per_token", "bits_per_byte", "tokens", "sent_bytes", "why", "dir"]
    )
    for job in jobs:
        last = job.course[-1] if job.course else None
        numbers = [last.loss, last.bits_per_byte, last.tokens, last.sent] if last else [""] * 4
        values = [job.values.get(key, "") for key in keys]
        writer.writerow([job.num, *values, job.state, *numbers, job.why, job.dir.name])
    return text.getvalue()


def report(directory: Path) -> bool:
    """Prints the table and writes results.csv and sweep.svg. False: no job there, and nothing done."""
    from launch.drawing import picture

    jobs = read_sweep(directory)
    if not jobs:
        return False
    (directory / "results.csv").write_text(as_csv(jobs))
    (directory / "sweep.svg").write_text(picture(jobs, swept(jobs), directory.name))
    print(f"\nheld-out: final held-out loss, nats/token\n\n{table(jobs)}\n\n{directory / 'results.csv'}")
    print(f"{directory / 'sweep.svg'}", flush=True)
    return True
