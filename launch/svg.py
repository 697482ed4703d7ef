"""Plots of lines as one self-contained SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b5fa5", "#c2410c", "#15803d", "#7e22ce", "#525252", "#b91c1c", "#0e7490", "#a16207")
DASHES = ("none", "7 4", "2 3", "9 3 2 3", "4 4", "12 4", "1 2", "6 2 1 2")
"""Lines are told apart without colours, too, and where they lie on each other."""
GRID, INK = "#e3e3e3", "#222"


@dataclass(frozen=True)
class Axis:
    label: str
    ticks: Sequence[tuple[float, str]]
    """(value, label)"""
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """0 at the low end to 1 at the high one."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return ((math.log(value) if self.log else value) - low) / (high - low)


@dataclass(frozen=True)
class Line:
    """Solid and without dots unless it says otherwise."""

    name: str
    points: Sequence[tuple[float, float]]
    """In rising x."""
    colour: str
    dash: str = "none"
    width: float = 2
    dots: bool = False


@dataclass(frozen=True)
class Box:
    """Where the lines go, in pixels; labels are outside."""

    left: float
    top: float
    width: float
    height: float


def plot(
    title: str,
    across: str,
    up: str,
    ticks: Sequence[tuple[float, str]],
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    mark: float | None = None,
) -> str:
    """Shares over a logarithmic axis. lines: (name, [(x > 0, y of 0 to 1)]) in rising x; ticks: (x, label); mark: a
    height to mark, such as a target."""
    width, height = 760, 430
    box = Box(64, 44, width - 64 - 190, height - 44 - 56)
    x = Axis(across, ticks, ticks[0][0], ticks[-1][0], log=True)
    y = Axis(up, [(percent / 100, f"{percent} %") for percent in range(0, 101, 20)], 0, 1)
    styled = [Line(name, points, *style(index)) for index, (name, points) in enumerate(lines)]
    parts = panel(box, title, x, y, styled)
    if mark is not None:
        at = box.top + (1 - mark) * box.height
        parts.append(rule((box.left, at), (box.left + box.width, at), "#111"))
        parts.append(text(box.left + box.width - 4, at + 14, f"{100 * mark:g} % wanted", "end"))
    return document(title, width, height, [*parts, *legend(box.left + box.width + 14, box.top + 12, styled)])


def style(index: int) -> tuple[str, str]:
    """Colour and dashes of the line of that number."""
    return COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]


def linear(label: str, values: Iterable[float], show: Callable[[float], str], zero: bool = False) -> Axis:
    """An axis with about five round ticks that holds all values, and zero if so wanted."""
    values = [*values, *([0.0] if zero else [])]
    low, high = min(values), max(values)
    if low == high:
        low, high = (low, low + 1) if zero else (low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(label, [(i * step, show(i * step)) for i in range(first, last + 1)], first * step, last * step)


def logarithmic(label: str, values: Iterable[float], show: Callable[[float], str]) -> Axis:
    """An axis with ticks at 1, 2 and 5 times powers of ten, fewer over many decades; values > 0."""
    values = list(values)
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    around = [f * 10.0**power for power in range(low - 1, high + 2) for f in factors]
    first = max(tick for tick in around if tick <= min(values) * 1.0001)
    last = min(tick for tick in around if tick >= max(values) * 0.9999 and tick > first)
    return Axis(label, [(t, show(t)) for t in around if first <= t <= last], first, last, log=True)


def panel(box: Box, title: str, across: Axis, up: Axis, lines: Sequence[Line]) -> list[str]:
    """A grid with its axes and lines."""
    right, foot = box.left + box.width, box.top + box.height
    parts = [text(box.left, box.top - 20, title, "start", "15")]
    for value, label in up.ticks:
        at = foot - up.share(value) * box.height
        parts += [rule((box.left, at), (right, at)), text(box.left - 8, at + 4, label, "end")]
    for value, label in across.ticks:
        at = box.left + across.share(value) * box.width
        parts += [rule((at, box.top), (at, foot)), text(at, foot + 18, label)]
    parts.append(text(box.left + box.width / 2, foot + 40, across.label))
    parts.append(text(box.left - 50, box.top + box.height / 2, up.label, turned=True))
    for line in lines:
        parts += _line(line, [place(box, across, up, *point) for point in line.points])
    return parts


def place(box: Box, across: Axis, up: Axis, x: float, y: float) -> tuple[float, float]:
    """Pixels of a point."""
    return box.left + across.share(x) * box.width, box.top + (1 - up.share(y)) * box.height


def legend(left: float, top: float, lines: Sequence[Line]) -> list[str]:
    """A row of 22 pixels for each."""
    parts = []
    for index, line in enumerate(lines):
        y = top + 22 * index
        parts += [f'<line x1="{left}" y1="{y}" x2="{left + 30}" y2="{y}" {_stroke(line)}/>']
        parts += [text(left + 38, y + 4, line.name, "start")]
    return parts


def document(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>\n"])


def _line(line: Line, corners: Sequence[tuple[float, float]]) -> list[str]:
    """It tells its name where the pointer is."""
    title = f"<title>{escape(line.name)}</title>"
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    parts = [f'<polyline points="{points}" {_stroke(line)}>{title}</polyline>']
    dots = corners if line.dots else ()
    return parts + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{line.colour}">{title}</circle>' for x, y in dots]


def _stroke(line: Line) -> str:
    return f'stroke="{line.colour}" stroke-width="{line.width:g}" stroke-dasharray="{line.dash}" fill="none"'


def rule(start: tuple[float, float], end: tuple[float, float], colour: str = GRID) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle", size: str = "12", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turn}>{escape(words)}</text>'
