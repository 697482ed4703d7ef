"""The picture of a sweep: loss against tokens and against bytes sent, and the final loss against what was swept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from diloco.metrics import count, size
from launch.comparing import Outcome, Point
from launch.svg import COLOURS, Axis, Box, Line, document, legend, linear, logarithmic, panel, place, style, text

WIDTH, LEFT, TOP = 1240, 72, 84
PANEL = (440.0, 280.0)
"""Width and height, pixels."""
RIGHT = LEFT + PANEL[0] + 190
ROW = PANEL[1] + 110
LOSS = "held-out loss (nats/token)"
OTHERS = "#c4c4c4"
Styled = tuple[Outcome, str, str, str, float]
"""A job, its label, and the colour, dashes and width of its lines."""


def picture(jobs: Sequence[Outcome], keys: Sequence[str], name: str) -> str:
    """jobs: best first; keys: what they differ in. Those that diverged, or failed before a
    loss, are not shown."""
    shown = [job for job in jobs if len(job.course) and all(math.isfinite(p.loss) for p in job.course)]
    done = [job for job in shown if job.state == "done"]
    title = f"Sweep {name}: {len(done)} of {len(jobs)} jobs done"
    if not shown:
        return document(title, WIDTH, 120, [text(LEFT, 60, f"{title}, and no loss to show yet", "start", "18")])
    lines = [(job, label(job, keys), *look(rank)) for rank, job in enumerate(shown)]
    parts = [text(LEFT, 36, title, "start", "18")]
    parts += courses(Box(LEFT, TOP, *PANEL), "Loss against tokens", "committed tokens", lines, "tokens", count)
    parts += courses(Box(RIGHT, TOP, *PANEL), "Loss against bytes sent", "bytes sent", lines, "sent", size)
    for index, across in enumerate(finals(keys)):
        parts += final_panel(spot(index), done, across, keys)
    parts += ranking(lines)
    bottom = max(spot(index).top for index in range(max(1, len(finals(keys))))) + ROW
    return document(title, WIDTH, int(bottom), parts)


def spot(index: int) -> Box:
    """Of the final panels: the first beside the legend, the others in pairs below."""
    return Box((LEFT, RIGHT)[(index + 1) % 2 if index else 0], TOP + ROW * (1 + (index + 1) // 2), *PANEL)


def ranking(lines: Sequence[Styled]) -> list[str]:
    """The legend of both courses."""
    best = lines[: len(COLOURS)]
    named = [Line(f"{words}: {job.course[-1].loss:.4f}", (), c, d, w) for job, words, c, d, w in best]
    others = [f"and {len(lines) - len(named)} more, in grey"] if len(lines) > len(named) else []
    top = TOP + ROW
    return [
        text(RIGHT, top - 20, "Held-out loss at the end, best first", "start", "15"),
        *legend(RIGHT, top, named),
        *(text(RIGHT, top + 22 * len(named) + 4, words, "start") for words in others),
    ]


def look(rank: int) -> tuple[str, str, float]:
    """Colour, dashes and width: the best is the thick one, and what is far behind is grey."""
    return (*style(rank), 3.5 if rank == 0 else 1.8) if rank < len(COLOURS) else (OTHERS, "none", 1.2)


def label(job: Outcome, keys: Sequence[str]) -> str:
    words = " ".join(f"{key.rpartition('.')[2]}={brief(job.values.get(key, '–'))}" for key in keys) or f"job {job.num}"
    return words if job.state == "done" else f"{words} ({job.state})"


def courses(
    box: Box, title: str, across: str, lines: Sequence[Styled], field: str, show: Callable[[float], str]
) -> list[str]:
    """Best on top."""

    def at(point: Point) -> float:
        return float(getattr(point, field))

    ends = [at(job.course[-1]) for job, *_ in lines if at(job.course[-1])]
    if not ends:
        none = "Nothing was: one region has nobody to send to."
        return [text(box.left, box.top - 20, title, "start", "15"), text(box.left, box.top + 20, none, "start")]
    wide = max(ends) > 10 * min(ends)
    points = {id(job): [(at(p), p.loss) for p in job.course if at(p) or not wide] for job, *_ in lines}
    xs = [x for of in points.values() for x, _ in of]
    axis = f"{across}, all regions"
    x = logarithmic(axis, xs, show) if wide else linear(axis, xs, show, zero=True)
    y = linear(LOSS, [loss for of in points.values() for _, loss in of], number)
    drawn = []
    for job, words, colour, dash, width in reversed(lines):
        course = points[id(job)]
        drawn.append(Line(words, course, colour, dash, width, dots=len(course) == 1))
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
        words = f"{other.rpartition('.')[2]}={value}" if other else across
        dots = [Line(words, [point], colour, dots=True) for point in points]
        lines += dots if len(keys) > 2 else [Line(words, points, colour, dash, dots=True)]
    best = place(box, x, y, position(done[0].values.get(across)), done[0].loss)
    parts = panel(box, f"Final loss against {across} (○ best: {done[0].loss:.4f})", x, y, lines)
    parts += [
        f'<circle class="best" cx="{best[0]:.1f}" cy="{best[1]:.1f}" r="8" fill="none" stroke="#111" stroke-width="2"/>'
    ]
    return parts + (legend(box.left + box.width + 14, box.top + 8, lines) if other else [])


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


def brief(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    return f"{value:.4g}"
