"""Which faults happen when: drawn from a seed, before the run begins. Pure.

Faults are dealt like cards, so that every stretch of a run has all kinds of them; a restart costs more than a cut, so decks
hold few. Two places at least are left alone at any time, so that there is somebody whose rounds must go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

KILL, RANK, LEAVE, LIGHTHOUSE = "kill", "rank", "leave", "lighthouse"
HELPER, FREEZE, PARTITION, CUT, SLOW = "helper", "freeze", "partition", "cut", "slow"
"""RANK: a rank ends, or the process of its exchanges and with it the rank. HELPER: the process that uploads its checkpoints,
which it survives."""
RESTARTS = (KILL, RANK, LEAVE, LIGHTHOUSE)
OF_PROCESSES = (KILL, RANK, LEAVE, HELPER, FREEZE)
LINKS = (PARTITION, CUT, SLOW)
DECK = [KILL] * 2 + [RANK, LEAVE, LIGHTHOUSE, HELPER] + [FREEZE] * 7 + [PARTITION] * 3 + [CUT] * 4 + [SLOW] * 3

NOW, EXCHANGE, HELD, COMMIT, FETCH = "now", "exchange", "held", "commit", "fetch"
MOMENTS = (NOW, EXCHANGE, HELD, COMMIT)
"""Of faults of their own. FETCH is that of a fault that follows another one's restart."""
UNHARMED = 2
"""Places that no fault touches, at any time."""
RECOVERY = {KILL: 25.0, RANK: 25.0, LEAVE: 25.0, LIGHTHOUSE: 3.0}
"""Seconds in which who was restarted is left alone; other faults: AFTERWARDS."""
AFTERWARDS = 4.0
LATER = 0.12
"""Seconds after its moment at which a fault happens at the latest."""
CHASED = 0.5
"""Share of the restarts that are followed by a fault while the restarted region fetches."""


@dataclass(frozen=True)
class Fault:
    at: float
    """Seconds since the run's begin; the fault waits for its moment from then on."""
    kind: str
    places: tuple[str, ...] = ()
    """Who is hit: one; the two ends of a link; or those cut off from all the others. None: the lighthouse."""
    moment: str = NOW
    lasts: float = 0.0
    """Seconds until it is undone; of a restart: until it begins."""
    renamed: bool = False
    """It comes back as a region of another name."""
    after: float = 0.0
    """Seconds after the moment: what follows takes a few hops."""

    @property
    def restarts(self) -> bool:
        return self.kind in RESTARTS

    def __str__(self) -> str:
        where = "-".join(self.places)
        lasting = f" for {self.lasts:.1f} s" if self.lasts else ""
        after = f" + {self.after * 1e3:.0f} ms" if self.after else ""
        return f"{self.kind} {where} at {self.moment}{after}{lasting}{', then renamed' if self.renamed else ''}"


def schedule(seed: int, seconds: float, places: Sequence[str], gap: float, restarts: int) -> list[Fault]:
    """Faults in the order of their times, all over before `seconds`. gap: mean seconds between two; restarts: how many of
    them may restart something."""
    return _Dealer(Random(seed), seconds, list(places), gap, restarts).deal()


