"""What the members say that they have: bases and the digests of all blocks, of which a joiner believes what the journal or the
members agree on."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from diloco.agreeing import Agreed, Roots, agree, named, roots_of
from diloco.fold import State
from diloco.fragments import Fragment
from elastic.recovery import Donor, Lines, read_all
from elastic.wire import NONSENSE

DIGEST = 32
SETTLE = 2.0
"""Seconds that a joiner waits for a second member to say what a first one does."""

Look = Callable[[], tuple[list[bytes], State]]
"""The journal's entries up to now and the state after them. Rank 0's."""
Said = tuple[int, list[bytes]]
"""Of a fragment: its base, and each plane's digests of all its blocks; none if they make no sense."""


@dataclass(frozen=True)
class Surveyed:
    """A fragment as it is to be fetched."""

    base: int
    roots: Roots
    digests: tuple[bytes, ...]
    """Of each plane, of all blocks."""

    def encode(self) -> list[Any]:
        return [self.base, self.roots, [base64.b64encode(plane).decode() for plane in self.digests]]

    @staticmethod
    def decode(data: list[Any]) -> Surveyed:
        base, (theta, momentum), planes = data
        return Surveyed(base, (theta, momentum), tuple(base64.b64decode(text) for text in planes))

    def digest(self, plane: int, block: int) -> bytes:
        return self.digests[plane][DIGEST * block : DIGEST * (block + 1)]


def survey(
    lines: Lines, donors: Sequence[Donor], fragments: Sequence[Fragment], planes: int, look: Look
) -> dict[str, Any]:
    """The `fragments` to fetch, and the `members` to ask; or the `reason` why there is nothing. Waits a little for a second
    member to have merged what a first one has."""
    deadline = time.monotonic() + SETTLE
    while True:
        said = _ask_all(lines, donors, fragments, planes)
        try:
            entries, state = look()  # after the donors were asked: what they have is in the journal then
        except OSError as error:
            return {"reason": f"the journal cannot be read: {error}"}
        found = [_agree(said, i, named(entries, state, f.index)) for i, f in enumerate(fragments)]
        firm = all(one is not None and (one.firm or len(said) < 2) for one in found)
        if firm or time.monotonic() > deadline:
            return _verdict(lines, said, fragments, found)
        time.sleep(0.1)


def _agree(said: dict[str, list[Said]], i: int, known: dict[int, Roots | None]) -> Agreed | None:
    return agree({member: (ones[i][0], roots_of(ones[i][1])) for member, ones in said.items() if ones[i][1]}, known)


def _verdict(
    lines: Lines, said: dict[str, list[Said]], fragments: Sequence[Fragment], found: Sequence[Agreed | None]
) -> dict[str, Any]:
    members, surveyed = set(said), []
    for i, (fragment, agreed) in enumerate(zip(fragments, found, strict=True)):
        if agreed is None:
            what = ", ".join(f"{member} has entry {ones[i][0]}" for member, ones in sorted(said.items()))
            return {"reason": f"no agreement on fragment {fragment.index}: {what or 'no member says what it has'}"}
        for member in agreed.liars:
            who = identity.member if (identity := lines.node.identity) else ""
            print(
                f"{who}: {member} has another fragment {fragment.index} of entry {agreed.base} than the run: others are asked",
                flush=True,
            )
        members -= set(agreed.liars)
        surveyed.append(Surveyed(agreed.base, agreed.roots, tuple(said[agreed.members[0]][i][1])).encode())
    return {"members": sorted(members), "fragments": surveyed}


def _ask_all(
    lines: Lines, donors: Sequence[Donor], fragments: Sequence[Fragment], planes: int
) -> dict[str, list[Said]]:
    """By member, of those that answer."""

    def one(donor: Donor) -> list[Said] | None:
        try:
            answers = read_all(lines, donor, "digests", [(f.index, f.blocks) for f in fragments], DIGEST * planes)
        except (OSError, *NONSENSE) as error:
            print(f"{donor.member} does not say what it has: {error}", flush=True)
            return None
        return [(base, _planes(runs, f.blocks, planes)) for (base, runs), f in zip(answers, fragments, strict=True)]

    with ThreadPoolExecutor(max(len(donors), 1)) as pool:
        answers = list(pool.map(one, donors))
    return {donor.member: found for donor, found in zip(donors, answers, strict=True) if found is not None}


def _planes(runs: Sequence[bytearray], blocks: int, planes: int) -> list[bytes]:
    """Runs of blocks, each plane after plane -> each plane's digests of all blocks."""
    cut = [[run[i * len(run) // planes : (i + 1) * len(run) // planes] for run in runs] for i in range(planes)]
    whole = [b"".join(plane) for plane in cut]
    return whole if all(len(plane) == DIGEST * blocks for plane in whole) else []
