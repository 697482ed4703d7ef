"""Members of an exchange in one process: each rank with a node and an exchanger of its own, over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.averaging import Averaging
from diloco.codec import CodecConfig, build_codec
from diloco.fragments import Fragment, Slot, block_digests
from elastic.exchange import Exchanger
from elastic.node import Identity, Node
from elastic.order import Contribution, Key, Order, Outcome, Party
from elastic.plan import ownership, rank_blocks
from elastic.security import OPEN, Security

KEY: Key = (0, 0, 0)
BLOCK = 512


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


@dataclass
class Rank:
    node: Node
    exchanger: Exchanger
    outcomes: dict[str, Outcome] = field(default_factory=dict)


class Cluster:
    """`worlds[k]` ranks in member k; every member's contribution to one fragment of `elements` is offered."""

    def __init__(
        self,
        worlds: Sequence[int],
        elements: int,
        codec: str = "int8",
        stall: float = 10.0,
        streams: int = 0,
        closed: frozenset[int] = frozenset(),
        security: Callable[[int], Security] = lambda k: OPEN,
    ) -> None:
        self.security = security
        self.shares: tuple[int, ...] | None = None
        self.streams, self.closed = streams, closed
        """Members that nobody can dial."""
        torch.manual_seed(elements)
        self.averaging = Averaging([Fragment(0, (Slot("w", (elements,), 0),), BLOCK)], build_codec(CodecConfig(codec)))
        self.blocks, self.worlds = self.averaging.blocks(0), worlds
        self.names = [f"m{k}_{k}" for k in range(len(worlds))]
        self.weights = [100.0 * (k + 1) for k in range(len(worlds))]
        self.norms: list[float | None] = [None] * len(worlds)
        self.deltas = [torch.randn(elements) * 10.0 ** (k - 1) for k in range(len(worlds))]
        self.encoded = [self.averaging.encode(0, delta) for delta in self.deltas]
        self.members: list[list[Rank]] = []
        for k, world in enumerate(worlds):
            self.members.append([self._rank(k, r, stall) for r in range(world)])
            self.offer(k)

    def _rank(self, k: int, r: int, stall: float) -> Rank:
        node = Node("127.0.0.1", security=self.security(k))
        node.identity = Identity("run", "{}", self.names[k], r)
        rank = Rank(node, Exchanger(node, self.averaging, r, stall, self.streams))
        rank.exchanger.on_outcome = lambda outcome: rank.outcomes.update({outcome.attempt: outcome})
        return rank

    def slice(self, k: int, r: int, data: Tensor) -> Tensor:
        first, last = rank_blocks(self.blocks, r, self.worlds[k])
        begin = self.averaging.size(0, 0, first)
        return data[begin : begin + self.averaging.size(0, first, last)]

    def offer(self, k: int) -> None:
        for r, rank in enumerate(self.members[k]):
            rank.exchanger.offer(KEY, self.contribution(k, r))

    def contribution(self, k: int, r: int) -> Contribution:
        first, last = rank_blocks(self.blocks, r, self.worlds[k])
        delta = self.deltas[k][first * BLOCK : last * BLOCK]
        return self.averaging.contribution(0, first, last, delta, torch.zeros_like(delta))

    def order(self, attempt: str, members: Sequence[int], me: int) -> Order:
        parties = [
            Party(
                self.names[k],
                tuple("" if k in self.closed else rank.node.endpoint for rank in self.members[k]),
                self.weights[k],
                self.norms[k],
            )
            for k in members
        ]
        shares = self.shares or ownership([1.0] * len(parties))
        return Order(attempt, KEY, tuple(parties), shares, members.index(me))

    def start(self, attempt: str, members: Sequence[int], only: Sequence[int] | None = None) -> None:
        for k in members if only is None else only:
            for rank in self.members[k]:
                rank.exchanger.start(self.order(attempt, members, k))

    def reference(self, members: Sequence[int]) -> Tensor:
        """The whole fragment at once."""
        parts = [self.encoded[k] for k in members]
        return self.averaging.reduce(0, 0, self.blocks, parts, [self.weights[k] for k in members])[0]

    def ended(self, attempt: str, members: Sequence[int]) -> bool:
        return until(lambda: all(attempt in rank.outcomes for k in members for rank in self.members[k]))

    def assert_result(self, attempt: str, members: Sequence[int]) -> None:
        assert self.ended(attempt, members), "the exchange does not end"
        expected = self.reference(members)
        for k in members:
            digests = b""
            for r, rank in enumerate(self.members[k]):
                outcome, result = rank.outcomes[attempt], rank.exchanger.result(attempt)
                assert outcome.digests is not None, outcome.reason
                assert result is not None and torch.equal(result, self.slice(k, r, expected))
                digests += outcome.digests
            assert digests == block_digests(expected, self.averaging.size(0, 0, 1))

    def kill(self, k: int) -> None:
        """Like the death of its processes: whatever its threads still do, they say nothing more."""
        for rank in self.members[k]:
            for connection in list(rank.node._open):
                connection.send = _dead  # type: ignore[method-assign]
        for rank in self.members[k]:
            rank.node.close()

    def idle(self) -> bool:
        """No attempt under way."""
        return until(lambda: not any(r.exchanger._attempts for member in self.members for r in member))


def _dead(*_: Any) -> None:
    raise ConnectionAbortedError("this process is dead")


Make = Callable[..., Cluster]


@pytest.fixture
def cluster() -> Iterator[Make]:
    made: list[Cluster] = []

    def make(*args: Any, **more: Any) -> Cluster:
        made.append(Cluster(*args, **more))
        return made[-1]

    yield make
    for one in made:
        for k in range(len(one.worlds)):
            one.kill(k)
    assert until(lambda: not any(thread.name.startswith("exchange") for thread in threading.enumerate()))
