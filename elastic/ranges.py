"""Which blocks of a transfer are asked of whom: work-stealing over ranges of blocks. Pure."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from elastic.plan import chunks, rank_blocks

Source = tuple[str, int]
"""(member, rank): one connection."""
PATIENCE = 0.5
"""Seconds after which a range that nobody has answered is asked of a second source, if that has nothing else to do."""


class Range(NamedTuple):
    """Blocks [first, last) of a fragment, all in one rank's slice at every member."""

    fragment: int
    first: int
    last: int


def split(fragment: int, blocks: int, first: int, last: int, worlds: Sequence[int], size: int) -> Iterator[Range]:
    """Blocks [first, last) of a fragment of `blocks` as ranges of at most `size`. worlds: the members' numbers of ranks."""
    cuts = {cut for world in worlds for rank in range(world) for cut in rank_blocks(blocks, rank, world)}
    edges = [first, *sorted(cut for cut in cuts if first < cut < last), last]
    for a, b in itertools.pairwise(edges):
        for chunk in chunks(a, b, size):
            yield Range(fragment, *chunk)


class Schedule:
    """Ranges that are to be had, under way, had, or left over. Sources claim what comes next, so that a faster one serves
    more; who has nothing left to claim asks once more for what another one is slow with."""

    def __init__(self, ranges: Mapping[Range, frozenset[Source]]) -> None:
        """ranges: each with the sources that could have it."""
        self.sources = ranges
        self.alive = frozenset[Source]().union(*ranges.values())
        self.left: list[Range] = []
        """Not to be had any more: of fragments that were given up."""
        self._todo: dict[frozenset[Source], deque[Range]] = {}
        for one, sources in ranges.items():
            self._todo.setdefault(sources, deque()).append(one)
        self._asked: dict[Range, dict[Source, float]] = {}
        """Under way, oldest first: who was asked when."""
        self._given_up = set[int]()

    def claim(self, source: Source, now: float) -> Range | None:
        """What `source` is to be asked for next, if anything."""
        for sources, todo in self._todo.items():
            if source in sources and todo:
                one = todo.popleft()
                self._asked[one] = {source: now}
                return one
        for one, askers in self._asked.items():
            slow = len(askers) == 1 and now - min(askers.values()) >= PATIENCE
            if slow and source not in askers and source in self.sources[one]:
                askers[source] = now
                return one
        return None

    def done(self, one: Range) -> bool:
        """Whether this is the first time that it came."""
        return self._asked.pop(one, None) is not None

    def give_back(self, source: Source, one: Range) -> None:
        """`source` does not have it now: somebody else's turn, or its own again."""
        askers = self._asked.get(one)
        if askers is None or askers.pop(source, None) is None or askers:
            return
        del self._asked[one]
        if one.fragment in self._given_up:
            self.left.append(one)
        else:
            self._todo[self.sources[one]].appendleft(one)

    def lose(self, source: Source) -> None:
        """It is gone; what it owed is for the others."""
        self.alive -= {source}
        for one in [one for one, askers in self._asked.items() if source in askers]:
            self.give_back(source, one)

    def give_up(self, fragment: int) -> None:
        """What is under way of a fragment may still come, no more of it is asked for."""
        self._given_up.add(fragment)
        for todo in self._todo.values():
            self.left += [one for one in todo if one.fragment == fragment]
            kept = [one for one in todo if one.fragment != fragment]
            todo.clear()
            todo.extend(kept)

    @property
    def over(self) -> bool:
        """Nothing is under way, and nobody is left who could be asked for the rest."""
        return not self._asked and not any(todo and sources & self.alive for sources, todo in self._todo.items())

    @property
    def missing(self) -> list[Range]:
        """What has not come."""
        return sorted([*self.left, *self._asked, *(one for todo in self._todo.values() for one in todo)])
