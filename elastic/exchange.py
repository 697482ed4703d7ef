"""One rank's part of an exchange: reduce-scatter of encoded contributions to block owners, all-gather of the result.

An owner decodes the members' contributions, averages them in member order and encodes the result once; everyone, the
owner included, uses those bytes, so all members end with the same bits. A rank talks to the ranks of the other
regions whose slices overlap its own, in parallel, over a connection per attempt.
Memory: own contribution + received parts (at most one slice) + result, each the encoded size of the rank's slice.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from elastic.node import Node
from elastic.plan import Cell, cells, chunks, rank_blocks
from elastic.wire import Connection, Message, WireError

Key = tuple[int, int, int]
"""(epoch, fragment, base): what a contribution was made for."""

START_PATIENCE = 30.0
"""Seconds that an early data connection waits for the attempt that it belongs to."""


class Arithmetic(Protocol):
    """What the exchange needs to know of fragments and codecs."""

    def blocks(self, fragment: int) -> int: ...
    def size(self, fragment: int, first: int, last: int) -> int:
        """Encoded bytes of the blocks [first, last)."""
        ...

    def reduce(self, fragment: int, first: int, last: int, parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Decodes the parts (uint8), averages them by weight in the order given, encodes the mean."""
        ...

    def digests(self, fragment: int, first: int, last: int, data: Tensor) -> bytes:
        """32 bytes a block of encoded data."""
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
    me: int

    def message(self) -> Message:
        parties = [[p.member, list(p.endpoints), p.weight] for p in self.parties]
        return {"type": "start", "attempt": self.attempt, "key": list(self.key), "parties": parties, "me": self.me}


def parse_order(message: Message) -> Order:
    epoch, fragment, base = message["key"]
    parties = tuple(Party(m, tuple(e), float(w)) for m, e, w in message["parties"])
    return Order(message["attempt"], (epoch, fragment, base), parties, message["me"])


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


class Cancelled(Exception):
    """The attempt was given up by rank 0."""


@dataclass
class Attempt:
    """The state of one attempt at one rank, shared by its worker, its senders and the readers of its connections."""

    order: Order
    rank: int
    arithmetic: Arithmetic
    contribution: Tensor
    stall: float
    changed: threading.Condition = field(default_factory=threading.Condition)
    parts: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(member index, first block) -> encoded contribution to a chunk that this rank reduces."""
    failed: Outcome | None = None
    received: int = 0
    sent: int = 0

    def __post_init__(self) -> None:
        fragment, worlds = self.order.key[1], [len(p.endpoints) for p in self.order.parties]
        blocks = self.arithmetic.blocks(fragment)
        self.first, self.last = rank_blocks(blocks, self.rank, worlds[self.order.me])
        self.cells = [c for c in cells(blocks, worlds) if c.ranks[self.order.me] == self.rank]
        self.result = torch.empty(self._size(self.first, self.last), dtype=torch.uint8)
        self.parts_due = {
            (k, a) for cell in self.cells for k in self.others for a, _ in chunks(*cell.owned(self.order.me))
        }
        """Keys of `parts` that have not come yet."""
        self.missing = {a for cell in self.cells for k in self.others for a, _ in chunks(*cell.owned(k))}
        """First blocks of the result chunks that other members still owe."""
        self.chunk_of = {a: b for cell in self.cells for k in range(len(worlds)) for a, b in chunks(*cell.owned(k))}
        self.owner_of = {a: k for cell in self.cells for k in range(len(worlds)) for a, _ in chunks(*cell.owned(k))}

    @property
    def others(self) -> list[int]:
        return [k for k in range(len(self.order.parties)) if k != self.order.me]

    def _size(self, first: int, last: int) -> int:
        return self.arithmetic.size(self.order.key[1], first, last)

    def cut(self, data: Tensor, first: int, last: int) -> Tensor:
        """The bytes of blocks [first, last) in this rank's slice."""
        begin = self._size(self.first, first)
        return data[begin : begin + self._size(first, last)]

    def deliver(self, sender: int, kind: str, first: Any, payload: bytearray) -> None:
        """A chunk arrived. Raises WireError if it is not one that `sender` owes this rank."""
        last = self.chunk_of.get(first) if isinstance(first, int) else None
        if last is None or len(payload) != self._size(first, last):
            raise WireError("a chunk that is not part of this attempt")
        data = torch.frombuffer(payload, dtype=torch.uint8)
        with self.changed:
            if kind == "part" and (sender, first) in self.parts_due:
                self.parts_due.discard((sender, first))
                self.parts[sender, first] = data
            elif kind == "sum" and self.owner_of[first] == sender and first in self.missing:
                self.cut(self.result, first, last).copy_(data)
                self.missing.discard(first)
            else:
                raise WireError("a chunk that the sender does not owe")
            self.received += len(payload)
            self.changed.notify_all()

    def fail(self, suspects: frozenset[str], reason: str) -> None:
        with self.changed:
            if self.failed is None:
                self.failed = Outcome(self.order.attempt, None, suspects, reason)
            self.changed.notify_all()

    def wait(self, ready: Callable[[], bool], owed_by: Callable[[], set[int]]) -> None:
        """Until `ready`. Raises Cancelled once the attempt has failed; nothing arriving for `stall` seconds fails it."""
        with self.changed:
            while self.failed is None and not ready():
                before = self.received
                if not self.changed.wait(self.stall) and self.received == before:
                    late = frozenset(self.order.parties[k].member for k in owed_by())
                    self.fail(late, f"nothing arrived for {self.stall:.0f} s")
            if self.failed is not None:
                raise Cancelled

    def pause(self, seconds: float) -> None:
        """Raises Cancelled if the attempt fails meanwhile."""
        with self.changed:
            if self.changed.wait_for(lambda: self.failed is not None, seconds):
                raise Cancelled


