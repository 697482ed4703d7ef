"""What tests/explore.py explores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """What is explored: all interleavings of at most so many faults of each kind."""

    name: str
    members: tuple[str, ...] = ("a", "b")
    fragments: int = 1
    rounds: int = 1
    """Of each fragment; then the run is over."""
    spare: tuple[str, ...] = ()
    """Members that join later. The region is the first letter, so `b2` is b restarted with its memory lost."""
    crashes: int = 0
    joins: int = 0
    cuts: int = 0
    """Links that break, with what is under way on them."""
    partitions: int = 0
    """A member loses all its links at once."""
    losses: int = 0
    repeats: int = 0
    """Messages that arrive twice, the second time behind all others."""
    stalls: int = 0
    """Exchanges that end for no reason that the others share, with another member blamed for it, or nobody."""
    unknown: int = 0
    """Creates without an answer: carried out, not carried out, or carried out some time later."""
    early: int = 0
    """Alarms for what is late that ring although it only is slow."""
    delays: int | None = None
    """How often something else may happen first than what a fair schedule has next; None: always, all interleavings."""
    lag: bool = False
    """The main loop takes its time to apply what its coordinator has read."""
    slow_reads: bool = False
    """Other members may act between the wish to read the journal and the reading."""
    ready: bool = False
    """All members reach their first boundary before any message arrives: three rival proposals."""
    highest: int = 6
    """Proposals with a higher number are not followed further (but must still come to an end under fair delivery)."""

    @property
    def faults(self) -> tuple[int, ...]:
        return tuple(getattr(self, kind) or 0 for kind in KINDS)


KINDS = ("crashes", "joins", "cuts", "partitions", "losses", "repeats", "stalls", "unknown", "early", "delays")


TWO, THREE = ("a", "b"), ("a", "b", "c")
SCENARIOS = (
    # All interleavings
    Scenario("2 members, 2 rounds", TWO, rounds=2, lag=True),
    Scenario("2 members, messages lost and twice", TWO, losses=2, repeats=1, early=2),
    Scenario("2 members, crash, lost and repeated", TWO, crashes=1, losses=1, repeats=1, early=1),
    Scenario("2 members, crash and unknown creates", TWO, crashes=1, unknown=2, lag=True, slow_reads=True),
    Scenario("2 members, exchanges fail twice", TWO, stalls=2, unknown=1),
    Scenario("2 members, link breaks", TWO, cuts=1),
    Scenario("3 members", THREE),
    Scenario("3 members, a message lost", THREE, losses=1, ready=True),
    # All places for faults, and all schedules that differ so often from a fair one
    Scenario("2 members, 2 fragments, crash", TWO, fragments=2, crashes=1, delays=2),
    Scenario("2 members, 2 fragments, all kinds once", TWO, fragments=2, losses=1, unknown=1, stalls=1, delays=0),
    Scenario("2 members, crash and restart", TWO, spare=("b2",), crashes=1, joins=1, delays=1),
    Scenario("2 members and a joiner", TWO, spare=("c",), joins=1, unknown=1, delays=1),
    Scenario("3 members, crash, failing exchange", THREE, crashes=1, stalls=1, delays=0),
    Scenario("3 members, two crashes", THREE, crashes=2, delays=0),
    Scenario("3 members, partition", THREE, partitions=1, delays=1),
    Scenario("3 members, 2 fragments, crash", THREE, fragments=2, crashes=1, delays=0),
)
"""Under a minute of CPU together, about 120,000 states."""

LARGER = (
    Scenario("2 members, crash and restart, all interleavings", TWO, spare=("b2",), crashes=1, joins=1),
    Scenario("2 members, 2 fragments, crash, all interleavings", TWO, fragments=2, crashes=1),
    Scenario("2 members, exchanges fail three times", TWO, stalls=3),
    Scenario("3 members, crash, all interleavings", THREE, crashes=1, ready=True),
    Scenario("3 members, two partitions", THREE, partitions=2, delays=0),
    Scenario(
        "3 members, 2 fragments, crash and restart", THREE, fragments=2, spare=("a2",), crashes=1, joins=1, delays=0
    ),
)
"""Minutes each."""

STORM = Scenario(
    "a storm", THREE, spare=("b2", "a2", "d", "b3", "c2", "a3"), fragments=2, rounds=12, lag=True, slow_reads=True,
    crashes=6, joins=6, cuts=30, partitions=10, losses=60, repeats=60, stalls=40, unknown=50, early=10**6,
)  # fmt: skip
"""For `walk`."""
