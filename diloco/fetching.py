"""θ and moments from the members that are alive, all at once; each block is checked against its digest before it counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from diloco.agreeing import Roots
from diloco.fragments import Fragment
from diloco.parallel import Region, on_rank_0
from diloco.planes import Planes
from diloco.surveying import Look, Surveyed, survey
from elastic.fetching import Transfer, Want
from elastic.node import Node
from elastic.ranges import Range
from elastic.recovery import Donor, Lines, Unavailable

RANGE = 1 << 20
"""Bytes that are asked for at a time, of all planes together: while a donor copies them, its outer step would have to wait."""


class Fetch:
    """This rank's slices of fragments, on their way here."""

    def __init__(self, node: Node, region: Region, planes: Planes, into: Mapping[int, Sequence[Tensor]]) -> None:
        """planes: what they look like; into: fragment -> the tensors to write, fp32, one per plane, of this rank's slice."""
        self.lines, self.region, self.planes, self.into = Lines(node), region, planes, into
        self.held = {f: [-1] * (planes.slices[f][1] - planes.slices[f][0]) for f in into}
        """Fragment -> the last round in each block of the slice; -1: it has not come."""
        self.bases: dict[int, list[int]] = {}
        """Fragment -> those of all ranks' blocks. Where a round was committed meanwhile, there are several: what had come
        stays, and wants the round's bits."""
        self.words: dict[tuple[int, int], Roots] = {}
        """(fragment, base) -> the digests that the blocks of it were checked against: what a later entry has to name."""
        self.served: Counter[str] = Counter()
        """Member -> bytes that came from it."""

    def run(self, donors: Sequence[Donor], look: Look) -> None:
        """Collective, once. Raises Unavailable on all ranks, with `into` in pieces."""
        try:
            self._run(donors, look)
        finally:
            self.lines.close()

    def _run(self, donors: Sequence[Donor], look: Look) -> None:
        fragments = [self.planes.fragments[f] for f in self.into]
        over = False
        while not over:
            ask = partial(survey, self.lines, donors, fragments, len(self.planes.names), look)
            said = on_rank_0(self.region, ask)
            if "reason" in said:
                raise Unavailable(said["reason"])
            surveyed = dict(zip(self.into, map(Surveyed.decode, said["fragments"]), strict=True))
            self.words |= {(f, one.base): one.roots for f, one in surveyed.items()}
            over, out = self._together([donor for donor in donors if donor.member in said["members"]], surveyed)
            donors = [donor for donor in donors if donor.member in said["members"] and donor.member not in out]
        ranks = self._gather([sorted(set(held)) for held in self.held.values()])
        self.bases = {f: sorted({base for rank in ranks for base in rank[i]}) for i, f in enumerate(self.into)}
        self.words = {key: roots for key, roots in self.words.items() if key[1] in self.bases[key[0]]}

    def _together(self, donors: Sequence[Donor], surveyed: Mapping[int, Surveyed]) -> tuple[bool, set[str]]:
        """Whether all ranks have everything now, and the members that some rank had forged blocks from. Raises Unavailable."""
        forgers, reason = set[str](), ""
        try:
            forgers = self._fetch(donors, surveyed)
        except OSError as error:
            reason = str(error)
        whole = all(base >= 0 for held in self.held.values() for base in held)
        said = self._gather([whole, sorted(forgers), reason])
        if reasons := [reason for _, _, reason in said if reason]:
            raise Unavailable(reasons[0])
        return all(whole for whole, *_ in said), {member for _, names, _ in said for member in names}

    def _gather(self, mine: list[Any]) -> list[list[Any]]:
        return [json.loads(data) for data in self.region.gather_bytes(json.dumps(mine).encode())]

    def _fetch(self, donors: Sequence[Donor], surveyed: Mapping[int, Surveyed]) -> set[str]:
        """What is missing, as far as it comes. Returns who sent something else than was surveyed. Raises Unavailable."""
        wants = [want for f, one in surveyed.items() for want in self._missing(f, one.base)]
        if not wants:
            return set()
        size = max(1, RANGE // (4 * self.planes.fragments[0].block * len(self.planes.names)))
        check, place = partial(self._check, surveyed), partial(self._place, surveyed)
        transfer = Transfer(self.lines, donors, "planes", wants, size, check, place)
        try:
            transfer.run()
        finally:
            self.served.update(transfer.served)
        return transfer.forgers

    def _missing(self, f: int, base: int) -> list[Want]:
        first, _ = self.planes.slices[f]
        missing = [first + i for i, held in enumerate(self.held[f]) if held < 0]
        return [Want(f, self.planes.fragments[f].blocks, a, b, base) for a, b in runs(missing)]

    def _check(self, surveyed: Mapping[int, Surveyed], one: Range, data: bytearray) -> bool:
        """Every block of every plane."""
        fragment, count = self.planes.fragments[one.fragment], len(self.planes.names)
        start, stop = fragment.span(one.first, one.last)
        size, block = 4 * (stop - start), 4 * fragment.block
        if len(data) != size * count:
            return False
        parts = [memoryview(data)[i * size : (i + 1) * size] for i in range(count)]
        return all(
            blake3(part[at : at + block]).digest() == surveyed[one.fragment].digest(plane, one.first + at // block)
            for plane, part in enumerate(parts)
            for at in range(0, size, block)
        )

    def _place(self, surveyed: Mapping[int, Surveyed], one: Range, data: bytearray) -> None:
        own = self.planes.slices[one.fragment]
        place(self.planes.fragments[one.fragment], own, self.into[one.fragment], one, data)
        base = surveyed[one.fragment].base
        self.held[one.fragment][one.first - own[0] : one.last - own[0]] = [base] * (one.last - one.first)


def place(fragment: Fragment, own: tuple[int, int], into: Sequence[Tensor], one: Range, data: bytearray) -> None:
    """Writes a range's bytes, fp32 of one plane after the other, into `into`: slices of the blocks `own`, one per plane."""
    origin, _ = fragment.span(*own)
    start, stop = fragment.span(one.first, one.last)
    parts = torch.frombuffer(data, dtype=torch.float32).view(len(into), stop - start)
    for plane, part in zip(into, parts, strict=True):
        plane[start - origin : stop - origin] = part


def runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs [a, b)."""
    starts = [i for i, block in enumerate(blocks) if i == 0 or blocks[i - 1] != block - 1]
    return [(blocks[i], blocks[j - 1] + 1) for i, j in zip(starts, [*starts[1:], len(blocks)], strict=False)]
