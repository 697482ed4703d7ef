"""What compute utilization a bandwidth allows, as arithmetic: Streaming DiLoCo's own model by layers, and ours by rounds. Pure.

`Layers` is the model behind the bandwidth tables of Streaming DiLoCo (arXiv 2501.18512), reconstructed from what they say: it
reproduces them. `Schedule` is how regions of this toolkit take turns at steps, exchanges and waiting, whatever their speeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layers:
    """A model whose layers are exchanged one by one over one link, each when its backward is done.

    A layer's forward, the gradient of its activations and that of its parameters take a third of step / layers each; the
    first layer has no gradient of activations. Exchanges queue on the link. An updated layer blocks its own forward in the
    next step, or `overlap` steps later.
    """

    layers: int
    step: float
    """Seconds of an inner step with all three parts everywhere."""
    gbit: float
    """Gbit of all layers together."""
    sync_every: int = 1
    fragments: int = 1
    """Strided groups of layers; group p is sent in steps p H / fragments, then every H."""
    overlap: int = 0

    def utilization(self, rate: float, cycles: int = 3) -> float:
        """Share of the time that is computed, 0 to 1, at `rate` Gbit/s, in the last of so many cycles of H steps."""
        third, wire = self.step / self.layers / 3, self.gbit / self.layers / rate
        due = [self._due(n) for n in range(self.sync_every)]
        waits: dict[int, list[tuple[int, float]]] = defaultdict(list)
        now = link = began = 0.0
        for n in range(cycles * self.sync_every):
            if n == (cycles - 1) * self.sync_every:
                began = now
            start, top = now, 0.0
            for layer, ready in sorted(waits.pop(n, ())):  # what a layer waits delays those above it
                top = max(top, ready - (start + third * layer))
            now = start + top + third * self.layers
            for layer in due[n % self.sync_every]:
                done = now + 2 * third * (self.layers - layer) - third * (layer == 0)
                link = max(link, done) + wire
                waits[n + 1 + self.overlap].append((layer, link))
            now += third * (2 * self.layers - 1)
        return self.sync_every * third * (3 * self.layers - 1) / (now - began)

    def _due(self, n: int) -> list[int]:
        """Layers that are sent in step n of a cycle, in the order of the backward."""
        groups = [p for p in range(self.fragments) if p * self.sync_every // self.fragments == n]
        return sorted((layer for p in groups for layer in range(p, self.layers, self.fragments)), reverse=True)


@dataclass(frozen=True)
class Schedule:
    """How often regions meet: `outer.*` of the config."""

    sync_every: int
    """H."""
    fragments: int = 1
    overlap: int = 0
    """Inner steps that go on while an exchange is under way."""
    first: bool = False
    """outer.boundary=first: who gets to H first opens the round, the others contribute what they have."""

    @property
    def interval(self) -> int:
        return self.sync_every // self.fragments


@dataclass(frozen=True)
class Paces:
    """What `simulate` finds, region by region, in a long run."""

    utilization: tuple[float, ...]
    """Share of the time that is computed, 0 to 1; the rest waits for an exchange or for another region."""
    steps: tuple[float, ...]
    """Inner steps per second, waiting included."""
    rounds: float
    """Per second."""

    def bound(self, schedule: Schedule) -> float:
        """What exchanges alone leave: of the slowest region, which waits for no other. With `first` nobody waits for more than
        the step that others are in: the least of all."""
        return min(self.utilization) if schedule.first else max(self.utilization)


@dataclass
class _Region:
    """One region's clock: it steps, and at a gate it waits."""

    step: float
    now: float = 0.0
    done: int = 0
    snapshot: int = 0
    """Steps done at its last one."""
    gates: list[tuple[int, float]] = field(default_factory=list)
    """(step that may not begin, until when), in order."""

    def _open(self) -> float:
        """When the next step begins."""
        return max([self.now, *(until for at, until in self.gates if at <= self.done)])

    def _leg(self) -> tuple[float, float]:
        """When the next step begins, and how many there are before the next gate."""
        return self._open(), min((at - self.done for at, _ in self.gates if at > self.done), default=math.inf)

    def _take(self, begin: float, steps: int) -> None:
        self.gates = [gate for gate in self.gates if gate[0] > self.done]
        self.now, self.done = begin + steps * self.step, self.done + steps

    def until_step(self, target: int) -> None:
        while self.done < target:
            begin, free = self._leg()
            self._take(begin, int(min(free, target - self.done)))

    def past(self, time: float) -> None:
        """To the first boundary of steps at or after `time`; who waits at a gate then contributes as he stands."""
        while self.now < time:
            begin, free = self._leg()
            if begin >= time:
                self.now = time
                return
            self._take(begin, int(min(free, math.ceil((time - begin) / self.step - 1e-9))))

    def eta(self, target: int) -> float:
        twin = _Region(self.step, self.now, self.done, self.snapshot, list(self.gates))
        twin.until_step(target)
        return twin.now


def simulate(schedule: Schedule, steps: Sequence[float], exchanges: Sequence[float], cycles: int = 12) -> Paces:
    """Regions whose inner steps take `steps` seconds each, over so many cycles of H steps, the first quarter not counted.

    Round r is of fragment r mod P: it opens when all regions have done H / P steps since the last one (`first`: one has), is
    exchanged in exchanges[r mod P] seconds once the exchanges before it are over, and holds up who has taken `overlap`
    steps more. Snapshots, merges and digests take no time here.
    """
    regions, link = [_Region(step) for step in steps], 0.0
    total, warm = cycles * schedule.fragments, cycles * schedule.fragments // 4
    before, began = [(0.0, 0)] * len(regions), 0.0
    for r in range(total):
        if r == warm:
            before, began = [(region.now, region.done) for region in regions], link
        _snapshot(regions, schedule)
        link = max(link, *(region.now for region in regions)) + exchanges[r % schedule.fragments]
        for region in regions:
            region.snapshot = region.done
            region.gates.append((region.done + schedule.overlap, link))
    spent = [(region.now - t, region.done - n) for region, (t, n) in zip(regions, before, strict=True)]
    return Paces(
        tuple(n * step / t for (t, n), step in zip(spent, steps, strict=True)),
        tuple(n / t for t, n in spent),
        (total - warm) / (link - began),
    )


def _snapshot(regions: Sequence[_Region], schedule: Schedule) -> None:
    if not schedule.first:
        for region in regions:
            region.until_step(region.snapshot + schedule.interval)
        return
    opened = min(region.eta(region.snapshot + schedule.interval) for region in regions)
    for region in regions:
        region.past(opened)


def reaching(target: float, utilization: Callable[[float], float], low: float, high: float) -> float | None:
    """The least rate in [low, high] at which `utilization`, which rises with it, is `target`, to 1 %; None if none is."""
    if utilization(high) < target:
        return None
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if utilization(middle) >= target else (middle, high)
    return high
