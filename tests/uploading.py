"""Members for tests of uploads: each an arena of its own with its slices of one state, and a real uploader process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from ckpt.arena import Arena
from ckpt.parts import Attempt, Held
from ckpt.uploads import Uploads

BLOCK = 64
"""Elements."""
SIZES = {("theta", 0): 1000, ("theta", 1): 130, ("momentum", 0): 1000, ("momentum", 1): 130}
"""(plane, fragment) -> elements."""
Planes = dict[tuple[str, int], "np.ndarray[Any, np.dtype[np.float32]]"]


def planes(seed: int = 0) -> Planes:
    random = np.random.default_rng(seed)
    return {key: random.standard_normal(size).astype(np.float32) for key, size in SIZES.items()}


def held(rank: int = 0, ranks: int = 1) -> tuple[Held, ...]:
    """The slices of a rank."""
    found, at = [], 0
    for (plane, fragment), size in SIZES.items():
        blocks = -(-size // BLOCK)
        start, stop = (min(BLOCK * (blocks * edge // ranks), size) for edge in (rank, rank + 1))
        if start < stop:
            found.append(Held(plane, fragment, start, stop, size, at))
            at += 4 * (stop - start)
    return tuple(found)


class Rank:
    """One rank of a member."""

    def __init__(self, url: str, member: str, state: Planes, rank: int = 0, ranks: int = 1) -> None:
        self.member, self.rank, self.ranks, self.held = member, rank, ranks, held(rank, ranks)
        self.arena = Arena.create(sum(4 * (each.stop - each.start) for each in self.held))
        for each in self.held:
            data = state[each.plane, each.fragment][each.start : each.stop].tobytes()
            self.arena.bytes[each.at : each.at + len(data)] = data
        self.uploads = Uploads(self.arena, url)

    def attempt(self, prefix: str, members: list[str], place: int, patience: float = 60.0) -> Attempt:
        body = {"seq": int(prefix.rsplit("/", 1)[-1])}
        who = self.member, self.rank, self.ranks
        compare = len(members) > 1 or self.member not in members
        return Attempt(prefix, body, *who, tuple(members), place, compare, BLOCK, patience, patience / 5, self.held)

    def save(self, *attempts: Attempt, seconds: float = 60.0) -> None:
        now = time.monotonic()
        job = {"id": 1, "since": now, "until": now + seconds, "attempts": [each.message() for each in attempts]}
        self.uploads.submit({**job, "rules": {}, "bits": {}})

    def outcomes(self, seconds: float = 60.0) -> list[dict[str, Any]]:
        """Of the job, once it is done."""
        assert self.uploads.wait(seconds), "the job is not done"
        return [answer for answer in self.uploads.answers() if "kind" in answer]


def until(what: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stored(folder: Path, prefix: str) -> bool:
    return (folder / prefix / "manifest.json").is_file()
