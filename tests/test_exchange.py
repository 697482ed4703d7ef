"""The exchange over real sockets: members of unequal shape, each rank with a node and an exchanger of its own."""

from __future__ import annotations

import contextlib
import random
import socket
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
from elastic import attempt, links, side
from elastic.attempt import Attempt
from elastic.exchange import Exchanger
from elastic.links import EARLY
from elastic.node import Identity, Node
from elastic.order import Contribution, Key, Order, Outcome, Party
from elastic.plan import CHUNK, WHOLE, cells, chunks, ownership, rank_blocks
from elastic.ranks import Ranks, follow
from elastic.wire import HEAD, MAGIC, Connection, WireError, encode

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
    ) -> None:
        self.shares: tuple[int, ...] | None = None
        self.streams, self.closed = streams, closed
        """Members that nobody can dial."""
        torch.manual_seed(elements)
        self.averaging = Averaging([Fragment(0, (Slot("w", (elements,), 0),), BLOCK)], build_codec(CodecConfig(codec)))
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
        block = c.averaging.size(0, 0, 1)  # shares are of whole blocks
        assert 4 / 3 * total - block <= outcome.sent <= 4 / 3 * total + block + 20_000
        assert abs(outcome.received - 4 / 3 * total) <= block


def test_a_start_that_comes_late_finds_its_data_waiting(cluster: Make) -> None:
    c = cluster((2, 1), 40 * BLOCK)
    c.start("a", range(2), only=[0])
    assert until(lambda: sum("a" in link.early for link in c.members[1][0].exchanger.links.all()) == 2)
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
    c = cluster((1, 2, 1), 60 * BLOCK, stall=2.0)
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


def intruder(c: Cluster, k: int, target: int) -> Connection:
    """A data stream that says it is of rank 0 of member k."""
    connection, _ = c.members[k][0].node.dial(
        c.members[target][0].node.endpoint, "data", 5, link="other", further=False
    )
    return connection


def test_late_frames_of_unknown_and_ended_attempts_do_no_harm(cluster: Make) -> None:
    c = cluster((1, 1), 20 * BLOCK)
    c.start("a", range(2))
    c.assert_result("a", range(2))
    connection, target = intruder(c, 1, 0), c.members[0][0].exchanger
    for name in ["a", *(f"unknown {n}" for n in range(200))]:
        connection.send({"type": "sum", "attempt": name, "first": 0, "last": 4}, bytes(100_000))
    assert until(lambda: any("unknown 199" in link.early for link in target.links.all()))
    (link,) = target.links.all()
    kept = sum(len(payload) for frames in link.early.values() for _, payload in frames)
    assert 0 < kept < link._early_bytes <= 2 * EARLY and "a" not in link.early  # the newest, so many
    c.assert_result("a", range(2))
    connection.close()
    assert until(lambda: not target.links.all())
    c.start("b", range(2))
    c.assert_result("b", range(2))
    assert c.idle()


def test_a_member_that_is_not_of_the_attempt_is_not_heard(cluster: Make) -> None:
    c = cluster((1, 1, 1), 20 * BLOCK)
    c.start("a", [0, 1], only=[0])
    connection = intruder(c, 2, 0)
    connection.send({"type": "part", "attempt": "a", "first": 0}, bytes(10))
    with pytest.raises(ConnectionError):
        connection.receive()
    assert until(lambda: c.members[0][0].node.refusals == 1)
    c.start("a", [0, 1], only=[1])
    c.assert_result("a", [0, 1])


