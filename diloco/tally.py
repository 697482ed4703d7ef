"""Where every sample of a run went, region by region, from its journal. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from diloco.fold import fold
from diloco.lineage import origin
from diloco.mixture import Schedule
from diloco.state import State

COLUMNS = ("applied", "mix", "norm", "skip", "leased", "returned")
"""Samples in θ; dropped: by outer.merge=mix, by the norm rule, by a rewind with --skip-data; in a member's hands; given back."""

Counts = Counter[tuple[str, str]]
"""(region, column) -> samples."""


def tally(entries: Sequence[bytes]) -> tuple[State, Counts]:
    """The state after the entries, and what each region did with what it was handed. Raises JournalError."""
    state: State | None = None
    counts: Counts = Counter()
    history: list[Counts] = []
    for data in entries:
        before, state, entry = state, fold(state, data), json.loads(data)
        if before is not None and entry["kind"] == "round":
            counts = counts + _of_round(before, entry)
        elif before is not None and entry["kind"] == "rewind":
            counts = _rewound(before, counts, history[origin(entry["checkpoint"])], entry.get("skip_data", False))
        history.append(counts)
    assert state is not None
    return state, counts + _open(state)


def _of_round(before: State, entry: dict[str, Any]) -> Counts:
    counts: Counts = Counter()
    out = before.rejected(entry["fragment"], entry["answers"])
    for answer in entry["answers"]:
        member, upto = before.members[answer["member"]], dict(answer["leases"])
        news = sum(max(upto.get(x.id, 0) - x.applied, 0) for x in member.leases)
        if answer["member"] in out:
            counts[member.region, "norm"] += news
            continue
        mixed = min(max(answer.get("dropped", 0) - member.dropped, 0), news)
        counts[member.region, "mix"] += mixed
        counts[member.region, "applied"] += news - mixed
    return counts


def _open(state: State) -> Counts:
    counts: Counts = Counter()
    for member in state.members.values():
        counts[member.region, "leased"] += sum(lease.left for lease in member.leases)
    for back in state.ledger.pool:
        counts[back.region, "returned"] += back.stop - back.start
    return counts


def _rewound(before: State, now: Counts, there: Counts, skip: bool) -> Counts:
    """As at the checkpoint; skip: what each region did since, and held, is passed over. What was skipped there, and was
    not handed out again, stays so."""
    if not skip:
        return there
    held = now + Counter({key: n for key, n in _open(before).items() if key[1] == "leased"})
    passed: Counts = Counter()
    for (region, column), samples in held.items():
        passed[region, "skip"] += samples - (0 if column == "skip" else there[region, column])
    kept = Counter({key: n for key, n in there.items() if key[1] != "skip"})
    return kept + passed


def table(state: State, counts: Counts) -> list[str]:
    """Lines, in tokens, with the sum that has to come out."""
    seq_len, regions = state.settings.seq_len, sorted({region for region, _ in counts})
    rows = [(region, [counts[region, column] for column in COLUMNS]) for region in regions]
    rows.append(("all", [sum(values) for values in zip(*(row for _, row in rows), strict=True)] or [0] * len(COLUMNS)))
    head = ("tokens", "applied", "dropped: mix", "dropped: norm", "dropped: skip", "leased", "returned", "handed out")
    return _columns([head, *((name, *(f"{n * seq_len:,}" for n in (*row, sum(row)))) for name, row in rows)])


def by_source(state: State) -> list[str]:
    """Lines, in tokens: what each source of a mixture gave, all regions together. Nothing if there is no mixture."""
    if not (mixture := state.fingerprint.get("mixture")):
        return []
    schedule, seq_len = Schedule.of(mixture["phases"]), state.settings.seq_len
    leased = [(lease.applied, lease.stop) for member in state.members.values() for lease in member.leases]
    given = [(0, state.ledger.cursor)], leased, [(back.start, back.stop) for back in state.ledger.pool]
    handed, held, returned = (_of_ranges(schedule, ranges) for ranges in given)
    rows = [
        (name, *(f"{n * seq_len:,}" for n in (all_of_it - out - back, out, back, all_of_it)))
        for name, all_of_it, out, back in zip(mixture["names"], handed, held, returned, strict=True)
    ]
    return _columns([("source", "applied or dropped", "leased", "returned", "handed out"), *rows])


def _of_ranges(schedule: Schedule, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Samples of each source in [start, stop) ranges."""
    counts = [zip(schedule.counts(stop), schedule.counts(start), strict=True) for start, stop in ranges]
    nothing = [0] * len(schedule.counts(0))
    return [sum(column) for column in zip(nothing, *([a - b for a, b in pairs] for pairs in counts), strict=True)]


def _columns(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]) for c in cells]


def differs(state: State, counts: Counts) -> str | None:
    """What does not add up, in one sentence."""
    total, handed = sum(counts.values()), state.ledger.cursor
    if total == handed:
        return None
    return f"the regions' samples sum to {total:,}, and {handed:,} were handed out"
