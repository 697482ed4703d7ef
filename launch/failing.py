"""What interruptions leave of a fleet's work: elastic data parallelism, where each stops all chips, against regions, where it
stops one. Pure; random by seed.

Goodput is the share of chip-time that is computed and kept, as in Decoupled DiLoCo (arXiv 2604.21428), which publishes 58 % for
elastic data parallelism at 1.2 million chips and one interruption per chip-year, 88 % for 8 learners and 93 % for 16. The
times below are fitted to these three; the paper's own are not known to us.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

YEAR = 365.25 * 86400.0
STOPS = 19.0
"""Seconds that all chips of elastic data parallelism stand still at each interruption. Fitted."""
RECOVERY = 29.0
"""Seconds until a region that was interrupted computes again. Fitted."""
PAUSE = 0.1
"""Seconds that the other regions lose: `tests.bench.failover`, kill -9 while a round is under way."""
EVENTS = 20_000
"""Interruptions of a simulation."""
CHIPS = (1_000, 10_000, 100_000, 300_000, 600_000, 1_200_000, 2_400_000)


@dataclass(frozen=True)
class Fleet:
    """Chips in `groups` that fail by themselves: one group is data parallelism, more are regions."""

    chips: int
    groups: int
    recovery: float
    """Seconds that an interruption stops its group for; a further one meanwhile changes nothing."""
    pause: float = 0.0
    """Seconds that it holds up each of the other groups."""
    years: float = 1.0
    """Of a chip between two interruptions."""

    def interval(self) -> float:
        """Seconds between two interruptions of the fleet, on average."""
        return self.years * YEAR / self.chips

    def goodput(self, seed: int = 0, events: int = EVENTS) -> float:
        """0 to 1, over so many interruptions at random."""
        draw, now, lost = random.Random(seed), 0.0, 0.0
        back = [0.0] * self.groups
        for _ in range(events):
            now += draw.expovariate(1 / self.interval())
            hit = draw.randrange(self.groups)
            if back[hit] <= now:
                back[hit] = now + self.recovery
                lost += self.recovery + self.pause * sum(until <= now for until in back)
        return 1 - lost / (self.groups * max(now, *back))

    def expected(self) -> float:
        """The same in closed form: a group is up for 1 / rate, then down for `recovery`; pauses on top."""
        rate = 1 / self.interval() / self.groups
        return 1 / (1 + rate * (self.recovery + self.pause * (self.groups - 1)))


def data_parallel(chips: int, stops: float = STOPS, years: float = 1.0) -> Fleet:
    return Fleet(chips, 1, stops, 0.0, years)


def regional(chips: int, regions: int, recovery: float = RECOVERY, years: float = 1.0) -> Fleet:
    return Fleet(chips, regions, recovery, PAUSE, years)