def test_garbage_is_dropped_and_counted_and_exchanges_go_on(cluster: Make) -> None:
    """From a stranger, and from a member of the run that is not of the attempt: cut, mutated, oversized and replayed."""
    c = cluster((1, 1, 1), 100 * BLOCK)
    target, rng, sent = c.members[0][0].node, random.Random(3), 0
    good = encode({"type": "part", "attempt": "a0", "first": 0}, bytes(100)) + bytes(100)
    host, port = target.endpoint.split(":")
    for n in range(5):
        c.start(f"a{n}", [0, 1])
        for _ in range(40):
            frame = bytearray(good)
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
            junk = rng.choice([bytes(frame), rng.randbytes(300), HEAD.pack(MAGIC, 2, 1 << 40, 0), good * 3])
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as stranger:
                stranger.sendall(junk)
                sent += 1
            with contextlib.suppress(OSError):
                member = intruder(c, 2, 0)
                member.sock.sendall(junk)
                member.close()
                sent += 1
        c.assert_result(f"a{n}", [0, 1])
    assert until(lambda: target.refusals > 200) and sent > 300
    (kept,) = [link._early_bytes for link in c.members[0][0].exchanger.links.all() if link.peer[0] == "m2_2"] or [0]
    assert kept <= 2 * EARLY


def attempt_of(c: Cluster, k: int, members: Sequence[int], r: int = 0) -> Attempt:
    return Attempt(c.order("x", members, k), r, c.averaging, c.contribution(k, r), 1.0)


def test_wrong_and_repeated_chunks_are_refused(cluster: Make) -> None:
    c = cluster((1, 2), 40 * BLOCK)
    a = attempt_of(c, 0, range(2))
    mine, theirs = min(a.due), min(a.missing)
    sender, other = a.peers[mine][0], (c.names[1], 1 - a.peers[mine][0][1])
    assert a.peers[theirs] == [sender]

    def data(first: int) -> bytearray:
        return bytearray(c.averaging.size(0, first, a.end[first]))

    refused: list[tuple[Any, str, Any, bytearray]] = [
        (sender, "part", theirs, data(theirs)),  # not mine to reduce
        (sender, "sum", mine, data(mine)),  # mine to reduce, not the sender's
        ((c.names[0], 0), "part", mine, data(mine)),  # from myself
        ((c.names[0], 0), "sum", theirs, data(theirs)),
        (("m9_9", 0), "sum", theirs, data(theirs)),
        (other, "part", mine, data(mine)),  # the right member's wrong rank
        (other, "sum", theirs, data(theirs)),
        (sender, "part", mine, data(mine)[:-1]),
        (sender, "part", mine, data(mine) + b"x"),
        (sender, "part", mine, bytearray()),
        (sender, "part", mine + 1, data(mine)),
        (sender, "part", -1, data(mine)),
        (sender, "part", 10**9, data(mine)),
        (sender, "part", None, data(mine)),
        (sender, "part", [1], data(mine)),
        (sender, "part", "0", data(mine)),
        (sender, "start", mine, data(mine)),
    ]
    for peer, kind, first, payload in refused:
        with pytest.raises(WireError):
            a.handle(peer, {"type": kind, "first": first}, payload)
    assert a.received == 0 and not a.parts
    a.handle(sender, {"type": "part", "first": mine}, data(mine))
    a.handle(sender, {"type": "sum", "first": theirs}, data(theirs))
    a.parts.clear()  # reduced already: still not welcome twice
    for kind, first in (("part", mine), ("sum", theirs)):
        with pytest.raises(WireError):
            a.handle(sender, {"type": kind, "first": first}, data(first))


@pytest.mark.parametrize("first", [0, "x", None, 10**6])
def test_a_bad_chunk_fails_the_attempt_and_names_its_sender(cluster: Make, first: Any) -> None:
    c = cluster((1, 1), 40 * BLOCK)
    c.start("a", range(2), only=[1])
    intruder(c, 0, 1).send({"type": "part", "attempt": "a", "first": first}, b"too short")
    assert c.ended("a", [1])
    assert c.members[1][0].outcomes["a"].suspects == {c.names[0]}
    assert until(lambda: c.members[1][0].node.refusals == 1)
    c.start("b", range(2))
    c.assert_result("b", range(2))