class Exchanger:
    """A rank's exchanges: contributions offered, attempts under way, results held until their round is decided."""

    def __init__(self, node: Node, arithmetic: Arithmetic, rank: int, stall: float) -> None:
        self.node, self.arithmetic, self.rank, self.stall = node, arithmetic, rank, stall
        self.on_outcome: Callable[[Outcome], None] = lambda outcome: None
        self.keep: Callable[[str, int, int, Tensor], None] | None = None
        """(attempt, first block, last block, result): stores the lowest member's slice before it counts as held, so that
        a committed round can always be had. May raise OSError; it is tried again then."""
        self._lock = threading.Condition()
        self._offers: dict[Key, Tensor] = {}
        self._attempts: dict[str, Attempt] = {}
        self._results: dict[str, tuple[Key, Tensor]] = {}
        self._closed: set[str] = set()
        """Attempts that have ended here; what still arrives for them is dropped."""
        node.handlers["data"] = self._serve

    def offer(self, key: Key, encoded: Tensor) -> None:
        """This rank's encoded contribution to `key`; attempts reuse it until the round is decided."""
        with self._lock:
            self._offers[key] = encoded

    def start(self, order: Order) -> None:
        """Runs the attempt in the background; `on_outcome` hears of its end."""
        with self._lock:
            if order.attempt in self._attempts or order.attempt in self._closed:
                return
            if (offer := self._offers.get(order.key)) is not None:
                attempt = Attempt(order, self.rank, self.arithmetic, offer, self.stall)
                self._attempts[order.attempt] = attempt
            else:
                self._closed.add(order.attempt)
            self._lock.notify_all()
        if offer is None:  # the round was decided while the order was on its way
            return self.on_outcome(Outcome(order.attempt, None, reason="cancelled"))
        threading.Thread(target=self._run, args=(attempt,), name="exchange", daemon=True).start()

    def cancel(self, attempt_id: str) -> None:
        """Ends the attempt if it is under way. A result that is held stays held."""
        with self._lock:
            self._closed.add(attempt_id)
            attempt = self._attempts.get(attempt_id)
        if attempt is not None:
            attempt.fail(frozenset(), "cancelled")

    def result(self, attempt_id: str) -> Tensor | None:
        """This rank's slice of the encoded result (uint8), if held."""
        with self._lock:
            held = self._results.get(attempt_id)
        return None if held is None else held[1]

    def decided(self, key: Key) -> None:
        """The round that `key` was for is in the journal: its contribution and results are of no further use."""
        with self._lock:
            self._offers.pop(key, None)
            self._results = {a: held for a, held in self._results.items() if held[0] != key}

    def forget(self) -> None:
        """Nothing that was offered or held belongs to the run any more: it was rewound."""
        with self._lock:
            self._offers.clear()
            self._results.clear()

    def _run(self, attempt: Attempt) -> None:
        begin = time.monotonic()
        try:
            _transfer(self.node, attempt)
            order = attempt.order
            digests = self.arithmetic.digests(order.key[1], attempt.first, attempt.last, attempt.result)
            if order.me == 0 and attempt.first < attempt.last:
                self._keep(attempt)
            outcome = Outcome(order.attempt, digests)
        except Cancelled:
            assert attempt.failed is not None
            outcome = attempt.failed
        outcome.sent, outcome.received = attempt.sent, attempt.received
        outcome.seconds = time.monotonic() - begin
        with self._lock:
            if outcome.digests is not None and attempt.order.key in self._offers:
                self._results[attempt.order.attempt] = (attempt.order.key, attempt.result)
            self._attempts.pop(attempt.order.attempt)
            self._closed.add(attempt.order.attempt)
        self.on_outcome(outcome)

    def _keep(self, attempt: Attempt) -> None:
        while self.keep is not None:
            try:
                return self.keep(attempt.order.attempt, attempt.first, attempt.last, attempt.result)
            except OSError as error:
                print(f"round: its bits cannot be stored: {error}; trying again", flush=True)
                attempt.pause(1.0)

    def _serve(self, connection: Connection, hello: Message) -> None:
        """A peer's rank pushes its chunks for one attempt, then `end`."""
        attempt_id = str(hello.get("attempt"))
        with self._lock:
            known = self._lock.wait_for(
                lambda: attempt_id in self._attempts or attempt_id in self._closed, START_PATIENCE
            )
            attempt = self._attempts.get(attempt_id) if known else None
        if attempt is None:
            return
        members = [party.member for party in attempt.order.parties]
        if hello["member"] not in members:
            return
        sender = members.index(hello["member"])
        try:
            while True:
                message, payload = connection.receive()
                if message.get("type") == "end":
                    return
                if message.get("type") == "failed":  # says whom it waited for in vain: not itself
                    suspects = frozenset(map(str, message["suspects"])) & frozenset(members)
                    return attempt.fail(
                        suspects, f"{hello['member']} gave up on {', '.join(suspects) or 'the attempt'}"
                    )
                attempt.deliver(sender, str(message.get("type")), message.get("first"), payload)
        except (OSError, KeyError, TypeError) as error:
            attempt.fail(frozenset([hello["member"]]), f"the exchange with {hello['member']} broke: {error}")


