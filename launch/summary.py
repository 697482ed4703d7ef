"""`python -m launch.summary RUN_DIR [STORE]`: what a run came to, from its journal and its regions'
metrics."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.store import Store, StoreError
from diloco.fold import JournalError, State
from diloco.journal import Journal
from diloco.metrics import count, perplexity, read_metrics, size

Records = Sequence[Mapping[str, Any]]
_FP32_BYTES = 4


@dataclass(frozen=True)
class Course:
    """First and last value of a loss, mean over the regions that reported it; nats per token and bits per
    byte."""

    name: str
    first: float
    last: float
    first_bits: float
    last_bits: float


@dataclass(frozen=True)
class Summary:
    run: str
    rounds: int
    tokens: int
    stopped: str | None
    regions: tuple[str, ...]
    """Those with at least one round in their metrics."""
    losses: tuple[Course, ...]
    sent: int
    """Bytes, of all regions."""
    data_parallel: float
    """Bytes that all regions would have sent for as many inner steps of data parallelism."""
    compared: int
    """Rounds that at least two regions have seen."""
    differing: tuple[int, ...]
    """Journal entries after which regions had other digests than each other: a bug, always."""
    digest: str
    """Of the last round."""
    checkpoint: str | None
    metrics: tuple[Path, ...]


def read_summary(run_dir: Path, store_url: str | None = None) -> Summary | None:
    """Reads the journal of the store (default: run_dir/store) and run_dir/<region>/metrics.jsonl. None: no
    run there. Raises StoreError, JournalError."""
    url = store_url or str(run_dir / "store")
    if store_url is None and not (run_dir / "store").is_dir():
        return None
    store = Store(url)
    journal = Journal(store)
    journal.read()
    if journal.state is None:
        return None
    paths = sorted(run_dir.glob("*/metrics.jsonl"))
    metrics = {path.parent.name: list(read_metrics(path)) for path in paths}
    return summarise(journal.state, metrics, tuple(paths), _newest_checkpoint(store, journal.state))


def _newest_checkpoint(store: Store, state: State) -> str | None:
    """Checkpoints are siblings of the one that the epoch starts from; a manifest is what makes one whole."""
    root = state.checkpoint.rpartition("/")[0]
    found = [key.split("/")[-2] for key in store.list(root) if key.endswith("/manifest.json")]
    newest = max(found, key=lambda name: (int(name) if name.isdigit() else -1, name), default=None)
    return f"{store.url}/{root}/{newest}" if newest else None


def summarise(state: State, metrics: Mapping[str, Records], paths: tuple[Path, ...], checkpoint: str | None) -> Summary:
    """metrics: every region's records, in order. A round that was seen again after a restart counts once."""
    rounds = {name: {r["seq"]: r for r in of_kind(records, "round")} for name, records in metrics.items()}
    rounds = {name: seen for name, seen in rounds.items() if seen}
    digests: dict[int, list[str]] = {}
    for seen in rounds.values():
        for seq, record in seen.items():
            digests.setdefault(seq, []).append(record["digest"])
    compared = {seq: found for seq, found in digests.items() if len(found) > 1}
    return Summary(
        run=state.run,
        rounds=state.rounds,
        tokens=state.tokens,
        stopped=state.stopped,
        regions=tuple(rounds),
        losses=tuple(courses(metrics.values())),
        sent=sum(record["bytes_up"] for seen in rounds.values() for record in seen.values()),
        data_parallel=sum(_data_parallel(metrics[name], len(rounds)) for name in rounds),
        compared=len(compared),
        differing=tuple(sorted(seq for seq, found in compared.items() if len(set(found)) > 1)),
        digest=digests[max(digests)][0] if digests else "",
        checkpoint=checkpoint,
        metrics=paths,
    )


def of_kind(records: Records, kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


def courses(regions: Collection[Records]) -> Iterator[Course]:
    """Of the training loss, and of the loss on each evaluation set."""
    sets = dict.fromkeys(r["set"] for records in regions for r in of_kind(records, "eval"))
    named = {"training": [of_kind(records, "step") for records in regions]}
    named |= {name: [[r for r in of_kind(records, "eval") if r["set"] == name] for records in regions] for name in sets}
    for name, found in named.items():
        if each := course(f"{name} loss", found):
            yield each


def course(name: str, regions: Iterable[Records]) -> Course | None:
    """Of the regions' records of it, None if none is finite."""
    known = [[r for r in records if r["loss"] is not None] for records in regions]
    known = [records for records in known if records]
    if not known:
        return None

    def mean(at: int, field: str) -> float:
        return float(sum(records[at][field] for records in known) / len(known))

    return Course(name, mean(0, "loss"), mean(-1, "loss"), mean(0, "bits_per_byte"), mean(-1, "bits_per_byte"))


def _data_parallel(records: Records, regions: int) -> float:
    """Bytes that one of K regions sends in a bandwidth-optimal all-reduce of fp32 gradients at every inner
    step: 2 (K - 1) / K per parameter (Patarasuk and Yuan 2009)."""
    parameters = max((r["parameters"] for r in of_kind(records, "run")), default=0)
    steps = max((r["step"] for r in records if r["kind"] in ("step", "round")), default=0)
    return 2 * (regions - 1) / regions * _FP32_BYTES * parameters * steps


# ---- text ----


def describe(s: Summary) -> str:
    """The summary for people, a line a fact."""
    rows = [
        ("run", f"{s.run}: {s.stopped or 'not stopped: a start with the same run.dir goes on with it'}"),
        ("rounds", f"{s.rounds} by {', '.join(s.regions) or 'nobody'}"),
        ("tokens", f"{s.tokens:,}"),
        *((c.name, _course_text(c)) for c in s.losses),
        ("sent", _sent_text(s)),
        ("digests", _digest_text(s)),
        ("checkpoint", s.checkpoint or "none yet"),
        *(("metrics", str(path)) for path in s.metrics),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _course_text(c: Course) -> str:
    bits = f"{c.first_bits:.3f} → {c.last_bits:.3f} bits/byte"
    return f"{c.first:.4f} → {c.last:.4f} nats/token ({bits}, perplexity {perplexity(c.first):.4g} → {perplexity(c.last):.4g})"


def _sent_text(s: Summary) -> str:
    if not s.data_parallel:
        return f"{size(s.sent)} (one region has nobody to send to)"
    ratio = f", {count(s.data_parallel / s.sent)} times as much" if s.sent else ""
    return f"{size(s.sent)} by all regions; data parallel would have sent {size(s.data_parallel)}{ratio}"


def _digest_text(s: Summary) -> str:
    if s.differing:
        return f"DIFFER between regions after journal entries {', '.join(map(str, s.differing))}: this is a bug"
    if not s.compared:
        return f"{s.digest[:12] or 'none'} (no round was seen by two regions)"
    return f"equal in every round that two or more regions have seen ({s.compared}); the last is {s.digest[:12]}"


def main(argv: Sequence[str]) -> int:
    """Prints the summary. 1 if regions differ, or if the run's records cannot be read."""
    if not 1 <= len(argv) <= 2:
        print("usage: python -m launch.summary RUN_DIR [STORE]", file=sys.stderr)
        return 2
    try:
        found = read_summary(Path(argv[0]), *argv[1:])
    except (StoreError, JournalError) as error:
        print(error, file=sys.stderr)
        return 1
    print(describe(found) if found else f"no run in {argv[0]}: it ended before it opened one")
    return 1 if found and found.differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