@pytest.mark.parametrize("worlds", [(1, 1, 1), (4, 1, 2)])
def test_a_member_may_own_nothing_or_everything(cluster: Make, worlds: tuple[int, ...]) -> None:
    c = cluster(worlds, 60 * BLOCK + 7)
    for n, shares in enumerate([(WHOLE, 0, 0), (0, WHOLE - 1, 1), (WHOLE // 2 - 9, 9, WHOLE // 2)]):
        c.shares = shares
        c.start(f"a{n}", range(3))
        c.assert_result(f"a{n}", range(3))
    assert c.idle()


def test_parts_that_wait_for_a_slow_member_fill_no_more_than_the_window(
    cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "CHUNK", 2_000)
    monkeypatch.setattr(attempt, "WINDOW", 20_000)
    for module in (links, side):
        monkeypatch.setattr(module, "EARLY", 5_000)
    c = cluster((1, 1, 1), 400 * BLOCK)
    c.shares = (WHOLE, 0, 0)
    c.start("a", range(3), only=[0, 1])
    under_way = c.members[0][0].exchanger._attempts["a"]
    assert until(lambda: under_way.held > 10_000)  # all of member 1's, none of member 2's
    c.start("a", range(3), only=[2])
    c.assert_result("a", range(3))
    assert under_way.peak <= 2 * 20_000 < len(c.encoded[1]) / 4


def test_a_contribution_that_is_not_finite_never_leaves(cluster: Make) -> None:
    c = cluster((1, 1), 20 * BLOCK)
    c.deltas[0][7 * BLOCK] = float("nan")
    c.offer(0)
    c.start("a", range(2))
    assert c.ended("a", [0, 1])
    assert c.members[0][0].outcomes["a"].digests is None


class Liar:
    """A contribution that was not checked where it was made."""

    def __init__(self, honest: Contribution) -> None:
        self.honest = honest

    def read(self, first: int, last: int) -> Tensor:
        return torch.full_like(self.honest.read(first, last), 0xFF)  # NaN scales


def test_a_member_that_sends_what_is_not_finite_is_named(cluster: Make) -> None:
    c = cluster((1, 1, 1), 60 * BLOCK)
    c.members[1][0].exchanger.offer(KEY, Liar(c.contribution(1, 0)))
    c.start("a", range(3))
    assert c.ended("a", [0, 2])
    assert all(c.members[k][0].outcomes["a"].suspects == {c.names[1]} for k in (0, 2))
    c.start("b", [0, 2])
    c.assert_result("b", [0, 2])


def test_links_outlive_attempts_and_come_back(cluster: Make) -> None:
    c = cluster((2, 1), 40 * BLOCK)
    c.start("a", range(2))
    c.assert_result("a", range(2))
    links = c.members[1][0].exchanger.links.all()
    c.start("b", range(2))
    c.assert_result("b", range(2))
    assert c.members[1][0].exchanger.links.all() == links
    for link in links:
        link.close("a test")
    assert until(lambda: not any(r.exchanger.links.all() for m in c.members for r in m))
    c.start("c", range(2))
    c.assert_result("c", range(2))


def test_more_streams_are_opened_as_configured(cluster: Make) -> None:
    c = cluster((1, 1), 40 * BLOCK, streams=5)
    c.start("a", range(2))
    c.assert_result("a", range(2))
    c.start("b", range(2))
    c.assert_result("b", range(2))
    assert until(lambda: all(len(m[0].exchanger.links.all()[0].streams) == 5 for m in c.members))


@pytest.mark.parametrize("closed", [0, 1])
def test_who_cannot_be_dialled_dials(cluster: Make, closed: int) -> None:
    c = cluster((2, 3), 60 * BLOCK, closed={closed})
    c.start("a", range(2))
    c.assert_result("a", range(2))


def test_two_that_cannot_be_dialled_have_no_way(cluster: Make) -> None:
    c = cluster((1, 1), 9 * BLOCK, closed={0, 1})
    c.start("a", range(2))
    assert c.ended("a", range(2))
    assert "can be dialled" in c.members[0][0].outcomes["a"].reason


def test_every_block_has_one_owner_and_one_rank_per_member() -> None:
    for blocks in (1, 2, 3, 7, 16, 61):
        for worlds in ((1,), (1, 1), (4, 1), (2, 3, 1), (5, 7, 2)):
            plan = cells(blocks, worlds, ownership([1.0] * len(worlds)))
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
    assert until(lambda: len(heard) == 3) and c.ended("a", [1])
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
