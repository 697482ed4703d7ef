"""Who of several members uploads what of a state that all of them hold, and when that is a checkpoint. Pure.

Members are alike, or should be: each uploads its *share* of the blocks of every fragment, as far as its ranks' slices have
it, and says in *parts* (JSON, one per rank) which shards it has stored, and a digest of ALL blocks that its ranks hold. That
digest is a sum over blocks, so the ranks' add up to the same total whatever the cut. A share is there once all ranks of one
member have said so: its own member's, or any other's that made up for it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from ckpt.format import FORMAT, decode_json, encode_json, field, is_count, is_list, require

MODULUS = 1 << 256
SHARD = (1 << 22) - (1 << 16)
"""Elements of a shard, which an upload holds in memory: with a header it is one chunk of ckpt.format, and hashed once."""
STRIP = 128
"""Blocks in a strip at most."""
ITEM = 4
"""Bytes of an element."""
FOLDER = "parts"


@dataclass(frozen=True)
class Held:
    """Elements [start, stop) of a fragment (of `elements`) of a plane, at byte `at` of the arena. start is that of a block,
    and stop, too, or the end."""

    plane: str
    fragment: int
    start: int
    stop: int
    elements: int
    at: int

    def cut(self, start: int, stop: int) -> Held:
        return Held(self.plane, self.fragment, start, stop, self.elements, self.at + ITEM * (start - self.start))


@dataclass(frozen=True)
class Attempt:
    """One rank's attempt at a checkpoint <prefix>. members: those that have a share; place: of this member among all that
    attempt it, which says who waits for whom; compare: whether there are others; patience and stagger: seconds."""

    prefix: str
    body: dict[str, Any]
    member: str
    rank: int
    ranks: int
    members: tuple[str, ...]
    place: int
    compare: bool
    block: int
    patience: float
    stagger: float
    held: tuple[Held, ...]

    @property
    def shares(self) -> list[int]:
        """Of this member: one or none."""
        return [i for i, member in enumerate(self.members) if member == self.member]

    def message(self) -> dict[str, Any]:
        """JSON, for parse_attempt."""
        return {**vars(self), "held": [vars(held) for held in self.held]}


def parse_attempt(value: dict[str, Any]) -> Attempt:
    """From Attempt.message; it comes from our own other half."""
    held = tuple(Held(**each) for each in value["held"])
    return Attempt(**{**value, "held": held, "members": tuple(value["members"])})


def strips(blocks: int, index: int, count: int) -> Iterator[tuple[int, int]]:
    """Blocks [first, last) of the member at `index` of `count`: every count-th strip, so that all ranks of each member have
    their part of the work, whatever slices of the blocks they hold."""
    size = max(1, min(STRIP, blocks // (4 * count)))
    for first in range(index * size, blocks, count * size):
        yield first, min(first + size, blocks)


def portion(attempt: Attempt, index: int) -> Iterator[Held]:
    """What this rank holds of the share at `index`."""
    count = len(attempt.members)
    for held in attempt.held:
        blocks = -(-held.elements // attempt.block)
        for first, last in strips(blocks, (index + held.fragment) % count, count):
            start, stop = max(first * attempt.block, held.start), min(last * attempt.block, held.stop)
            if start < stop:
                yield held.cut(start, stop)


def shards(pieces: Iterator[Held], size: int = SHARD) -> Iterator[tuple[Held, ...]]:
    """The pieces of one shard after the other, of at most `size` elements."""
    group: list[Held] = []
    room = size
    for piece in pieces:
        at = piece.start
        while at < piece.stop:
            stop = min(piece.stop, at + room)
            group.append(piece.cut(at, stop))
            room -= stop - at
            at = stop
            if not room:
                yield tuple(group)
                group, room = [], size
    if group:
        yield tuple(group)


def skipped_key(prefix: str, member: str) -> str:
    """Says that the member does not take part in this attempt: others need not wait for its share."""
    return f"{prefix}/{FOLDER}/{member}-skipped"


def shard_name(attempt: Attempt, pieces: Sequence[Held]) -> str:
    """The same for the same pieces of this rank, and for no others."""
    cut = json.dumps([[p.plane, p.fragment, p.start, p.stop] for p in pieces])
    return f"{attempt.member}-r{attempt.rank}-{hashlib.sha256(cut.encode()).hexdigest()[:12]}"


def block_sum(data: memoryview, first: int, size: int) -> int:
    """Sum mod 2^256 of BLAKE3(index || block) over the blocks of `size` bytes in `data`, of which the first has the index
    `first`: it adds up over any cut into blocks."""
    total = 0
    for index, begin in enumerate(range(0, len(data), size), first):
        digest = blake3(index.to_bytes(8, "little"))
        digest.update(data[begin : begin + size])
        total += int.from_bytes(digest.digest(), "little")
    return total % MODULUS


def add(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Totals of both: "plane/fragment" -> sum."""
    return {key: (one.get(key, 0) + other.get(key, 0)) % MODULUS for key in sorted({*one, *other})}


