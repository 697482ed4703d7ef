"""One attempt of an exchange at one rank: what it owes, what it is owed, and what has come. No thread and no socket of its
own: links deliver frames to it and take parcels from it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic.links import Frame, Link, Parcel, Rank
from elastic.memory import shared_zeros
from elastic.order import Arithmetic, Contribution, Order, Outcome
from elastic.plan import cells, chunks, rank_blocks
from elastic.side import Side
from elastic.wire import Message, WireError

CHUNK = 256 << 10
"""Bytes of a message, about: every stream carries one at a time, so a chunk is complete, and its sum can be on its way, after
as many chunks as there are streams."""
LEAST_CHUNKS = 16
"""That a rank has for another one at least, as far as blocks allow: of a small fragment, too, all streams are to have some until
the end."""
MAX_CHUNK = 64
"""Blocks in a message at most, of a codec that makes very little of them."""
WINDOW = 32 << 20
"""Bytes of one peer rank's parts that may be on their way or wait here for other members' parts."""
TICK = 0.05
"""Seconds between two looks at rates and deadlines."""
LAPSE = 1.0
"""Seconds without a look after which this process itself was stopped, or starved: what came meanwhile is not read yet, so
nobody's silence counts that began before."""


class Cancelled(Exception):
    """The attempt has failed, or was given up by rank 0."""


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
        self.received = 0
        """Bytes of parts and sums."""
        self.parts: dict[int, dict[int, Tensor]] = {}
        """First block of a chunk that this rank reduces -> member -> part."""
        self.held = self.peak = 0
        """Bytes of parts that wait for others', now and at most."""
        self.squares = [0.0] * len(order.parties)
        """Sum of the squares of each member's parts that this rank has reduced."""
        self.over = False
        """It has ended, one way or the other."""
        self.whole: deque[int] = deque()
        """Chunks of which every other member's part is there."""
        self.begun = self._look_at = self._looked = time.monotonic()
        self._lay_out()

    def _lay_out(self) -> None:
        """Who owes whom which chunks."""
        order, me = self.order, self.order.me
        fragment, members = order.key[1], len(order.parties)
        self.blocks = self.arithmetic.blocks(fragment)
        self.first, self.last = rank_blocks(self.blocks, self.rank, len(order.parties[me].endpoints))
        worlds = [len(p.endpoints) for p in order.parties]
        mine = [c for c in cells(self.blocks, worlds, order.shares) if c.ranks[me] == self.rank]
        even = self.arithmetic.size(fragment, 0, self.blocks) / (members * max(worlds) * LEAST_CHUNKS)
        self.chunk = min(max(round(min(CHUNK, even) / self.arithmetic.size(fragment, 0, 1)), 1), MAX_CHUNK)
        """Blocks in a message, everywhere the same."""
        self.others = [k for k in range(members) if k != me]
        size = self.arithmetic.size(fragment, 0, min(self.chunk, self.blocks))
        self.window = max(WINDOW // size, 1)
        """Parts of a peer rank that may be on their way or wait here."""
        pairs = {(k, c.ranks[k]) for c in mine for k in self.others}
        self.sides = {self._peer(k, rank): Side(k, size, self.stall, self.begun) for k, rank in sorted(pairs)}
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
                        self.sides[self._peer(k, cell.ranks[k])].sums += not self.arithmetic.gathers
        self.due = {a: set(self.others) for a, k in self.owner.items() if k == me}
        """Chunks that this rank reduces -> members whose part has not come."""
        for peer in (peer for a in self.due for peer in self.peers[a]):
            self.sides[peer].expected += 1
        self.missing = {a for a, k in self.owner.items() if k != me}
        """Chunks of the result that other members still owe."""
        self.result = shared_zeros(self.result_size(self.first, self.last), torch.uint8)
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

    # Sending

    def open(self, peer: Rank, link: Link) -> None:
        """From now on this attempt talks to `peer`: it allows it its first parts, and sends its own first ones."""
        with self.changed:
            if link.broken:
                self.fail(frozenset([peer[0]]), f"the exchange with {peer[0]} broke: {link.broken}")
            if self.failed is not None:
                return link.put(self._farewell(self.failed))
            if self.over:
                return  # the two had nothing to exchange
            side = self.sides[peer]
            side.open(link)
            self._allow(side)
            self._send_parts(side)

    def _allow(self, side: Side) -> None:
        """Lets the peer send on once a good part of its window is free."""
        upto = side.reduced + self.window
        if upto - side.allowed >= max(self.window // 4, 1):
            side.allowed, side.allowed_at = upto, time.monotonic()
            self._put(side, lambda: ({"type": "credit", "attempt": self.order.attempt, "parts": upto}, b""))

    def _send_parts(self, side: Side) -> None:
        while side.queued < min(side.granted, len(side.parts)):
            self._put(side, partial(self._part_frame, *side.parts[side.queued]))
            side.queued += 1

    def pass_on(self, first: int) -> None:
        """A chunk is reduced: its sum goes to the others, and their window moves."""
        last = self.end[first]
        with self.changed:
            for side in (self.sides[peer] for peer in self.peers[first]):
                if not self.arithmetic.gathers:
                    self._put(side, partial(self._frame, "sum", first, last, self.cut(first, last)))
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

    def _put(self, side: Side, build: Callable[[], Frame | None]) -> None:
        def unless_failed() -> Frame | None:
            try:
                return None if self.failed is not None else build()
            except Exception as error:  # a bug: the attempt ends, the stream does not
                self.fail(frozenset(), f"the exchange broke: {error!r}")
                return None

        side.put(unless_failed, self._gone)

    def _gone(self, side: Side, nbytes: int) -> None:
        with self.changed:
            side.sent += nbytes
            side.unsent -= 1
            side.moved_at = time.monotonic()
            if not side.unsent:
                self.changed.notify_all()

    @property
    def sent(self) -> int:
        """Bytes, frames included."""
        return sum(side.sent for side in self.sides.values())

    @property
    def unsent(self) -> int:
        """Frames that are with the links."""
        return sum(side.unsent for side in self.sides.values())

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
                side.granted = max(side.granted, int(message["parts"]))
                side.pay_back()
                self._send_parts(side)
            elif kind == "part":
                self._part(peer, side, message["first"], payload)
            elif kind == "sum":
                self._sum(peer, side, message["first"], payload)
            else:
                raise WireError("a frame of no known kind")
            self.received += len(payload)
            side.received += len(payload)
            side.progress_at = time.monotonic()
            if side.link is not None:
                side.link.newest = max(side.link.newest, self.begun)
            self.changed.notify_all()

    def _part(self, peer: Rank, side: Side, first: Any, payload: bytearray) -> None:
        due = self.due.get(first, set()) if type(first) is int else set()
        if side.member not in due or peer not in self.peers[first] or len(payload) != self.part_size(first):
            raise WireError("a part that the sender does not owe")
        if not side.may_send:
            raise WireError("a part that the sender was not allowed yet")
        due.discard(side.member)
        side.came += 1
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
        side.sums -= 1

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
            for side in self.sides.values():
                if side.link is not None:
                    side.link.put(self._farewell(self.failed))

    def _farewell(self, failed: Outcome) -> Parcel:
        message = {"type": "failed", "attempt": self.order.attempt, "suspects": sorted(failed.suspects)}
        return Parcel(lambda: (message, b""), lambda nbytes: None)

    def close(self) -> None:
        """Lets go of the links."""
        with self.changed:
            self.over = True
            for side in self.sides.values():
                side.close()

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
        now = time.monotonic()
        lapsed, self._looked = now - self._looked > LAPSE, now
        if lapsed:
            for side in self.sides.values():
                side.awake = now
        if late := self._late(now):
            seconds = max(now - max(self.begun, side.progress_at) for side in late)
            members = frozenset(self.order.parties[side.member].member for side in late)
            self.fail(members, f"no progress with {', '.join(sorted(members))} for {seconds:.1f} s")

    def pause(self, seconds: float) -> None:
        """Raises Cancelled if the attempt fails meanwhile."""
        with self.changed:
            if self.changed.wait_for(lambda: self.failed is not None, seconds):
                raise Cancelled

    def _late(self, now: float) -> list[Side]:
        """Who owes parts and may send them, and has been silent for too long. Sums may wait for a third one's parts: only if
        nobody owes parts is it who owes sums, after much longer. At last, who does not take what is sent."""
        owing = [side for side in self.sides.values() if side.owes_parts]
        if owing:
            return [side for side in owing if side.may_send and side.late(now, side.patience())]
        if owing := [side for side in self.sides.values() if side.sums]:
            return [side for side in owing if side.late(now, 2 * self.stall)]
        return [side for side in self.sides.values() if side.blocked(now)]
