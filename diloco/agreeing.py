"""Which state of a fragment a joiner fetches, and whose word about its digests counts. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from diloco.fragments import digest
from diloco.lineage import on_path, path_of
from diloco.settings import JournalError
from diloco.state import Entry, State

Roots = tuple[str, str]
"""What a round's entry says of the state that it applies to: the digests of theta, and of the outer optimizer's moments."""


@dataclass(frozen=True)
class Agreed:
    base: int
    roots: Roots
    members: tuple[str, ...]
    """Who has that."""
    liars: tuple[str, ...]
    """Who said something else of the same base."""
    firm: bool
    """It is not the word of a single member."""


def roots_of(planes: Sequence[bytes]) -> Roots:
    """planes: the block digests of theta and of each moment, all of a fragment's blocks."""
    return digest(planes[0]), digest("".join(digest(moment) for moment in planes[1:]).encode())


def named(entries: Sequence[bytes], state: State, fragment: int) -> dict[int, Roots | None]:
    """The bases that the journal (`entries`, folded to `state`) knows of a fragment: with their roots where a later round
    names them, None for the newest, which none does yet."""
    path, found = path_of(entries), dict[int, Roots | None]()
    for entry in map(json.loads, entries):
        if entry["kind"] == "round" and entry["fragment"] == fragment and on_path(entry["seq"], path):
            found[entry["base"]] = entry["theta"], entry["momentum"]
    return {**found, state.fragments[fragment].base: None}


def agree(said: Mapping[str, tuple[int, Roots]], known: Mapping[int, Roots | None]) -> Agreed | None:
    """said: by member, its base and the roots of it. known: see `named`. The newest base that somebody has and about which
    there is no doubt: the journal's word, or else what more members say than anything else. None: there is no such base."""
    for base in sorted({base for base, _ in said.values() if base in known}, reverse=True):
        votes = {member: roots for member, (at, roots) in said.items() if at == base}
        if (roots := known[base] or _most(votes.values())) in votes.values():
            assert roots is not None
            right = tuple(sorted(member for member in votes if votes[member] == roots))
            firm = known[base] is not None or len(right) > 1
            return Agreed(base, roots, right, tuple(sorted(votes.keys() - right)), firm)
    return None


def _most(votes: Iterable[Roots]) -> Roots | None:
    """None: nobody, or two in a tie."""
    ranking = Counter(votes).most_common(2)
    tie = len(ranking) == 2 and ranking[0][1] == ranking[1][1]
    return None if tie or not ranking else ranking[0][0]


def prove(unproven: MutableMapping[tuple[int, int], Roots], entry: Entry) -> None:
    """A round names what it applies to: so whether the members that this was fetched from told the truth. unproven: (fragment,
    base) -> what they said. Raises JournalError: what is built on a lie is of no use, and the region has to start again."""
    roots = unproven.pop((entry["fragment"], entry["base"]), None)
    if roots is not None and roots != (entry["theta"], entry["momentum"]):
        raise JournalError(
            f"fragment {entry['fragment']} as the members had it is not what journal entry {entry['seq']} names: start this "
            "region again"
        )