class _Dealer:
    def __init__(self, random: Random, seconds: float, places: list[str], gap: float, restarts: int) -> None:
        self.random, self.seconds, self.places, self.gap, self.restarts = random, seconds, places, gap, restarts
        self.busy: dict[str, float] = {}
        """Place -> until when a fault touches it."""
        self.links_busy = 0.0
        """One fault of links at a time: the end of one must not undo another."""
        self.lighthouse_busy = 0.0
        self.faults: list[Fault] = []
        self.deck: list[str] = []

    def deal(self) -> list[Fault]:
        now = 0.0
        while (now := now + self.gap * self.random.uniform(0.5, 1.5)) < self.seconds:
            fault = self._fault(now, self._card(now))
            if fault is not None and fault.moment != NOW:
                fault = replace(fault, after=self.random.choice([0.0, self.random.uniform(0.0, LATER)]))
            if fault is not None and fault.at + fault.lasts < self.seconds:
                self._add(fault)
                if fault.kind in (KILL, LEAVE) and self.random.random() < CHASED:
                    self._chase(fault)
        return sorted(self.faults, key=lambda fault: fault.at)

    def _card(self, now: float) -> str:
        """The next kind that is possible now; FREEZE where none is."""
        if len(self.deck) < len(DECK):
            self.deck += self.random.sample(DECK, len(DECK))
        for i, kind in enumerate(self.deck):
            if self._possible(kind, now):
                return self.deck.pop(i)
        return FREEZE

    def _possible(self, kind: str, now: float) -> bool:
        if kind in RESTARTS and self.restarts <= 0:
            return False
        if kind == LIGHTHOUSE:
            return now >= self.lighthouse_busy
        if kind in LINKS and now < self.links_busy:
            return False
        return self._spare(now) >= (2 if kind == PARTITION and len(self.places) > 3 else 1)

    def _free(self, now: float) -> list[str]:
        return [place for place in self.places if self.busy.get(place, 0.0) <= now]

    def _spare(self, now: float) -> int:
        """How many more places may be touched."""
        return len(self._free(now)) - UNHARMED

    def _fault(self, now: float, kind: str) -> Fault | None:
        random, free = self.random, self._free(now)
        if kind == LIGHTHOUSE:
            return Fault(now, kind, lasts=random.uniform(0.5, 8.0))
        if self._spare(now) < 1:
            return None
        moment = random.choice(MOMENTS)
        # The lowest member stores and appends: the most to break between held and commit.
        place = free[0] if moment == HELD and random.random() < 0.6 else random.choice(free)
        if kind == FREEZE:
            return Fault(now, kind, (place,), moment, random.choice([1.0, 3.0, 7.0, 12.0]) * random.uniform(0.7, 1.3))
        if kind == CUT:
            other = random.choice([p for p in self.places if p != place])
            return Fault(now, kind, (place, other), moment, random.uniform(2.0, 15.0))
        if kind == PARTITION:
            count = random.randint(1, min(self._spare(now), len(self.places) // 2))
            return Fault(now, kind, tuple(random.sample(free, count)), moment, random.uniform(4.0, 20.0))
        if kind == SLOW:
            return Fault(now, kind, (place,), moment, random.uniform(4.0, 12.0))
        renamed = kind == LEAVE and sum(fault.kind == LEAVE for fault in self.faults) % 2 == 0  # every second time
        return Fault(now, kind, (place,), moment, 0.0 if kind in (RANK, HELPER) else random.uniform(0.5, 4.0), renamed)

    def _chase(self, first: Fault) -> None:
        """While who comes back fetches: it is killed or frozen, or another one that it fetches from, or its link."""
        joiner = first.places[0]
        others = [place for place in self._free(first.at) if place != joiner]
        kind = self.random.choice([KILL, FREEZE, CUT])
        if kind == KILL and self.restarts <= 0:
            kind = FREEZE
        at = first.at + first.lasts + 0.5
        target = joiner
        if len(others) > UNHARMED:
            target = self.random.choice([joiner, self.random.choice(others)])
        if kind == CUT:
            if at < self.links_busy or not others:
                return
            fault = Fault(at, kind, (joiner, self.random.choice(others)), FETCH, self.random.uniform(2.0, 8.0))
        else:
            fault = Fault(at, kind, (target,), FETCH, self.random.uniform(0.5, 4.0))
        if fault.at + fault.lasts < self.seconds:
            self._add(fault)

    def _add(self, fault: Fault) -> None:
        self.faults.append(fault)
        self.restarts -= fault.restarts
        end = fault.at + fault.lasts + RECOVERY.get(fault.kind, AFTERWARDS)
        if fault.kind == LIGHTHOUSE:
            self.lighthouse_busy = end
        if fault.kind in LINKS:
            self.links_busy = fault.at + fault.lasts + AFTERWARDS
        for place in fault.places[:1] if fault.kind == CUT else fault.places:
            self.busy[place] = max(self.busy.get(place, 0.0), end)
