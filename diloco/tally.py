"""Where every sample of a run went, by region and source, from its journal. Pure."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diloco.fold import fold
from diloco.lineage import origin
from diloco.mixture import Schedule
from diloco.state import State

COLUMNS = ("applied", "mix", "norm", "skip", "leased", "returned")
"""Samples in θ; dropped: by outer.merge=mix, by the norm rule, by a rewind with --skip-data; in a member's hands; given back."""

ALL = "all regions"
"""No region has a space in its name."""
Counts = Counter[tuple[str, str, str]]
"""(region, source, column) -> samples."""
Span = tuple[str, int, int]
"""Samples [start, stop) of a source as the ledger names it: empty for `data`, whatever that is mixed of."""


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
    return state, _shared(counts) + _open(state)


def _of_round(before: State, entry: dict[str, Any]) -> Counts:
    """What outer.merge=mix dropped is under the first sources, see _shared."""
    counts: Counts = Counter()
    out = before.rejected(entry["fragment"], entry["answers"])
    for answer in entry["answers"]:
        member, upto = before.members[answer["member"]], dict(answer["leases"])
        news = _by_source(before, ((x.source, x.applied, max(upto.get(x.id, 0), x.applied)) for x in member.leases))
        mixed = 0 if answer["member"] in out else max(answer.get("dropped", 0) - member.dropped, 0)
        for source, samples in news.items():
            dropped = min(mixed, samples)
            mixed -= dropped
            counts[member.region, source, "mix"] += dropped
            counts[member.region, source, "norm" if answer["member"] in out else "applied"] += samples - dropped
    return counts


def _shared(counts: Counts) -> Counts:
    """Which samples outer.merge=mix dropped is not known, only how many: a region's sources share them in proportion to what
    each gave. Of the sums, as a round drops too few for every source to have its part."""
    shared = counts.copy()
    for region in {region for region, _, _ in counts}:
        gave = {s: counts[r, s, "applied"] + counts[r, s, "mix"] for r, s, _ in sorted(counts) if r == region}
        dropped = split(sum(counts[region, source, "mix"] for source in gave), gave)
        for source, samples in gave.items():
            shared[region, source, "mix"] = dropped[source]
            shared[region, source, "applied"] = samples - dropped[source]
    return shared


def split(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """In proportion, in integers that sum to total, by the largest remainders; none is above its weight if total is not above
    their sum."""
    exact = {key: divmod(total * weight, sum(weights.values()) or 1) for key, weight in weights.items()}
    parts = {key: whole for key, (whole, _) in exact.items()}
    most = sorted(exact, key=lambda key: -exact[key][1])
    return {key: parts[key] + (key in most[: total - sum(parts.values())]) for key in parts}


def _by_source(state: State, spans: Iterable[Span]) -> Counter[str]:
    """Source, as a person named it -> samples."""
    counts: Counter[str] = Counter()
    mixture = state.fingerprint.get("mixture") or {}
    schedule = Schedule.of(mixture["phases"]) if mixture else None
    for source, start, stop in spans:
        if source or schedule is None:
            counts[source or "data"] += stop - start
            continue
        for name, before, after in zip(mixture["names"], schedule.counts(start), schedule.counts(stop), strict=True):
            counts[name] += after - before
    return counts


def _open(state: State) -> Counts:
    counts: Counts = Counter()
    for member in state.members.values():
        for source, samples in _by_source(state, ((x.source, x.applied, x.stop) for x in member.leases)).items():
            counts[member.region, source, "leased"] += samples
    for back in state.ledger.pool:
        for source, samples in _by_source(state, [(back.source, back.start, back.stop)]).items():
            counts[back.region, source, "returned"] += samples
    return counts


def _rewound(before: State, now: Counts, there: Counts, skip: bool) -> Counts:
    """As at the checkpoint; skip: what each region did since, and held, is passed over. What was skipped there, and was
    not handed out again, stays so."""
    if not skip:
        return there
    held = now + Counter({key: n for key, n in _open(before).items() if key[2] == "leased"})
    passed: Counts = Counter()
    for (region, source, column), samples in held.items():
        passed[region, source, "skip"] += samples - (0 if column == "skip" else there[region, source, column])
    kept = Counter({key: n for key, n in there.items() if key[2] != "skip"})
    return kept + passed


def table(state: State, counts: Counts) -> list[str]:
    """Lines, in tokens: every region's and every source's, and the sum that has to come out."""
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    several = len({source for _, source, _ in counts}) > 1
    for (region, source, column), samples in sorted(counts.items()):
        for row in ((region, source), *(((ALL, source),) if several else ()), (ALL, "")):
            rows[row][column] += samples
    order = sorted(rows, key=lambda row: (row[0] == ALL, row[1] == "", row))
    seq_len, lines = state.settings.seq_len, []
    for row in order or [(ALL, "")]:
        cells = [rows[row][column] * seq_len for column in COLUMNS]
        lines.append((*row, *(f"{n:,}" for n in (*cells, sum(cells)))))
    head = (
        "tokens of",
        "",
        "applied",
        "dropped: mix",
        "dropped: norm",
        "dropped: skip",
        "leased",
        "returned",
        "handed out",
    )
    return _columns([head, *lines])


def _columns(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    left = [[*map(str.ljust, line[:2], widths)] for line in cells]
    return ["  ".join([*names, *map(str.rjust, c[2:], widths[2:])]) for names, c in zip(left, cells, strict=True)]


def differs(state: State, counts: Counts) -> str | None:
    """What does not add up, in one sentence."""
    total, handed = sum(counts.values()), state.ledger.handed
    if total == handed:
        return None
    return f"the regions' samples sum to {total:,}, and {handed:,} were handed out"
