"""One attempt of an exchange at one rank: what it owes, what it is owed, and what has come. No thread and no socket of its
own: links deliver frames to it and take parcels from it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from elastic.links import EARLY, Frame, Link, Parcel, Rank
from elastic.plan import cells, chunks, rank_blocks
from elastic.wire import Message, WireError

Key = tuple[int, int, int]
"""(epoch, fragment, base): what a contribution was made for."""

CHUNK = 128 << 10
"""Bytes of a message, about: every stream carries one at a time, so a chunk is complete, and its sum can be on its way, after
as many chunks as there are streams."""
MAX_CHUNK = 64
"""Blocks in a message at most, of a codec that makes very little of them."""
WINDOW = 32 << 20
"""Bytes of one peer rank's parts that may be on their way or wait here for other members' parts."""
TICK = 0.05
"""Seconds between two looks at rates and deadlines."""
PATIENCE = 3.0
"""Seconds of silence that are nothing special on any link: a few retransmissions, a busy machine."""
LATE = 8
"""So many times longer than the measured rate lets expect may a chunk take."""


class Contribution(Protocol):
    """A rank's contribution to a round."""

    def read(self, first: int, last: int) -> Tensor:
        """The encoded bytes (uint8) of the blocks [first, last): encoded when first asked for, by any thread, the same
        ever after. Raises FloatingPointError on what must not leave the region."""
        ...


