"""This rank's dealings with one rank of another member in one attempt: what is owed each way, what may be sent, and how long
silence is borne."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from elastic.links import EARLY, Frame, Link, Parcel

PATIENCE = 3.0
"""Seconds of silence that are nothing special on any link: a few retransmissions, a busy machine."""
LATE = 8
"""So many times longer than the measured rate lets expect may a chunk take."""
STUCK = 4
"""So many stall times may pass without progress of an attempt on a link that is alive with later ones."""


@dataclass
class Side:
    member: int
    """Index in the order's parties."""
    chunk: int
    """Encoded bytes of a chunk."""
    stall: float
    begun: float
    """Monotonic time at which the attempt began."""
    parts: list[tuple[int, int]] = field(default_factory=list)
    """Chunks that the peer reduces, in the order in which they are sent."""
    queued: int = 0
    """How many of them are with the link."""
    granted: int = 0
    """How many of them the peer lets us send."""
    lent: int = 0
    """Bytes of them that go out before it said so."""
    expected: int = 0
    """Parts that the peer owes this rank."""
    came: int = 0
    """How many of them are here."""
    allowed: int = 0
    """How many of them it may send."""
    reduced: int = 0
    """How many of them have been used."""
    sums: int = 0
    """Chunks of the result that it owes still."""
    received: int = 0
    """Bytes of parts and sums."""
    sent: int = 0
    unsent: int = 0
    """Parcels that are with the link."""
    allowed_at: float = 0.0
    awake: float = 0.0
    """Since when this process has been able to hear."""
    progress_at: float = 0.0
    """When a frame of this attempt came last; 0: none yet."""
    moved_at: float = 0.0
    """When a frame of this attempt had gone last."""
    link: Link | None = None
    waiting: list[Parcel] = field(default_factory=list)
    """What there is to send before the link stands."""

    @property
    def outgoing(self) -> int:
        """Bytes to send, about: parts, and sums of what the peer sends parts of."""
        return (len(self.parts) + self.expected) * self.chunk

    @property
    def early(self) -> int:
        """Parts that may come before they are allowed."""
        return EARLY // self.chunk

    def put(self, build: Callable[[], Frame | None], sent: Callable[[Side, int], None]) -> None:
        parcel = Parcel(build, lambda nbytes: sent(self, nbytes))
        self.unsent += 1
        if self.link is None:
            self.waiting.append(parcel)
        else:
            self.link.put(parcel)

    def open(self, link: Link) -> None:
        """The link stands: what waited for it goes, and as many parts as need not wait for the peer's word."""
        self.link = link
        for parcel in self.waiting:
            link.put(parcel)
        self.waiting.clear()
        lent = link.lend(self.chunk * min(len(self.parts), self.early))
        self.lent = lent - lent % self.chunk
        link.pay_back(lent - self.lent)
        self.granted = max(self.granted, self.lent // self.chunk)

    def close(self) -> None:
        """The attempt has ended: nothing of it holds on to the link, nor the link to it."""
        self.pay_back()
        self.link = None
        self.waiting.clear()

    def pay_back(self) -> None:
        if self.link is not None and self.lent:
            self.link.pay_back(self.lent)
            self.lent = 0

    # Deadlines

    def patience(self) -> float:
        """Seconds of silence after which the peer is given up: what a chunk takes at its measured rate, many times. Before
        its first word in this attempt, when it may still be about to begin, the whole stall time."""
        if self.link is None or not self.link.rate or not self.progress_at:
            return self.stall
        return min(PATIENCE + LATE * self.chunk / self.link.rate, self.stall)

    def late(self, now: float, patience: float) -> bool:
        """Whether the peer, which owes us something, has been silent for longer than `patience`; or, for much longer, in this
        attempt, although it has turned to later ones."""
        since = max(self.begun, self.allowed_at, self.awake)
        if self.link is None:
            return now - since > patience + self.stall
        passed_over = self.link.newest > self.begun and now - max(since, self.progress_at) > STUCK * self.stall
        return passed_over or now - max(since, self.link.heard) > patience

    def blocked(self, now: float) -> bool:
        """Whether the peer has not taken anything for the stall time, with something to take."""
        return bool(self.unsent) and now - max(self.begun, self.moved_at, self.awake) > self.stall

    @property
    def owes_parts(self) -> bool:
        return self.came < self.expected

    @property
    def may_send(self) -> bool:
        return self.came < max(self.allowed, self.early)
