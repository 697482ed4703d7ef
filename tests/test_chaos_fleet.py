"""What a run under fire does to a region's processes, and which ends it excuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.attackers import until
from tests.chaos.fleet import LEAVE_SECONDS, RESTART_SECONDS, Unit
from tests.e2e.cluster import children, exchanges, uploaders

RANK = """
    import os, sys, time
    from ckpt.arena import Arena
    from ckpt.uploads import Uploads
    from elastic.process import Exchange, fork

    def exchanging(pipe):
        pipe.receive()
        pipe.send({"endpoint": ""})
        pipe.receive()

    exchange = Exchange(fork(exchanging), lambda: sys.argv[2] == "stays" or os._exit(1))
    uploads = Uploads(Arena.create(1), sys.argv[1])
    exchange.open({})
    print("ready", flush=True)
    time.sleep(1000)
"""
"""A rank's processes, as diloco.train has them."""
TORCHRUN = """
    import subprocess, sys
    ranks = [subprocess.Popen([sys.executable, "-c", *sys.argv[1:]]) for _ in range(2)]
    for rank in ranks:
        rank.wait()
"""


class Here:
    """A lab of this machine alone."""

    def popen(self, place: str, command: list[str], **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(command, **options)


Start = Callable[..., Unit]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    units: list[Unit] = []

    def started(then: str = "ends", ranks: int = 1) -> Unit:
        head = [] if ranks == 1 else [textwrap.dedent(TORCHRUN)]
        command = [sys.executable, "-c", *head, textwrap.dedent(RANK), str(tmp_path / "store"), then]
        lab: Any = Here()
        unit = Unit(lab, "a", tmp_path / f"{len(units)}.log", lambda unit: command, ranks)
        units.append(unit)
        begin(unit)
        return unit

    yield started
    for unit in units:
        unit.kill()
        assert unit.process is None or unit.process.wait(10)


def begin(unit: Unit) -> None:
    """Starts what is due, all of its processes included."""
    ready = unit.tail().count("ready") + unit.ranks
    time.sleep(max(0.0, unit.start_at - time.monotonic()))
    assert unit.tend(time.monotonic()) == ""
    assert until(lambda: unit.tail().count("ready") == ready, 60), unit.tail()
    assert until(lambda: all(len(uploaders(rank)) == 1 for rank in unit.rank_pids()))


def end(unit: Unit) -> str:
    """What is said about an end that is under way."""
    assert until(lambda: not unit.up), unit.tail()
    return unit.tend(time.monotonic())


def crash(unit: Unit) -> None:
    assert unit.process is not None
    os.kill(unit.process.pid, signal.SIGKILL)


def test_a_rank_is_killed_by_its_exchanges_which_excuses_that_end_alone(start: Start) -> None:
    unit = start()
    for seed in range(3):
        (rank,) = unit.rank_pids()
        assert sorted(exchanges(rank) + uploaders(rank)) == sorted(children(rank)) and len(children(rank)) == 2
        assert unit.kill_one(Random(seed)) and unit.doomed
        assert end(unit) == "" and not unit.doomed
        begin(unit)
    crash(unit)
    assert "ended by itself" in end(unit)


def test_a_helper_that_is_killed_excuses_nothing(start: Start) -> None:
    unit = start()
    (rank,) = unit.rank_pids()
    assert unit.kill_helper(Random(0))
    assert until(lambda: not uploaders(rank))
    assert unit.up and not unit.doomed and exchanges(rank)
    assert not unit.kill_helper(Random(0)), "there is none any more"
    crash(unit)
    assert "ended by itself" in end(unit)


def test_who_does_not_end_without_exchanges_is_told_of(start: Start) -> None:
    """Else any later crash would be excused."""
    unit = start("stays")
    (rank,) = unit.rank_pids()
    assert unit.kill_one(Random(0))
    assert until(lambda: not exchanges(rank)) and unit.up
    assert not unit.kill_one(Random(0)), "there are none any more"
    assert unit.tend(time.monotonic()) == ""
    assert "did not end" in unit.tend(time.monotonic() + LEAVE_SECONDS + RESTART_SECONDS)
    assert end(unit) == "", "it is told once"


def test_of_several_ranks_one_is_killed_and_no_helper(start: Start) -> None:
    for seed in range(2):
        unit = start(ranks=2)
        ranks = unit.rank_pids()
        helpers = [pid for rank in ranks for pid in uploaders(rank)]
        assert len(ranks) == 2 and len(helpers) == 2
        assert unit.kill_helper(Random(seed))
        assert until(lambda ranks=ranks: sum(len(uploaders(rank)) for rank in ranks) == 1)
        assert unit.kill_one(Random(seed)) and not unit.doomed, "torchrun starts it again"
        assert until(lambda ranks=ranks: sum(bool(exchanges(rank)) for rank in ranks) == 1)
        assert unit.up
