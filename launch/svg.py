"""A plot of lines over a logarithmic axis as one self-contained SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

Place = Callable[[float, float], tuple[float, float]]
"""(x, y of 0 to 1) -> pixels."""
WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 44, 56
COLOURS = ("#0b5fa5", "#c2410c", "#15803d", "#7e22ce", "#525252", "#b91c1c")
DASHES = ("none", "7 4", "2 3", "9 3 2 3", "4 4", "12 4")
"""Lines are told apart without colours, too, and where they lie on each other."""


def plot(
    title: str,
    across: str,
    up: str,
    ticks: Sequence[tuple[float, str]],
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    mark: float | None = None,
) -> str:
    """lines: (name, [(x > 0, y of 0 to 1)]) in rising x; ticks: (x, label); mark: a height to mark, such as a target."""
    low, high = math.log(ticks[0][0]), math.log(ticks[-1][0])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, TOP - 20, title, "start", "15"),
    ]
    for y in range(0, 101, 20):
        parts += [_rule(place, (ticks[0][0], y / 100), (ticks[-1][0], y / 100)), _tick(place(ticks[0][0], y / 100), y)]
    for x, label in ticks:
        at, foot = place(x, 0)
        parts += [_rule(place, (x, 0), (x, 1)), _text(at, foot + 18, label)]
    if mark is not None:
        parts.append(_rule(place, (ticks[0][0], mark), (ticks[-1][0], mark), "#111"))
        parts.append(_text(WIDTH - RIGHT - 4, place(ticks[0][0], mark)[1] + 14, f"{100 * mark:g} % wanted", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, across))
    parts.append(_text(14, HEIGHT / 2, up, turned=True))
    for index, (name, points) in enumerate(lines):
        parts += _line(index, name, [place(x, y) for x, y in points])
    return "\n".join([*parts, "</svg>\n"])


def _line(index: int, name: str, points: Sequence[tuple[float, float]]) -> list[str]:
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" fill="none"'
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    at, y = WIDTH - RIGHT + 14, TOP + 12 + 22 * index
    return [
        f'<polyline points="{corners}" {style}/>',
        f'<line x1="{at}" y1="{y}" x2="{at + 30}" y2="{y}" {style}/>',
        _text(at + 38, y + 4, name, "start"),
    ]


def _rule(place: Place, start: tuple[float, float], end: tuple[float, float], colour: str = "#e3e3e3") -> str:
    (x1, y1), (x2, y2) = place(*start), place(*end)
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _tick(at: tuple[float, float], percent: int) -> str:
    return _text(at[0] - 8, at[1] + 4, f"{percent} %", "end")


def _text(x: float, y: float, text: str, anchor: str = "middle", size: str = "12", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turn}>{escape(text)}</text>'
