"""Which way of exchanging reaches a utilization at the least cost in loss, and what bandwidth changes. Pure.

In order of what is known to cost loss (README "Figures"; arXiv 2501.18512, 2503.09799, 2604.21428, 2603.08163): int8 and 4 bits
are not told apart from fp32; up to 5 steps of overlap are harmless or cost little; H up to 100 is the field's habit, more of it
costs more; topk's price falls with the length of a run and is high in short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.planning import Outlook, Site, Way, Work, outlook, paces
from launch.simulating import Schedule, reaching

FRAGMENTS = 4
"""Of the streaming ways, as configs/experiment/streaming.yaml."""
OVERLAP = 5
MBIT = 1e6 / 8
RATES = tuple(10 ** (1 + k / 4) * MBIT for k in range(17))
"""Of a sweep, bytes per second: 10 Mbit/s to 100 Gbit/s."""


def candidates(layers: int) -> list[Way]:
    """What may be recommended, the least harmful first. layers: of the model, which bounds the fragments."""
    parts = max(p for p in (1, 2, FRAGMENTS) if p <= max(layers, 1))
    dense, sparse = ("int8", "int4"), ("topk",)
    groups = [((32, 48, 100), dense), ((200, 500), dense), ((32, 100, 500), sparse)]
    found = []
    for steps, codecs in groups:
        for h in steps:
            for codec in codecs:
                found += [Way(Schedule(h), codec)]
                found += [Way(Schedule(h, parts, overlap), codec) for overlap in (1, 2, OVERLAP)]
    return found


def bound(sites: Sequence[Site], work: Work, way: Way, rtt: float) -> float:
    """Utilization that exchanges alone leave, 0 to 1."""
    return paces(sites, work, way, rtt).bound(way.schedule)


@dataclass(frozen=True)
class Advice:
    """way: the first candidate that reaches the target, or the best of all; enough: whether it does."""

    target: float
    outlook: Outlook
    enough: bool
    rate: float | None
    """Bytes per second of the slowest direction, all lines in proportion, at which this way reaches the target; None: more
    than a hundred times what there is."""


def recommend(sites: Sequence[Site], work: Work, rtt: float, target: float, first: bool = False) -> Advice:
    """first: outer.boundary=first, which stays as it is."""
    ways = [
        replace(way, schedule=replace(way.schedule, first=first)) for way in candidates(len(set(work.layers.values())))
    ]
    reached = next((way for way in ways if bound(sites, work, way, rtt) >= target), None)
    way = reached or max(ways, key=lambda way: bound(sites, work, way, rtt))
    return Advice(
        target,
        outlook("recommended", sites, work, way, rtt),
        reached is not None,
        needed(sites, work, way, rtt, target),
    )


def needed(sites: Sequence[Site], work: Work, way: Way, rtt: float, target: float) -> float | None:
    """The least rate of the slowest direction, bytes per second, at which `way` reaches the target."""
    slowest = min(site.rate for site in sites)
    return reaching(target, lambda rate: bound(scaled(sites, rate), work, way, rtt), slowest / 1e4, slowest * 100)


def scaled(sites: Sequence[Site], rate: float) -> list[Site]:
    """The same with all lines faster or slower, so that the slowest direction has `rate` bytes per second."""
    factor = rate / min(site.rate for site in sites)
    return [replace(site, up=site.up * factor, down=site.down * factor) for site in sites]


def ways(configured: Way, layers: int) -> dict[str, Way]:
    """What a plan compares: the way of the config, and with its H and codec the three ways to wait."""
    s = configured.schedule
    parts = (
        s.fragments
        if s.fragments > 1
        else max(p for p in (1, 2, FRAGMENTS) if p <= max(layers, 1) and s.sync_every % p == 0)
    )
    streaming = replace(s, fragments=parts, overlap=0)
    overlapped = replace(streaming, overlap=s.overlap or min(OVERLAP, s.sync_every))
    return {
        "configured": configured,
        "blocking": replace(configured, schedule=replace(s, fragments=1, overlap=0)),
        "streaming": replace(configured, schedule=streaming),
        "overlapped": replace(configured, schedule=overlapped),
    }


@dataclass(frozen=True)
class Line:
    """Utilization by rate of one way: what a sweep's table and plot show."""

    name: str
    rates: tuple[float, ...]
    """Bytes per second of the slowest direction."""
    utilization: tuple[float, ...]


def sweep(sites: Sequence[Site], work: Work, compared: dict[str, Way], rtt: float) -> list[Line]:
    """Every way at every rate, and data parallelism in bf16: gradients of all at every step."""
    every = {**compared, "data parallel": Way(Schedule(1), "bf16")}
    found = []
    for name, way in every.items():
        over = replace(work, durable=work.durable and name != "data parallel")
        values = [bound(scaled(sites, rate), over, way, rtt) for rate in RATES]
        found.append(Line(name, RATES, tuple(values)))
    return found
