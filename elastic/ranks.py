"""Rank 0's hand on the exchangers of its own region's ranks: its own directly, the others over a leader connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from elastic.exchange import Exchanger
from elastic.node import Node
from elastic.order import Order, Outcome, parse_order, parse_outcome
from elastic.process import Exchange
from elastic.wire import Connection, Message


class Ranks:
    """At rank 0: starts and cancels attempts at all ranks, and hears of their ends."""

    def __init__(self, node: Node, exchanger: Exchanger | Exchange, endpoints: Sequence[str]) -> None:
        self.exchanger = exchanger
        self.on_outcome: Callable[[int, Outcome], None] = lambda rank, outcome: None
        self._done: dict[str, dict[int, Outcome]] = {}
        self._lock = threading.Lock()
        self._world = len(endpoints)
        exchanger.on_outcome = lambda outcome: self._report(0, outcome)
        self._lines = [node.dial(endpoint, "leader")[0] for endpoint in endpoints[1:]]
        for rank, line in enumerate(self._lines, start=1):
            threading.Thread(target=self._listen, args=(rank, line), name="leader", daemon=True).start()

    def start(self, order: Order) -> None:
        self._tell(order.message())
        self.exchanger.start(order)

    def cancel(self, attempt: str) -> None:
        self._tell({"type": "cancel", "attempt": attempt})
        self.exchanger.cancel(attempt)

    def complete(self, attempt: str) -> list[Outcome] | None:
        """The outcomes in rank order once every rank holds its slice of the result; they are told once."""
        with self._lock:
            done = self._done.get(attempt, {})
            if len(done) < self._world or any(outcome.digests is None for outcome in done.values()):
                return None
            del self._done[attempt]
            return [done[rank] for rank in range(self._world)]

    def _tell(self, message: Message) -> None:
        for line in self._lines:
            line.send(message)

    def _listen(self, rank: int, line: Connection) -> None:
        try:
            while True:
                message, payload = line.receive()
                held = message.pop("held")
                self._report(rank, parse_outcome(message, bytes(payload) if held else None))
        except OSError:
            pass  # the rank is gone: torchrun ends the whole region

    def _report(self, rank: int, outcome: Outcome) -> None:
        with self._lock:
            done = self._done.setdefault(outcome.attempt, {})
            done[rank] = outcome
            lost = len(done) == self._world and any(outcome.digests is None for outcome in done.values())
            if lost:
                del self._done[outcome.attempt]
        if lost:
            self.drop(outcome.attempt)
        self.on_outcome(rank, outcome)

    def drop(self, attempt: str) -> None:
        """What some ranks hold of a result that others do not is of no use."""
        self._tell({"type": "drop", "attempt": attempt})
        self.exchanger.drop(attempt)


def follow(node: Node, exchanger: Exchanger | Exchange) -> None:
    """At the other ranks: does what rank 0 says on the leader connection."""

    def serve(connection: Connection, hello: Message) -> None:
        assert node.identity is not None
        if hello["member"] != node.identity.member:
            return
        exchanger.on_outcome = lambda outcome: _send(connection, outcome)
        while True:
            message, _ = connection.receive()
            if message["type"] == "start":
                exchanger.start(parse_order(message))
            elif message["type"] == "drop":
                exchanger.drop(message["attempt"])
            else:
                exchanger.cancel(message["attempt"])

    node.handlers["leader"] = serve


def _send(connection: Connection, outcome: Outcome) -> None:
    connection.send({**outcome.message(), "held": outcome.digests is not None}, outcome.digests or b"")