class Arithmetic(Protocol):
    """What the exchange needs to know of fragments and codecs."""

    @property
    def gathers(self) -> bool:
        """Contributions are not reduced: the result is all of them."""
        ...

    def blocks(self, fragment: int) -> int: ...
    def size(self, fragment: int, first: int, last: int) -> int:
        """Encoded bytes of the blocks [first, last)."""
        ...

    def result_size(self, fragment: int, first: int, last: int, members: int) -> int:
        """The same of a result."""
        ...

    def reduce(self, fragment: int, first: int, last: int, parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The result for these blocks from the members' parts (uint8), in the order given. Raises NotFinite."""
        ...

    def digests(self, fragment: int, first: int, last: int, data: Tensor, members: int) -> bytes:
        """32 bytes a block of a result."""
        ...


@dataclass(frozen=True)
class Party:
    """A member of an attempt: its weight, and the endpoints of its ranks."""

    member: str
    endpoints: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class Order:
    """What to exchange; the same for all members of the attempt but for `me`."""

    attempt: str
    key: Key
    parties: tuple[Party, ...]
    shares: tuple[int, ...]
    """Of the blocks that each member reduces: `elastic.plan.ownership`."""
    me: int

    def message(self) -> Message:
        parties = [[p.member, list(p.endpoints), p.weight] for p in self.parties]
        fields = {"key": list(self.key), "parties": parties, "shares": list(self.shares), "me": self.me}
        return {"type": "start", "attempt": self.attempt, **fields}


def parse_order(message: Message) -> Order:
    epoch, fragment, base = message["key"]
    parties = tuple(Party(m, tuple(e), float(w)) for m, e, w in message["parties"])
    return Order(message["attempt"], (epoch, fragment, base), parties, tuple(message["shares"]), message["me"])


@dataclass
class Outcome:
    """How an attempt ended at this rank. digests: of the result's blocks in this rank's slice, None if it failed."""

    attempt: str
    digests: bytes | None
    suspects: frozenset[str] = frozenset()
    reason: str = ""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    """From the start to the whole result."""
    up: float = 0.0
    down: float = 0.0
    """The rates, bytes/s, that this rank's links have been seen to carry; 0: not known."""


class Cancelled(Exception):
    """The attempt has failed, or was given up by rank 0."""


@dataclass
class Side:
    """This rank's dealings with one rank of another member in one attempt."""

    member: int
    parts: list[tuple[int, int]] = field(default_factory=list)
    """Chunks that the peer reduces, in the order in which they are sent."""
    queued: int = 0
    """How many of them are with the link."""
    granted: int = 0
    """How many of them the peer lets us send."""
    reduced: int = 0
    """How many chunks of ours that need its part are done."""
    allowed: int = 0
    """How many parts we let it send."""
    received: int = 0
    """Bytes of parts and sums."""
    link: Link | None = None


class Attempt:
    """Bounded memory: besides the contribution and the result, each the encoded size of the rank's slice, at most `WINDOW`
    bytes of parts for every peer rank: a peer sends as many parts as it was granted, and is granted more as chunks that
    needed them are reduced."""

    def __init__(
        self, order: Order, rank: int, arithmetic: Arithmetic, contribution: Contribution, stall: float
    ) -> None:
        self.order, self.rank, self.stall = order, rank, stall
        self.arithmetic, self.contribution = arithmetic, contribution
        self.changed = threading.Condition()
        self.failed: Outcome | None = None
        self.received = self.sent = self.unsent = 0
        self.parts: dict[int, dict[int, Tensor]] = {}
        """First block of a chunk that this rank reduces -> member -> part."""
        self.held = self.peak = 0
        """Bytes of parts that wait for others', now and at most."""
        self.silent: list[Link] = []
        """Whose silence ended this attempt."""
        self.whole: deque[int] = deque()
        """Chunks of which every other member's part is there."""
        self.begun = self._look_at = time.monotonic()
        self._lay_out()

    def _lay_out(self) -> None:
        """Who owes whom which chunks."""
        order, me = self.order, self.order.me
        fragment, members = order.key[1], len(order.parties)
        self.blocks = self.arithmetic.blocks(fragment)
        self.first, self.last = rank_blocks(self.blocks, self.rank, len(order.parties[me].endpoints))
        worlds = [len(p.endpoints) for p in order.parties]
        mine = [c for c in cells(self.blocks, worlds, order.shares) if c.ranks[me] == self.rank]
        self.chunk = min(max(round(CHUNK / self.arithmetic.size(fragment, 0, 1)), 1), MAX_CHUNK)
        """Blocks in a message."""
        self.others = [k for k in range(members) if k != me]
        self.sides = {self._peer(k, c.ranks[k]): Side(k) for c in mine for k in self.others}
        self.end: dict[int, int] = {}
        self.peers: dict[int, list[Rank]] = {}
        """First block of any chunk in this slice -> the other members' ranks that have it, too."""
        self.owner: dict[int, int] = {}
        for cell in mine:
            ranks = [self._peer(k, cell.ranks[k]) for k in self.others]
            for k in range(members):
                whole = (cell.first, cell.last) if self.arithmetic.gathers else cell.owned(k)
                for a, b in chunks(*whole, self.chunk):
                    self.end[a], self.peers[a] = b, ranks
                    self.owner[a] = me if self.arithmetic.gathers else k
                    if k != me:
                        self.sides[self._peer(k, cell.ranks[k])].parts.append((a, b))
        self.due = {a: set(self.others) for a, k in self.owner.items() if k == me}
        """Chunks that this rank reduces -> members whose part has not come."""
        self.missing = {a for a, k in self.owner.items() if k != me}
        """Chunks of the result that other members still owe."""
        self.result = torch.empty(self.result_size(self.first, self.last), dtype=torch.uint8)
        self.whole.extend(a for a in self.due if not self.others)

    def _peer(self, member: int, rank: int) -> Rank:
        return self.order.parties[member].member, rank

    def result_size(self, first: int, last: int) -> int:
        return self.arithmetic.result_size(self.order.key[1], first, last, len(self.order.parties))

    def cut(self, first: int, last: int) -> Tensor:
        """The result's bytes of blocks [first, last)."""
        begin = self.result_size(self.first, first)
        return self.result[begin : begin + self.result_size(first, last)]

    def part_size(self, first: int) -> int:
        return self.arithmetic.size(self.order.key[1], first, self.end[first])

    @property
    def window(self) -> int:
        """Parts of a peer rank that may be on their way or wait here."""
        return max(WINDOW // self.chunk_size, 1)

    @property
    def chunk_size(self) -> int:
        """Encoded bytes of a chunk that is not a cell's last."""
        return self.arithmetic.size(self.order.key[1], 0, min(self.chunk, self.blocks))

    # Sending

    def open(self, links: dict[Rank, Link]) -> None:
        """From now on this attempt talks: it grants every peer its first parts, and sends its own first ones."""
        for peer, side in self.sides.items():
            side.link = links[peer]
            self._allow(side)
            self._grant(side, max(EARLY // self.chunk_size, 1))

    def _allow(self, side: Side) -> None:
        """Lets the peer send on once a good part of its window is free."""
        upto = side.reduced + self.window
        if side.link is not None and upto - side.allowed >= max(self.window // 4, 1):
            side.allowed = upto
            self._put(side.link, lambda: ({"type": "credit", "attempt": self.order.attempt, "parts": upto}, b""))

    def _grant(self, side: Side, upto: int) -> None:
        side.granted = max(side.granted, upto)
        while side.link is not None and side.queued < min(side.granted, len(side.parts)):
            self._put(side.link, partial(self._part_frame, *side.parts[side.queued]))
            side.queued += 1

    def pass_on(self, first: int) -> None:
        """A chunk is reduced: its sum goes to the others, and their window moves."""
        last = self.end[first]
        for peer in self.peers[first]:
            side = self.sides[peer]
            assert side.link is not None
            if not self.arithmetic.gathers:
                self._put(side.link, partial(self._frame, "sum", first, last, self.cut(first, last)))
            with self.changed:
                side.reduced += 1
                self._allow(side)

    def _part_frame(self, first: int, last: int) -> Frame | None:
        data = self._read(first, last)
        return None if data is None else self._frame("part", first, last, data)

    def _read(self, first: int, last: int) -> Tensor | None:
        """Of the own contribution; None if that must not leave the region, which is the attempt's end."""
        try:
            return self.contribution.read(first, last)
        except FloatingPointError as error:
            self.fail(frozenset(), str(error))
            return None

    def _frame(self, kind: str, first: int, last: int, data: Tensor) -> Frame:
        message = {"type": kind, "attempt": self.order.attempt, "first": first, "last": last}
        return message, data.numpy().data

    def _put(self, link: Link, build: Callable[[], Frame | None]) -> None:
        def unless_failed() -> Frame | None:
            return None if self.failed is not None else build()

        with self.changed:
            self.unsent += 1
        link.put(Parcel(unless_failed, self._count))

    def _count(self, nbytes: int) -> None:
        with self.changed:
            self.sent += nbytes
            self.unsent -= 1
            if not self.unsent:
                self.changed.notify_all()

    # Receiving

    def handle(self, peer: Rank, message: Message, payload: bytearray) -> None:
        """A frame of this attempt. Raises WireError if it is not one that `peer` owes this rank."""
        kind, side = message["type"], self.sides.get(peer)
        if side is None:
            raise WireError("a frame of an attempt that the sender is not part of")
        if kind == "failed":  # says whom it waited for in vain: not itself
            members = {party.member for party in self.order.parties}
            suspects = frozenset(map(str, message["suspects"])) & members
            return self.fail(suspects, f"{peer[0]} gave up on {', '.join(sorted(suspects)) or 'the attempt'}")
        with self.changed:
            if kind == "credit":
                self._grant(side, int(message["parts"]))
            elif kind == "part":
                self._part(peer, side, message["first"], payload)
            elif kind == "sum":
                self._sum(peer, side, message["first"], payload)
            else:
                raise WireError("a frame of no known kind")
            self.received += len(payload)
            side.received += len(payload)
            self.changed.notify_all()

    def _part(self, peer: Rank, side: Side, first: Any, payload: bytearray) -> None:
        due = self.due.get(first, set()) if type(first) is int else set()
        if side.member not in due or peer not in self.peers[first] or len(payload) != self.part_size(first):
            raise WireError("a part that the sender does not owe")
        due.discard(side.member)
        self.parts.setdefault(first, {})[side.member] = torch.frombuffer(payload, dtype=torch.uint8)
        self.held += len(payload)
        self.peak = max(self.peak, self.held)
        if not due:
            self.whole.append(first)

    def _sum(self, peer: Rank, side: Side, first: Any, payload: bytearray) -> None:
        owed = type(first) is int and first in self.missing and self.owner[first] == side.member
        if not owed or peer not in self.peers[first] or len(payload) != len(self.cut(first, self.end[first])):
            raise WireError("a sum that the sender does not owe")
        self.cut(first, self.end[first]).copy_(torch.frombuffer(payload, dtype=torch.uint8))
        self.missing.discard(first)

    def next_whole(self, tick: Callable[[], None]) -> tuple[int, list[Tensor]]:
        """A chunk to reduce and its parts in member order. Raises Cancelled."""
        self.wait(lambda: bool(self.whole), tick)
        with self.changed:
            first = self.whole.popleft()
            parts = self.parts.pop(first, {})
            self.held -= sum(part.numel() for part in parts.values())
        own = self._read(first, self.end[first])
        if own is None:
            raise Cancelled
        del self.due[first]
        return first, [own if k == self.order.me else parts[k] for k in range(len(self.order.parties))]

    # Waiting and failing

    def fail(self, suspects: frozenset[str], reason: str) -> None:
        """Ends the attempt here, and tells the others, unless it has ended."""
        with self.changed:
            if self.failed is not None:
                return
            self.failed = Outcome(self.order.attempt, None, suspects, reason)
            self.changed.notify_all()
        message = {"type": "failed", "attempt": self.order.attempt, "suspects": sorted(suspects)}
        for side in self.sides.values():
            if side.link is not None:
                side.link.put(Parcel(lambda: (message, b""), lambda nbytes: None))

    def wait(self, ready: Callable[[], bool], tick: Callable[[], None] | None = None) -> None:
        """Until `ready`. Raises Cancelled once the attempt has failed, for instance of a peer's silence."""
        with self.changed:
            while self.failed is None and not ready():
                self.changed.wait(TICK)
                if time.monotonic() >= self._look_at:
                    self._look_at = time.monotonic() + TICK
                    self._look()
                    if tick is not None:
                        tick()
            if self.failed is not None:
                raise Cancelled

    def _look(self) -> None:
        if late := self._late(time.monotonic()):
            self.silent = [side.link for side in late if side.link is not None]
            seconds = max(self.patience(side) for side in late)
            members = frozenset(self.order.parties[side.member].member for side in late)
            self.fail(members, f"nothing came from {', '.join(sorted(members))} for {seconds:.1f} s")

    def pause(self, seconds: float) -> None:
        """Raises Cancelled if the attempt fails meanwhile."""
        with self.changed:
            if self.changed.wait_for(lambda: self.failed is not None, seconds):
                raise Cancelled

    def patience(self, side: Side) -> float:
        """Seconds of silence after which a peer rank is given up: what a chunk takes at its measured rate, many times."""
        if side.link is None or not side.link.rate:
            return self.stall
        return min(PATIENCE + LATE * self.chunk_size / side.link.rate, self.stall)

    def _late(self, now: float) -> list[Side]:
        """Who has been silent for too long and owes parts; sums may wait for a third one's parts, so only if nobody owes
        parts is it who owes sums, after as long again."""
        owing = {k for due in self.due.values() for k in due}
        late = [side for side in self.sides.values() if side.member in owing and self._silent(side, now, 1)]
        if late or owing:
            return late
        owing = {self.owner[a] for a in self.missing}
        return [side for side in self.sides.values() if side.member in owing and self._silent(side, now, 2)]

    def _silent(self, side: Side, now: float, times: int) -> bool:
        return side.link is not None and now - max(side.link.heard, self.begun) > times * self.patience(side)
