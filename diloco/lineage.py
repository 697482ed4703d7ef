"""What the run's parameters are built on: the entries that no `rewind` has left behind. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from diloco.fold import State, entry_hash, fold

Span = tuple[int, int]
"""Seqs of an unbroken part of the journal, first and last."""


def spans(rewinds: Sequence[Span], head: int) -> list[Span]:
    """The path to entry `head`, oldest part first. rewinds: (seq, seq of the checkpoint) of those up to there."""
    found, stop = [], head
    while stop >= 0:
        start, origin = max((r for r in rewinds if r[0] <= stop), default=(0, -1))
        found.append((start, stop))
        stop = origin
    return found[::-1]


def origin(checkpoint: str) -> int:
    """The entry whose state a checkpoint holds, from its prefix."""
    return int(checkpoint.rsplit("/", 1)[-1])


def path_of(entries: Sequence[bytes]) -> list[Span]:
    parsed = (json.loads(data) for data in entries)
    rewinds = [(e["seq"], origin(e["checkpoint"])) for e in parsed if e["kind"] == "rewind"]
    return spans(rewinds, len(entries) - 1)


def on_path(seq: int, path: Sequence[Span]) -> bool:
    return any(start <= seq <= stop for start, stop in path)


def belongs(manifest: dict[str, Any], entries: Sequence[bytes]) -> bool:
    """Whether a checkpoint is of a state of this journal, abandoned or not."""
    seq = manifest["seq"]
    return seq == 0 or (seq < len(entries) and entry_hash(entries[seq]) == manifest["hash"])


def rounds_after(entries: Sequence[bytes], seq: int) -> list[tuple[State, dict[str, Any]]]:
    """The rounds of the path that a checkpoint at entry `seq`, which is on it, does not hold, each with the state that it
    was committed on."""
    path, found, state = path_of(entries), [], None
    for data in entries:
        entry = json.loads(data)
        if state is not None and entry["kind"] == "round" and entry["seq"] > seq and on_path(entry["seq"], path):
            found.append((state, entry))
        state = fold(state, data)
    return found
