"""A rank's exchanges in a process of their own: shared memory, the pipe, and the ends of both sides."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from diloco.averaging import Averaging
from diloco.codec import CodecConfig, build_codec
from diloco.exchanging import Setup
from diloco.fragments import Fragment, Slot, digest
from elastic.memory import DESCRIPTORS, INLINE, Pipe, pipes, shared_bytes, shared_zeros
from elastic.order import Key, Order, Outcome, Party
from elastic.process import Exchange
from tests.exchange_cluster import until

ELEMENTS, BLOCK = 20 * 512 + 100, 512
KEY: Key = (0, 0, 0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both_sides_of_a_pipe_see_the_same_memory() -> None:
    one, other = pipes()
    numbers, nothing, text = shared_zeros(1000), shared_zeros(0), shared_bytes(b"bits")
    one.send({"a": [1, None]}, [numbers, nothing, text])
    message, (there, empty, bits) = other.receive()
    assert message == {"a": [1, None]} and bits.numpy().tobytes() == b"bits" and empty.numel() == 0
    there[7] = 5.0
    numbers[8] = 6.0
    assert numbers[7] == 5.0 and there[8] == 6.0 and there.dtype == torch.float32


@pytest.mark.parametrize("size", [INLINE - 100, INLINE, INLINE + 1, 5 << 20])
def test_long_messages_arrive_whole(size: int) -> None:
    one, other = pipes()
    one.send({"long": "x" * size}, [shared_bytes(b"y")])
    message, tensors = other.receive()
    assert message["long"] == "x" * size and tensors[0].numpy().tobytes() == b"y"


def test_memory_ends_with_its_tensors() -> None:
    one, other = pipes()
    before = open_files()
    for _ in range(3):
        one.send({}, [shared_zeros(1 << 16) for _ in range(DESCRIPTORS)])
        other.receive()
    assert open_files() == before


def test_only_what_is_shared_is_handed_over() -> None:
    one, _ = pipes()
    for flat in (torch.zeros(5), shared_zeros(5)[1:], shared_zeros(5)[:4]):
        with pytest.raises(ValueError, match="shared_zeros"):
            one.send({}, [flat])


def test_who_is_gone_is_noticed() -> None:
    one, other = pipes()
    del one
    with pytest.raises(ConnectionError):
        other.receive()


# The process


APART = """
import socket, sys
from diloco import exchanging
from elastic.memory import Pipe
exchanging.main(Pipe(socket.socket(fileno=int(sys.argv[1]))))
"""


def spawn() -> tuple[Pipe, subprocess.Popen[bytes]]:
    """A process as `fork` makes it, but from the start: this one has had threads, some of which are others'."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        command = [sys.executable, "-c", APART, str(other.fileno())]
        process = subprocess.Popen(command, pass_fds=[other.fileno()], stderr=subprocess.DEVNULL)
    return Pipe(one), process


class Rank:
    """One rank of a member, with its exchanges apart."""

    def __init__(self, member: str, codec: CodecConfig, feedback: bool = False) -> None:
        self.lost = threading.Event()
        pipe, self.process = spawn()
        self.exchange = Exchange(pipe, self.lost.set)
        self.outcomes: dict[str, Outcome] = {}
        self.exchange.on_outcome = lambda outcome: self.outcomes.update({outcome.attempt: outcome})
        identity = {"run": "r", "fingerprint": "{}", "member": member, "rank": 0}
        setup = Setup(identity, "127.0.0.1", [ELEMENTS], BLOCK, vars(codec), compile=False, stall=10.0)
        self.endpoint = self.exchange.open(setup.message())["endpoint"]
        fragment = Fragment(0, (Slot("w", (ELEMENTS,), 0),), BLOCK)
        self.averaging = Averaging([fragment], build_codec(codec), zeros=shared_zeros)
        self.theta, self.local = shared_zeros(ELEMENTS), shared_zeros(ELEMENTS)
        self.residual = shared_zeros(ELEMENTS) if feedback else None
        torch.manual_seed(hash(member) % 1000)
        self.local.normal_()
        blocks = self.averaging.blocks(0)
        self.contribution = self.averaging.contribution(0, 0, blocks, self.theta, self.local, self.residual, 3)

    def start(self, attempt: str, parties: tuple[Party, ...], me: int) -> None:
        self.exchange.start(Order(attempt, KEY, parties, (1 << 19, 1 << 19), me))


