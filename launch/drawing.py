"""The picture of a sweep: loss against tokens and against bytes sent, and the final loss against what was swept. Pure but for
the records that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from diloco.metrics import count, size
from launch.comparing import Outcome, Point
from launch.svg import COLOURS, Axis, Box, Line, document, legend, linear, logarithmic, panel, place, style, text

WIDTH, LEFT, TOP = 1180, 72, 84
PANEL = (440.0, 280.0)
"""Width and height, pixels."""
RIGHT = LEFT + PANEL[0] + 130
ROW = PANEL[1] + 110
LOSS = "held-out loss (nats/token)"
OTHERS = "#c4c4c4"


def picture(jobs: Sequence[Outcome], keys: Sequence[str], name: str) -> str:
    """jobs: best first; keys: what they differ in. Jobs that failed or diverged are not shown."""
    shown = [job for job in jobs if len(job.course) and all(math.isfinite(p.loss) for p in job.course)]
    done = [job for job in shown if job.state == "done"]
    title = f"Sweep {name}: {len(done)} of {len(jobs)} jobs done"
    if not shown:
        return document(title, WIDTH, 120, [text(LEFT, 60, f"{title}, and no loss to show yet", "start", "18")])
    lines = [(job, label(job, keys), *look(rank)) for rank, job in enumerate(shown)]
    parts = [text(LEFT, 36, title, "start", "18")]
    parts += courses(
        Box(LEFT, TOP, *PANEL), "Loss against tokens", "committed tokens, all regions", lines, "tokens", count
    )
    sent = Box(RIGHT, TOP, *PANEL)
    if any(job.course[-1].sent for job in shown):
        parts += courses(sent, "Loss against bytes sent", "bytes sent, all regions", lines, "sent", size)
    else:
        parts += [text(RIGHT, TOP - 20, "Loss against bytes sent", "start", "15")]
        parts += [text(RIGHT, TOP + 20, "One region has nobody to send to: no job sent a byte.", "start")]
    boxes = [Box(LEFT, TOP + ROW * (1 + i), *PANEL) for i in range(len(finals(keys)))]
    for box, across in zip(boxes, finals(keys), strict=True):
        parts += final_panel(box, done, across, keys)
    named = [
        Line(f"{words}  {job.course[-1].loss:.4f}", (), colour, dash, width)
        for job, words, colour, dash, width in lines
    ]
    parts += [text(RIGHT, TOP + ROW - 20, "Held-out loss at the end, best first", "start", "15")]
    parts += legend(RIGHT, TOP + ROW, named[: len(COLOURS)])
    if others := len(named) - len(COLOURS):
        parts += (
            [text(RIGHT, TOP + ROW + 22 * len(COLOURS) + 4, f"and {others} more, in grey", "start")]
            if others > 0
            else []
        )
    bottom = TOP + ROW * max(1, len(boxes)) + ROW
    return document(title, WIDTH, int(max(bottom, TOP + ROW + 22 * (len(named[:8]) + 2))), parts)


def look(rank: int) -> tuple[str, str, float]:
    """Colour, dashes and width: the best is the thick one, and what is far behind is grey."""
    return (*style(rank), 3.5 if rank == 0 else 1.8) if rank < len(COLOURS) else (OTHERS, "none", 1.2)


def label(job: Outcome, keys: Sequence[str]) -> str:
    words = " ".join(f"{key.rpartition('.')[2]}={job.values.get(key, '–')}" for key in keys) or f"job {job.num}"
    return words if job.state == "done" else f"{words} ({job.state})"


Styled = tuple[Outcome, str, str, str, float]


def courses(
    box: Box, title: str, across: str, lines: Sequence[Styled], field: str, show: Callable[[float], str]
) -> list[str]:
    """Best on top."""

    def at(point: Point) -> float:
        return float(getattr(point, field))

    ends = [at(job.course[-1]) for job, *_ in lines if at(job.course[-1])]
    wide = max(ends) > 10 * min(ends)
    points = {id(job): [(at(p), p.loss) for p in job.course if at(p) or not wide] for job, *_ in lines}
    xs = [x for of in points.values() for x, _ in of]
    x = logarithmic(across, xs, show) if wide else linear(across, xs, show, zero=True)
    y = linear(LOSS, [loss for of in points.values() for _, loss in of], number)
    drawn = [Line(words, points[id(job)], colour, dash, width) for job, words, colour, dash, width in reversed(lines)]
    return panel(box, title, x, y, drawn)


def finals(keys: Sequence[str]) -> list[str]:
    """The keys that get a panel of their own: one or two share theirs."""
    return list(keys[:1]) if len(keys) <= 2 else list(keys)


def final_panel(box: Box, done: Sequence[Outcome], across: str, keys: Sequence[str]) -> list[str]:
    """Final loss against one key; of two, a line for every value of the other; of more, dots alone."""
    if not done:
        return []
    x, position = value_axis(across, [job.values.get(across) for job in done])
    y = linear(LOSS, [job.loss for job in done], number)
    other = next((key for key in keys if key != across), None) if len(keys) == 2 else None
    groups = in_order([job.values.get(other) for job in done]) if other else [None]
    lines = []
    for index, value in enumerate(groups):
        of = [job for job in done if not other or job.values.get(other) == value]
        points = sorted((position(job.values.get(across)), job.loss) for job in of)
        colour, dash = style(index)
        words = f"{other}={value}" if other else across
        dots = [Line(words, [point], colour, dots=True) for point in points]
        lines += dots if len(keys) > 2 else [Line(words, points, colour, dash, dots=True)]
    best = place(box, x, y, position(done[0].values.get(across)), done[0].loss)
    parts = panel(box, f"Final loss against {across}", x, y, lines)
    parts += [
        f'<circle class="best" cx="{best[0]:.1f}" cy="{best[1]:.1f}" r="8" fill="none" stroke="#111" stroke-width="2"/>'
    ]
    parts += [text(best[0], best[1] - 13, f"best {done[0].loss:.4f}")]
    return parts + (legend(box.left + box.width - 150, box.top + 14, lines) if other else [])


def value_axis(key: str, values: Sequence[Any]) -> tuple[Axis, Callable[[Any], float]]:
    """Numbers lie where they are, over a logarithmic axis if they span a decade; anything else side by side."""
    names = in_order(values)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in names):
        numbers = [float(value) for value in names]
        ticks = [(value, number(value)) for value in numbers]
        if numbers[0] > 0 and numbers[-1] >= 10 * numbers[0]:
            return Axis(key, thin(ticks), numbers[0] / 1.3, numbers[-1] * 1.3, log=True), float
        margin = (numbers[-1] - numbers[0]) / 12 or abs(numbers[0]) / 2 or 1
        return Axis(key, thin(ticks), numbers[0] - margin, numbers[-1] + margin), float
    places = {str(value): float(index) for index, value in enumerate(names)}
    return Axis(key, [(at, word) for word, at in places.items()], -0.5, len(places) - 0.5), lambda v: places[str(v)]


def in_order(values: Sequence[Any]) -> list[Any]:
    """Each once; numbers by size, before the rest by name."""
    distinct = {str(value): value for value in values}.values()
    return sorted(
        distinct, key=lambda v: (not isinstance(v, int | float), v if isinstance(v, int | float) else 0, str(v))
    )


def thin(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """At most ten of them."""
    return ticks[:: -(-len(ticks) // 10)]


def number(value: float) -> str:
    return f"{value:.4g}"
