"""Memory that outlives its rank: real ranks that are killed, real uploaders, and who comes in their place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ckpt.arena import Arena
from ckpt.parts import Held
from ckpt.survivor import find
from ckpt.uploads import Uploads
from tests.uploading import until

HELD = [Held("theta", 0, 0, 1000, 1000, 0), Held("x", 0, 0, 500, 1000, 4000)]
CONTENTS = bytes(range(250)) * 24


def rank(url: str, name: str, seq: str, linger: str, then: str) -> None:
    """Saves, does something more, and lives until it is killed."""
    arena = Arena.create(len(CONTENTS))
    arena.bytes[:] = CONTENTS
    uploads = Uploads(arena, url)
    what = {"seq": int(seq), "held": [vars(held) for held in HELD]}
    keep = {"name": name, "linger": float(linger), "what": what}
    times = {"since": time.monotonic(), "until": time.monotonic() + 60}
    uploads.submit({"id": 1, **times, "attempts": [], "rules": {}, "bits": {}, "keep": keep})
    assert uploads.wait(60)
    if then == "tear":
        arena.bytes[4321] ^= 1
    if then == "dismiss":
        uploads.dismiss()
    print(uploads.pid, flush=True)
    signal.pause()


class Rank:
    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.test_ckpt_survivor", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.uploader = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def gone(self) -> bool:
        """Its uploader."""
        return not os.path.exists(f"/proc/{self.uploader}")


Start = Callable[..., Rank]


@pytest.fixture
def name() -> str:
    return f"ckpt-{uuid.uuid4().hex}"


@pytest.fixture
def start(tmp_path: Path, name: str) -> Iterator[Start]:
    ranks: list[Rank] = []

    def start(seq: int = 7, linger: float = 60, then: str = "") -> Rank:
        ranks.append(Rank(str(tmp_path), name, str(seq), str(linger), then))
        return ranks[-1]

    yield start
    for one in ranks:
        one.kill()
        with suppress(ProcessLookupError):
            os.kill(one.uploader, signal.SIGKILL)


def test_a_successor_gets_all_of_it_once_and_may_save_into_it(start: Start, name: str) -> None:
    one = start()
    assert find(name, HELD) is None, "its rank is alive"
    one.kill()
    found = find(name, HELD)
    assert found is not None and bytes(found.arena.bytes) == CONTENTS and found.what["seq"] == 7
    until(one.gone)
    found.arena.bytes[:4] = b"next"
    assert find(name, HELD) is None


def test_nothing_of_what_was_not_taken_stays_here(start: Start, name: str) -> None:
    def mine() -> list[str]:
        return [x for fd in os.listdir("/proc/self/fd") if "ckpt-arena" in (x := link(fd))]

    def link(fd: str) -> str:
        with suppress(OSError):
            return os.readlink(f"/proc/self/fd/{fd}")
        return ""

    for one in [start(then="tear"), start(seq=3), start(seq=9)]:
        one.kill()
    before = mine()
    assert find(name, HELD[:1]) is None and mine() == before
    found = find(name, HELD)
    assert found is not None and len(mine()) == len(before) + 2, "one of them is of the map"
    del found
    assert mine() == before


def test_the_newest_is_taken(start: Start, name: str) -> None:
    for one in [start(seq=8), start(seq=9), start(seq=3)]:
        one.kill()
    found = find(name, HELD)
    assert found is not None and found.what["seq"] == 9


@pytest.mark.parametrize("change", [{"stop": 999}, {"plane": "momentum"}, {"at": 8}])
def test_what_was_saved_for_another_mesh_is_not_taken(start: Start, name: str, change: dict[str, Any]) -> None:
    one = start()
    one.kill()
    assert find(name, [Held(**{**vars(HELD[0]), **change}), HELD[1]]) is None
    assert find(name, HELD) is not None, "it is still there for its own"


def test_a_rank_that_died_while_it_copied_has_left_nothing(start: Start, name: str) -> None:
    one = start(then="tear")
    one.kill()
    assert find(name, HELD) is None
    until(one.gone)


def test_who_left_on_purpose_has_left_nothing(start: Start, name: str) -> None:
    one = start(then="dismiss")
    until(one.gone)
    assert find(name, HELD) is None


def test_nobody_is_waited_for_for_ever(start: Start, name: str) -> None:
    one = start(linger=0.2)
    one.kill()
    until(one.gone)


def test_a_stop_of_all_processes_ends_it_too(start: Start, name: str) -> None:
    one = start()
    one.kill()

    def ended() -> bool:
        with suppress(ProcessLookupError):
            os.kill(one.uploader, signal.SIGTERM)  # ignored until it lingers
        return one.gone()

    until(ended)


if __name__ == "__main__":
    rank(*sys.argv[1:])