def pair(codec: CodecConfig, feedback: bool = False) -> tuple[list[Rank], tuple[Party, ...]]:
    ranks = [Rank(name, codec, feedback) for name in ("eu_1", "us_2")]
    return ranks, tuple(Party(n, (r.endpoint,), 64.0) for n, r in zip(("eu_1", "us_2"), ranks, strict=True))


@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_two_ranks_hold_the_mean_of_what_they_offered(codec: str) -> None:
    ranks, parties = pair(CodecConfig(codec, error_feedback=True), feedback=True)
    for k, rank in enumerate(ranks):
        rank.exchange.offer(KEY, rank.contribution)
        rank.start("a", parties, k)
    assert until(lambda: all("a" in rank.outcomes for rank in ranks))
    averaging, blocks = ranks[0].averaging, ranks[0].averaging.blocks(0)
    again = [averaging.contribution(0, 0, blocks, r.theta, r.local, r.residual, 3).read(0, blocks) for r in ranks]
    expected = averaging.reduce(0, 0, blocks, again, [64.0, 64.0])[0]
    for rank, bits in zip(ranks, again, strict=True):
        result, outcome = rank.exchange.result("a"), rank.outcomes["a"]
        assert result is not None and outcome.digests is not None and torch.equal(result, expected)
        assert digest(outcome.digests) == digest(averaging.digests(0, 0, blocks, expected, 2))
        assert torch.equal(rank.contribution.read(0, blocks), bits)  # the other process's, not encoded anew
        assert not rank.contribution._todo
        rank.contribution.update_residual()
        left = rank.theta - rank.local - averaging.decode(0, 0, blocks, bits)
        assert rank.residual is not None and torch.equal(rank.residual, left)
        rank.exchange.decided(KEY)
        assert rank.exchange.result("a") is None
        rank.exchange.close()


def test_what_was_not_offered_is_cancelled_and_what_is_dropped_is_not_held() -> None:
    ranks, parties = pair(CodecConfig("int8"))
    ranks[0].start("early", parties, 0)
    assert until(lambda: "early" in ranks[0].outcomes)
    assert ranks[0].outcomes["early"].reason == "cancelled" and ranks[0].outcomes["early"].digests is None
    ranks[0].exchange.offer(KEY, ranks[0].contribution)
    ranks[0].start("alone", parties, 0)  # the other one never comes
    ranks[0].exchange.cancel("alone")
    assert until(lambda: "alone" in ranks[0].outcomes)
    ranks[0].start("single", parties[:1], 0)
    assert until(lambda: "single" in ranks[0].outcomes) and ranks[0].exchange.result("single") is not None
    ranks[0].exchange.drop("single")
    assert ranks[0].exchange.result("single") is None
    for rank in ranks:
        rank.exchange.close()


def test_a_process_that_is_killed_is_told_at_once() -> None:
    rank = Rank("eu_1", CodecConfig("int8"))
    assert not rank.lost.is_set()
    rank.process.kill()
    assert rank.lost.wait(10)
    rank.process.wait()


PARENT = """
import json, os, sys, time
from elastic.process import fork

def main(pipe):
    pipe.send({"pid": os.getpid()})
    pipe.receive()

pipe = fork(main)
print(pipe.receive()[0]["pid"], flush=True)
sys.stdin.read()
"""


def test_it_ends_with_its_rank_and_not_before() -> None:
    rank: Any = subprocess.Popen([sys.executable, "-c", PARENT], stdin=-1, stdout=-1, text=True)
    pid = int(rank.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT):  # meant for the rank, which decides
        os.kill(pid, number)
    assert not until(lambda: not os.path.exists(f"/proc/{pid}"), 0.3)
    rank.kill()
    rank.wait()
    assert until(lambda: not os.path.exists(f"/proc/{pid}"))