def to_hex(totals: dict[str, int]) -> dict[str, str]:
    return {key: f"{total:064x}" for key, total in sorted(totals.items())}


@dataclass(frozen=True)
class Part:
    """What one rank of a member has stored of the share at an index of `members`, and the totals of all that it holds."""

    member: str
    rank: int
    ranks: int
    members: tuple[str, ...]
    share: int
    shards: tuple[dict[str, Any], ...]
    totals: dict[str, int]


def encode_part(part: Part) -> tuple[str, bytes]:
    """Its name, which no other part has, and its JSON."""
    data = encode_json({"format": FORMAT, **vars(part), "totals": to_hex(part.totals)})
    return f"{part.member}-{part.rank}-{hashlib.sha256(data).hexdigest()[:12]}.json", data


def decode_part(raw: bytes) -> Part:
    """FormatError unless it is one; its shards are looked at with the manifest that they make."""
    value = decode_json(raw)
    version = field(value, "format", is_count, "a part")
    require(version == FORMAT, f"has format version {version}, and this program reads {FORMAT}")
    rank, ranks, index = (field(value, key, is_count, "a part") for key in ("rank", "ranks", "share"))
    members = field(value, "members", is_list, "a part")
    named = [field(value, "member", _is_text, "a part"), *members]
    require(rank < ranks and index < len(members) and all(map(_is_text, named)), "is a part of nothing")
    totals = field(value, "totals", lambda each: isinstance(each, dict), "a part")
    require(all(_is_total(total) for total in totals.values()), "has totals that are none")
    records = tuple(field(value, "shards", is_list, "a part"))
    sums = {key: int(total, 16) for key, total in totals.items()}
    return Part(value["member"], rank, ranks, tuple(members), index, records, sums)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_total(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


@dataclass(frozen=True)
class Settlement:
    """shards: those of the shares that are there, one source each; missing: indices of the other shares; differ: a sentence
    if members hold different states; totals: what they agree on."""

    shards: list[dict[str, Any]]
    missing: list[int]
    differ: str
    totals: dict[str, int]


def settle(parts: Sequence[Part], members: Sequence[str]) -> Settlement:
    """What the parts at one prefix come to, for those that share it by these members."""
    said = _complete_totals(parts)
    sources = defaultdict[int, dict[str, dict[int, Part]]](lambda: defaultdict(dict))
    for part in parts:
        if part.members == tuple(members) and part.member in said:
            sources[part.share][part.member][part.rank] = part
    chosen: list[dict[str, Any]] = []
    missing = []
    for index, owner in enumerate(members):
        whole = {m: ranks for m, ranks in sources[index].items() if len(ranks) == next(iter(ranks.values())).ranks}
        if not whole:
            missing.append(index)
            continue
        source = whole[owner if owner in whole else min(whole)]
        chosen += [record for rank in sorted(source) for record in source[rank].shards]
    return Settlement(chosen, missing, _differences(said), next(iter(said.values()), {}))


def _complete_totals(parts: Sequence[Part]) -> dict[str, dict[str, int]]:
    """Of the members all of whose ranks have said theirs."""
    by_rank = defaultdict[str, dict[int, Part]](dict)
    for part in parts:
        by_rank[part.member][part.rank] = part
    found = {}
    for member, ranks in by_rank.items():
        if len(ranks) == next(iter(ranks.values())).ranks:
            total: dict[str, int] = {}
            for part in ranks.values():
                total = add(total, part.totals)
            found[member] = total
    return found


def _differences(said: Mapping[str, Mapping[str, int]]) -> str:
    """Who has what, fewest first; empty if all have the same."""
    found = []
    for key in sorted({key for totals in said.values() for key in totals}):
        holders = defaultdict[int | None, list[str]](list)
        for member in sorted(said):
            holders[said[member].get(key)].append(member)
        sides = sorted(holders.values(), key=lambda members: (len(members), members))
        if len(sides) > 1:
            found.append(f"{key}: {' against '.join(', '.join(side) for side in sides)}")
    return "; ".join(found)
