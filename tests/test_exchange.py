"""The exchange over real sockets: members of unequal shape, each rank with a node and an exchanger of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.averaging import Averaging
from diloco.codec import CODECS
from diloco.fragments import Fragment, Slot, block_digests
from elastic import exchange
from elastic.exchange import Attempt, Exchanger, Key, Order, Outcome, Party
from elastic.node import Identity, Node
from elastic.plan import CHUNK, cells, chunks, rank_blocks
from elastic.ranks import Ranks, follow
from elastic.wire import WireError

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

    def __init__(self, worlds: Sequence[int], elements: int, codec: str = "int8", stall: float = 10.0) -> None:
        torch.manual_seed(elements)
        self.averaging = Averaging([Fragment(0, (Slot("w", (elements,), 0),), BLOCK)], CODECS[codec])
        self.blocks, self.worlds = self.averaging.blocks(0), worlds
        self.names = [f"m{k}_{k}" for k in range(len(worlds))]
        self.weights = [100.0 * (k + 1) for k in range(len(worlds))]
        self.deltas = [torch.randn(elements) * 10.0 ** (k - 1) for k in range(len(worlds))]
        self.encoded = [self.averaging.encode(0, delta) for delta in self.deltas]
        self.members: list[list[Rank]] = []
        for k, world in enumerate(worlds):
            self.members.append([self._rank(k, r, stall) for r in range(world)])
            self.offer(k)

    def _rank(self, k: int, r: int, stall: float) -> Rank:
        node = Node("127.0.0.1")
        node.identity = Identity("run", "{}", self.names[k], r)
        rank = Rank(node, Exchanger(node, self.averaging, r, stall))
        rank.exchanger.on_outcome = lambda outcome: rank.outcomes.update({outcome.attempt: outcome})
        return rank

    def slice(self, k: int, r: int, data: Tensor) -> Tensor:
        first, last = rank_blocks(self.blocks, r, self.worlds[k])
        begin = self.averaging.size(0, 0, first)
        return data[begin : begin + self.averaging.size(0, first, last)]

    def offer(self, k: int) -> None:
        for r, rank in enumerate(self.members[k]):
            rank.exchanger.offer(KEY, self.slice(k, r, self.encoded[k]).clone())

    def order(self, attempt: str, members: Sequence[int], me: int) -> Order:
        parties = [
            Party(self.names[k], tuple(rank.node.endpoint for rank in self.members[k]), self.weights[k])
            for k in members
        ]
        return Order(attempt, KEY, tuple(parties), members.index(me))

    def start(self, attempt: str, members: Sequence[int], only: Sequence[int] | None = None) -> None:
        for k in members if only is None else only:
            for rank in self.members[k]:
                rank.exchanger.start(self.order(attempt, members, k))

    def reference(self, members: Sequence[int]) -> Tensor:
        """The whole fragment at once."""
        parts = [self.encoded[k] for k in members]
        return self.averaging.reduce(0, 0, self.blocks, parts, [self.weights[k] for k in members])

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
        """No attempt under way, no connection open."""
        ranks = [rank for member in self.members for rank in member]
        return until(lambda: not any(r.exchanger._attempts or r.node._open for r in ranks))


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


@pytest.mark.parametrize("codec", ["int8", "none"])
@pytest.mark.parametrize(
    ("worlds", "elements"),
    [
        ((1,), 5 * BLOCK),
        ((3,), 5 * BLOCK + 1),
        ((1, 1), 37 * BLOCK + 17),
        ((4, 1), 50 * BLOCK + 300),
        ((2, 3, 1), 61 * BLOCK + 5),
        ((4, 4), 16 * BLOCK),
        ((2, 3, 1), 1),
        ((4, 1), 2 * BLOCK + 1),
        ((3, 5), 2 * BLOCK),
        ((1, 2, 1, 3), 4 * BLOCK + 9),
    ],
)
def test_equal_to_the_reference_bit_for_bit(cluster: Make, worlds: tuple[int, ...], elements: int, codec: str) -> None:
    c = cluster(worlds, elements, codec)
    everyone = range(len(worlds))
    c.start("a", everyone)
    c.assert_result("a", everyone)
    assert c.idle()


def test_bytes_on_the_wire_are_twice_the_share_of_the_others(cluster: Make) -> None:
    c = cluster((1, 1, 1), 96 * BLOCK, "none")
    c.start("a", range(3))
    c.assert_result("a", range(3))
    total = len(c.encoded[0])
    for member in c.members:
        outcome = member[0].outcomes["a"]
        assert 4 / 3 * total <= outcome.sent <= 4 / 3 * total + 20_000
        assert outcome.received == 4 / 3 * total


def test_a_start_that_comes_late_finds_its_data_connections_waiting(cluster: Make) -> None:
    c = cluster((2, 1), 40 * BLOCK)
    c.start("a", range(2), only=[0])
    assert until(lambda: len(c.members[1][0].node._open) == 2)
    c.start("a", range(2), only=[1])
    c.assert_result("a", range(2))


def test_many_attempts_side_by_side_and_twice_started(cluster: Make) -> None:
    c = cluster((2, 1), 20 * BLOCK)
    for n in range(8):
        c.start(f"a{n}", range(2))
        c.start(f"a{n}", range(2))
    for n in range(8):
        c.assert_result(f"a{n}", range(2))
    c.start("a0", range(2))  # once more, after its end
    assert c.idle()


class Gate(Averaging):
    """Stands still in `reduce` until opened, so that an exchange can be caught in the middle."""

    def __init__(self, inner: Averaging) -> None:
        super().__init__(inner.fragments, inner.codec)
        self.reached, self.opened = threading.Event(), threading.Event()

    def reduce(self, *args: Any) -> Tensor:
        self.reached.set()
        assert self.opened.wait(20)
        return super().reduce(*args)


def gate(c: Cluster, k: int) -> Gate:
    closed = Gate(c.averaging)
    for rank in c.members[k]:
        rank.exchanger.arithmetic = closed
    return closed


def test_a_member_that_dies_in_the_middle_is_named_and_the_others_go_on(cluster: Make) -> None:
    c = cluster((2, 3, 1), 60 * BLOCK)
    victim = gate(c, 1)
    begin = time.monotonic()
    c.start("a", range(3))
    assert victim.reached.wait(10)
    c.kill(1)
    assert c.ended("a", [0, 2]) and time.monotonic() - begin < 5  # by its connections, not by the stall deadline
    for k in (0, 2):
        outcomes = [rank.outcomes["a"] for rank in c.members[k]]
        assert all(o.digests is None and o.suspects == {c.names[1]} for o in outcomes), outcomes
        assert all(c.names[1] in o.reason for o in outcomes)
        assert all(rank.exchanger.result("a") is None for rank in c.members[k])
    c.start("b", [0, 2])
    c.assert_result("b", [0, 2])
    victim.opened.set()


def test_a_member_that_stalls_is_named_and_the_others_go_on(cluster: Make) -> None:
    c = cluster((1, 2, 1), 60 * BLOCK, stall=0.5)
    victim = gate(c, 1)
    c.start("a", range(3))
    assert c.ended("a", [0, 2])
    for k in (0, 2):
        assert {rank.outcomes["a"].suspects for rank in c.members[k]} == {frozenset([c.names[1]])}
    c.start("b", [0, 2])
    c.assert_result("b", [0, 2])
    victim.opened.set()
    assert c.ended("a", [1])  # it may even hold a result: nobody counts on it
    assert c.idle()


def test_a_member_that_never_starts_is_named(cluster: Make) -> None:
    c = cluster((1, 1), 9 * BLOCK, stall=0.3)
    c.start("a", range(2), only=[0])
    assert c.ended("a", [0])
    assert c.members[0][0].outcomes["a"].suspects == {c.names[1]}
    c.start("b", range(2))  # the offers are still there
    c.assert_result("b", range(2))


def test_cancelled_attempts_end_and_held_results_stay(cluster: Make) -> None:
    c = cluster((2, 1), 40 * BLOCK)
    c.start("a", range(2))
    c.assert_result("a", range(2))
    c.start("b", range(2), only=[0])
    for rank in c.members[0]:
        rank.exchanger.cancel("a")
        rank.exchanger.cancel("b")
        rank.exchanger.cancel("never heard of")
    assert c.ended("b", [0])
    assert {rank.outcomes["b"].reason for rank in c.members[0]} == {"cancelled"}
    c.assert_result("a", range(2))
    c.start("b", range(2), only=[1])
    assert c.ended("b", [1])  # its data comes too late, and is turned away
    c.members[1][0].exchanger.cancel("d")
    c.start("d", range(2), only=[1])
    assert "d" not in c.members[1][0].outcomes and "d" not in c.members[1][0].exchanger._attempts


def test_once_decided_nothing_is_kept_and_a_late_order_fails(cluster: Make) -> None:
    c = cluster((1, 1), 9 * BLOCK)
    c.start("a", range(2))
    c.assert_result("a", range(2))
    one = c.members[0][0]
    one.exchanger.decided((0, 0, 5))
    assert one.exchanger.result("a") is not None
    one.exchanger.decided(KEY)
    assert one.exchanger.result("a") is None
    one.exchanger.start(c.order("b", range(2), 0))
    assert one.outcomes["b"].digests is None and one.outcomes["b"].reason == "cancelled"


def test_a_round_decided_while_its_attempt_ends_leaves_nothing(cluster: Make) -> None:
    c = cluster((1,), 9 * BLOCK)
    middle = gate(c, 0)
    c.start("a", [0])
    assert middle.reached.wait(10)
    c.members[0][0].exchanger.decided(KEY)
    middle.opened.set()
    assert c.ended("a", [0]) and c.members[0][0].exchanger.result("a") is None


def test_late_connections_of_unknown_and_ended_attempts_do_no_harm(
    cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "START_PATIENCE", 0.2)
    c = cluster((1, 1), 20 * BLOCK)
    c.start("a", range(2))
    c.assert_result("a", range(2))
    sender, target = c.members[1][0].node, c.members[0][0]
    for attempt in ("a", "unknown"):
        connection, _ = sender.dial(target.node.endpoint, "data", 5, attempt=attempt)
        with pytest.raises(OSError):  # hung up, whatever is said
            while True:
                connection.send({"type": "sum", "first": 0, "last": 4}, bytes(100))
                connection.sock.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    connection.receive()
        sender.release(connection)
    c.assert_result("a", range(2))
    c.start("b", range(2))
    c.assert_result("b", range(2))
    assert c.idle()


def test_a_member_that_is_not_of_the_attempt_is_not_heard(cluster: Make) -> None:
    c = cluster((1, 1, 1), 20 * BLOCK)
    c.start("a", [0, 1], only=[0])
    stranger = c.members[2][0].node
    connection, _ = stranger.dial(c.members[0][0].node.endpoint, "data", 5, attempt="a")
    with pytest.raises(ConnectionError):
        connection.send({"type": "part", "first": 0}, bytes(10))
        connection.receive()
    c.start("a", [0, 1], only=[1])
    c.assert_result("a", [0, 1])


def attempt_of(c: Cluster, k: int, members: Sequence[int], r: int = 0) -> Attempt:
    return Attempt(c.order("x", members, k), r, c.averaging, c.slice(k, r, c.encoded[k]), 1.0)


def test_wrong_and_repeated_chunks_are_refused(cluster: Make) -> None:
    c = cluster((1, 2), 40 * BLOCK)
    a = attempt_of(c, 0, range(2))
    mine = next(chunk for cell in a.cells for chunk in chunks(*cell.owned(0)))
    theirs = next(chunk for cell in a.cells for chunk in chunks(*cell.owned(1)))

    def data(chunk: tuple[int, int]) -> bytearray:
        return bytearray(c.averaging.size(0, *chunk))

    refused: list[tuple[int, str, Any, bytearray]] = [
        (1, "part", theirs[0], data(theirs)),  # not mine to reduce
        (1, "sum", mine[0], data(mine)),  # mine to reduce, not the sender's
        (0, "part", mine[0], data(mine)),  # from myself
        (0, "sum", theirs[0], data(theirs)),
        (1, "part", mine[0], data(mine)[:-1]),
        (1, "part", mine[0], data(mine) + b"x"),
        (1, "part", mine[0], bytearray()),
        (1, "part", mine[0] + 1, data(mine)),
        (1, "part", -1, data(mine)),
        (1, "part", 10**9, data(mine)),
        (1, "part", None, data(mine)),
        (1, "part", [1], data(mine)),
        (1, "part", "0", data(mine)),
        (1, "start", mine[0], data(mine)),
    ]
    for sender, kind, first, payload in refused:
        with pytest.raises(WireError):
            a.deliver(sender, kind, first, payload)
    assert a.received == 0 and not a.parts
    a.deliver(1, "part", mine[0], data(mine))
    a.deliver(1, "sum", theirs[0], data(theirs))
    a.parts.clear()  # reduced already: still not welcome twice
    for kind, chunk in (("part", mine), ("sum", theirs)):
        with pytest.raises(WireError):
            a.deliver(1, kind, chunk[0], data(chunk))


@pytest.mark.parametrize("first", [0, "x", None, 10**6])
def test_a_bad_chunk_fails_the_attempt_and_names_its_sender(cluster: Make, first: Any) -> None:
    c = cluster((1, 1), 40 * BLOCK)
    c.start("a", range(2), only=[0])
    connection, _ = c.members[1][0].node.dial(c.members[0][0].node.endpoint, "data", 5, attempt="a")
    connection.send({"type": "part", "first": first, "last": 4}, b"too short")
    assert c.ended("a", [0])
    assert c.members[0][0].outcomes["a"].suspects == {c.names[1]}
    c.start("b", range(2))
    c.assert_result("b", range(2))


def test_every_block_has_one_owner_and_one_rank_per_member() -> None:
    for blocks in (1, 2, 3, 7, 16, 61):
        for worlds in ((1,), (1, 1), (4, 1), (2, 3, 1), (5, 7, 2)):
            plan = cells(blocks, worlds)
            assert [cell.first for cell in plan] == [0, *(cell.last for cell in plan[:-1])] and plan[-1].last == blocks
            for cell in plan:
                for k, rank in enumerate(cell.ranks):
                    first, last = rank_blocks(blocks, rank, worlds[k])
                    assert first <= cell.first < cell.last <= last
                owned = [cell.owned(k) for k in range(len(worlds))]
                assert [b for span in owned for b in range(*span)] == list(range(cell.first, cell.last))
                assert all(0 < b - a <= CHUNK for span in owned for a, b in chunks(*span))


# Rank 0's hand on its region


def test_a_region_of_several_ranks_is_led_by_its_first(cluster: Make) -> None:
    c = cluster((3, 1), 40 * BLOCK)
    for rank in c.members[0][1:]:
        follow(rank.node, rank.exchanger)
    heard: list[tuple[int, Outcome]] = []
    leader = c.members[0][0]
    ranks = Ranks(leader.node, leader.exchanger, [rank.node.endpoint for rank in c.members[0]])
    ranks.on_outcome = lambda rank, outcome: heard.append((rank, outcome))
    ranks.start(c.order("a", range(2), 0))
    assert ranks.complete("a") is None
    c.start("a", range(2), only=[1])
    assert until(lambda: len(heard) == 3)
    done = ranks.complete("a")
    assert done is not None
    size = c.averaging.size(0, 0, 1)
    assert b"".join(o.digests or b"" for o in done) == block_digests(c.reference(range(2)), size)
    assert sum(o.received for o in done) == c.members[1][0].outcomes["a"].received
    assert not ranks._done  # told once, then forgotten

    ranks.start(c.order("b", range(2), 0))
    ranks.cancel("b")
    assert until(lambda: len(heard) == 6) and ranks.complete("b") is None
    assert {outcome.reason for _, outcome in heard[3:]} == {"cancelled"}

    for rank in c.members[0]:
        rank.exchanger.decided(KEY)
    ranks.start(c.order("late", range(2), 0))  # nothing is offered any more: it fails, and the leader's line lives
    assert until(lambda: len(heard) == 9)
    for rank in c.members[0]:
        rank.exchanger.offer((0, 0, 9), torch.zeros(0, dtype=torch.uint8))
    c.offer(0)
    heard.clear()
    ranks.start(c.order("c", range(2), 0))
    c.start("c", range(2), only=[1])
    assert until(lambda: len(heard) == 3) and ranks.complete("c") is not None


def test_only_the_own_region_may_lead(cluster: Make) -> None:
    c = cluster((2, 1), 9 * BLOCK)
    follower = c.members[0][1]
    follow(follower.node, follower.exchanger)
    connection, _ = c.members[1][0].node.dial(follower.node.endpoint, "leader", 5)
    with pytest.raises(ConnectionError):
        connection.send(c.order("a", range(2), 0).message())
        connection.receive()
    assert not follower.exchanger._attempts and not follower.outcomes
