"""A region that leaps over rounds whose bits are gone: it takes one whole state, with its own progress on top, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt.checkpoint import DamagedError
from diloco.bits import leap
from diloco.fragments import Fragment, Slot
from diloco.planes import Planes

FRAGMENT = Fragment(0, (Slot("w", (200,), 0),), block=64)
ENTRY = {"seq": 7, "epoch": 0, "fragment": 0, "base": 4}
CHECKPOINT = ["checkpoints/r/9"]


class World:
    """A trainer as `leap` sees it, one rank of as many as `others` has answers besides."""

    def __init__(self, load: Callable[[], tuple[set[int], list[Tensor]]], others: list[list[int]]) -> None:
        torch.manual_seed(0)
        self.planes = Planes([FRAGMENT], [(0, FRAGMENT.blocks)])
        self.planes.load(0, 4, torch.randn(200), torch.randn(200))
        self.x = self.planes.theta[0] + 0.25
        self.snapshots: dict[int, str] = {0: "in flight"}
        self.decided: list[Any] = []
        self.missed: list[int] = []
        gather = SimpleNamespace(rank=0, gather_bytes=lambda data: [data, *(json.dumps(o).encode() for o in others)])
        self.trainer: Any = SimpleNamespace(
            planes=self.planes,
            snapshots=self.snapshots,
            region=gather,
            clock=SimpleNamespace(missed=lambda: self.missed.append(1)),
            shards=SimpleNamespace(read=lambda f: self.x.clone(), write=lambda f, flat: self.x.copy_(flat)),
            links=SimpleNamespace(
                member="us",
                checkpoints=SimpleNamespace(load_fragment=lambda *_: load()),
                exchanger=SimpleNamespace(decided=self.decided.append),
            ),
        )


def newer(base: int = 9) -> tuple[set[int], list[Tensor]]:
    return {base}, [torch.full((200,), 3.0), torch.full((200,), 5.0)]


def test_a_newer_state_with_the_regions_own_progress_on_top() -> None:
    world = World(newer, [[9]])
    assert leap(world.trainer, ENTRY, CHECKPOINT)
    assert world.planes.bases == [9] and (world.planes.theta[0] == 3).all() and (world.planes.momentum[0] == 5).all()
    torch.testing.assert_close(world.x, torch.full((200,), 3.25))
    assert not world.snapshots and world.decided == [(0, 0, 4)] and not world.missed


def test_without_a_snapshot_in_flight_a_round_was_missed() -> None:
    world = World(newer, [])
    world.snapshots.clear()
    assert leap(world.trainer, ENTRY, CHECKPOINT) and world.missed


def raising(error: Exception) -> Callable[[], Any]:
    def load() -> Any:
        raise error

    return load


@pytest.mark.parametrize(
    ("load", "others"),
    [
        (newer, [[10]]),  # a round was committed between two ranks' looks
        (newer, [[9, 10]]),  # or in the middle of one's
        (lambda: newer(6), [[6]]),  # not newer than the round that is wanted
        (raising(DamagedError("checkpoints/r/9 is damaged")), [[9]]),
        (raising(OSError("gone")), []),
    ],
)
def test_anything_else_changes_nothing(load: Callable[[], Any], others: list[list[int]]) -> None:
    world = World(load, others)
    theta, x = world.planes.theta[0].clone(), world.x.clone()
    assert not leap(world.trainer, ENTRY, CHECKPOINT)
    assert torch.equal(world.planes.theta[0], theta) and torch.equal(world.x, x)
    assert world.planes.bases == [4] and world.snapshots and not world.decided