def _transfer(node: Node, attempt: Attempt) -> None:
    """Sends, reduces, gathers: returns when the whole result is in `attempt.result`."""
    lines = _open_lines(node, attempt)
    owned = [(cell, chunk) for cell in attempt.cells for chunk in chunks(*cell.owned(attempt.order.me))]
    others = attempt.others

    def whole(first: int) -> bool:
        return all((k, first) in attempt.parts for k in others)

    try:
        while owned:
            attempt.wait(
                lambda: any(whole(a) for _, (a, _) in owned),
                lambda: {k for k in others for _, (a, _) in owned if (k, a) not in attempt.parts},
            )
            cell, chunk = next(item for item in owned if whole(item[1][0]))
            owned.remove((cell, chunk))
            _reduce(attempt, *chunk)
            for k in others:
                lines[k, cell.ranks[k]].put(("sum", *chunk))
        for line in lines.values():
            line.put(None)
        attempt.wait(lambda: not attempt.missing, lambda: {attempt.owner_of[a] for a in attempt.missing})
        for line in lines.values():
            line.join()
        attempt.wait(lambda: True, set)
    finally:
        for line in lines.values():
            line.put(None)


def _reduce(attempt: Attempt, first: int, last: int) -> None:
    order = attempt.order
    own = attempt.cut(attempt.contribution, first, last)
    parts = [own if k == order.me else attempt.parts.pop((k, first)) for k in range(len(order.parties))]
    mean = attempt.arithmetic.reduce(order.key[1], first, last, parts, [p.weight for p in order.parties])
    attempt.cut(attempt.result, first, last).copy_(mean)


class _Line(threading.Thread):
    """Pushes chunks to one rank of another region: first this rank's parts, then results as they are put."""

    def __init__(self, node: Node, attempt: Attempt, member: int, rank: int) -> None:
        super().__init__(name="exchange-line", daemon=True)
        self.node, self.attempt = node, attempt
        self.party, self.peer_rank = attempt.order.parties[member], rank
        self.queue: queue.SimpleQueue[tuple[str, int, int] | None] = queue.SimpleQueue()
        self.put = self.queue.put
        mine: list[Cell] = [cell for cell in attempt.cells if cell.ranks[member] == rank]
        for first, last in (chunk for cell in mine for chunk in chunks(*cell.owned(member))):
            self.put(("part", first, last))
        self.start()

    def run(self) -> None:
        attempt = self.attempt
        try:
            endpoint = self.party.endpoints[self.peer_rank]
            connection, _ = self.node.dial(endpoint, "data", attempt.stall, attempt=attempt.order.attempt)
            try:
                while (item := self.queue.get()) is not None and attempt.failed is None:
                    kind, first, last = item
                    source = attempt.contribution if kind == "part" else attempt.result
                    data = attempt.cut(source, first, last)
                    connection.send({"type": kind, "first": first, "last": last}, data.numpy().data)
                failed = attempt.failed
                connection.send(
                    {"type": "end"} if failed is None else {"type": "failed", "suspects": sorted(failed.suspects)}
                )
            finally:
                with attempt.changed:
                    attempt.sent += connection.sent
                self.node.release(connection)
        except OSError as error:
            with attempt.changed:  # if the peer gave up on somebody else, it is just saying so on a line of its own
                attempt.changed.wait_for(lambda: attempt.failed is not None, 0.1)
            attempt.fail(frozenset([self.party.member]), f"the exchange with {self.party.member} broke: {error}")


def _open_lines(node: Node, attempt: Attempt) -> dict[tuple[int, int], _Line]:
    """One line to every rank of another member that shares a cell with this rank."""
    pairs = {(k, cell.ranks[k]) for cell in attempt.cells for k in attempt.others}
    return {pair: _Line(node, attempt, *pair) for pair in sorted(pairs)}
