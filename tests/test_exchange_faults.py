"""Exchanges that go wrong: peers that die, stall, never start, or send what they should not."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.averaging import Averaging
from elastic import attempt
from elastic.attempt import Attempt
from elastic.links import EARLY
from elastic.order import Contribution
from elastic.wire import HEAD, MAGIC, Connection, WireError, encode
from tests.exchange_cluster import BLOCK, KEY, Cluster, Make, until
from tests.exchange_cluster import cluster as cluster


class Gate(Averaging):
    """Stands still in `reduce` until opened, so that an exchange can be caught in the middle."""

    def __init__(self, inner: Averaging) -> None:
        super().__init__(inner.fragments, inner.codec)
        self.reached, self.opened = threading.Event(), threading.Event()

    def reduce(self, *args: Any) -> tuple[Tensor, list[float]]:
        self.reached.set()
        assert self.opened.wait(60)
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
    c = cluster((1, 2, 1), 60 * BLOCK, stall=5.0)
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


def test_who_is_given_up_hears_it_and_blames_nobody(cluster: Make) -> None:
    """However late the word is sent: one that saw its connection break first would tell all others that it was the other
    side's fault."""
    c = cluster((1, 1, 1), 60 * BLOCK, stall=0.5)
    victim = gate(c, 1)
    c.start("a", range(3))
    assert victim.reached.wait(10)
    for k in (0, 2):
        for link in c.members[k][0].exchanger.links.all():
            if link.peer[0] == c.names[1]:
                for stream in link.streams:
                    stream.send = partial(slowly, stream.send)  # type: ignore[method-assign]
    assert c.ended("a", [0, 2])
    (stuck,) = c.members[1][0].exchanger._attempts.values()
    assert until(lambda: stuck.failed is not None)
    assert stuck.failed is not None and stuck.failed.suspects == {c.names[1]}, stuck.failed
    assert all(c.members[k][0].outcomes["a"].suspects == {c.names[1]} for k in (0, 2))
    victim.opened.set()
    assert c.ended("a", [1])
    for member in c.members:
        member[0].exchanger.stall = 10.0  # a busy machine's silence is no stall
    c.start("b", range(3))  # over new links, of which the old ones' end is none of their business
    c.assert_result("b", range(3))


def slowly(send: Any, *frame: Any) -> Any:
    time.sleep(0.3)
    return send(*frame)


def test_who_was_stopped_itself_does_not_blame_the_others(cluster: Make) -> None:
    """As with SIGSTOP and SIGCONT, or on a machine that starves: what they sent meanwhile has not been read yet."""
    c = cluster((1, 1), 40 * BLOCK)
    one = attempt_of(c, 0, range(2))
    one._look()
    long_ago = one._looked - 100.0
    one.begun = one._looked = long_ago
    for side in one.sides.values():
        side.begun = long_ago
    one._look()
    assert one.failed is None
    for side in one.sides.values():
        side.awake = long_ago  # but its own eyes were open all the time
    one._look()
    assert one.failed is not None and one.failed.suspects == {c.names[1]}


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


def test_wrong_and_repeated_chunks_are_refused(cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "LEAST_CHUNKS", 1)  # of several blocks: a number between two chunks is none
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


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "int4", "topk"])
def test_who_announces_less_than_it_sends_is_named(cluster: Make, codec: str) -> None:
    c = cluster((1, 1, 1), 60 * BLOCK, codec)
    honest = [delta.norm().item() for delta in c.deltas]
    c.norms = [*honest]
    c.start("a", range(3))
    assert c.ended("a", range(3)) and all(c.members[k][0].outcomes["a"].digests is not None for k in range(3))
    # Most of a sparse contribution's norm is not sent, so more of it may be hidden.
    c.norms = [honest[0], honest[1] / 20, honest[2]]
    c.start("b", range(3))
    assert c.ended("b", [0, 2])
    outcomes = [c.members[k][0].outcomes["b"] for k in (0, 2)]
    assert all(outcome.digests is None and outcome.suspects == {c.names[1]} for outcome in outcomes)
    assert any("announced a norm of" in outcome.reason for outcome in outcomes)
    c.start("c", [0, 2])
    assert c.ended("c", [0, 2]) and all(c.members[k][0].outcomes["c"].digests is not None for k in (0, 2))


def test_a_contribution_of_zeros_may_announce_no_norm(cluster: Make) -> None:
    """As of a region whose parameters are not finite."""
    c = cluster((1, 2), 20 * BLOCK, "int4")
    c.deltas[0].zero_()
    c.encoded[0], c.norms = c.averaging.encode(0, c.deltas[0]), [0.0, c.deltas[1].norm().item()]
    c.start("a", range(2))
    c.assert_result("a", range(2))
