"""What a region reports: typed records, one a line in metrics.jsonl, and the console lines made from them.

Rank 0 writes; every record is flushed, so that what happened before a kill -9 can be read afterwards.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch

from diloco.tracker import NullTracker, Tracker

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets; the first name that is contained
# wins.
_PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
)


HELD_OUT = "held-out"
"""The evaluation set that the training data keeps back."""


@dataclass(frozen=True)
class RunRecord:
    """Once per start of a region."""

    kind: ClassVar[str] = "run"
    region: str
    member: str
    ranks: int
    tp: int
    parameters: int
    fragments: int
    sync_every: int
    """Inner steps between two exchanges of one fragment (H)."""
    codec: str
    tokens_per_step: int
    """Of the whole region."""
    bytes_per_token: float
    """Bytes of text per token: turns nats per token into bits per byte."""


@dataclass(frozen=True)
class StepRecord:
    """One report about inner steps: those since the report before."""

    kind: ClassVar[str] = "step"
    step: int
    """Inner steps of this region in this run, this one included; goes on after a resume."""
    steps: int | None
    """How many there will be; None where the run has no such end."""
    progress: float
    """Share of the run that is done, 0 to 1."""
    loss: float
    """Mean training loss since the last report, nats per token."""
    bits_per_byte: float
    lr: float
    grad_norm: float
    """Of the last step, before clipping."""
    tokens_per_second: float
    """Of the whole region."""
    memory_bytes: int
    """Of rank 0: allocated device memory at its peak, or resident memory on CPU."""
    mfu: float | None = None
    """Model FLOP utilization, 0 to 1; None where the device's peak is not known."""
    eta_seconds: float | None = None
    skipped: int = 0
    """Inner steps skipped so far because the gradient was not finite."""
    data_waiting: float = 0.0
    """Share of these steps' time that rank 0 waited for samples, 0 to 1."""


@dataclass(frozen=True)
class RoundRecord:
    """A committed round, as one region saw it."""

    kind: ClassVar[str] = "round"
    seq: int
    """The journal entry."""
    round: int
    """Committed rounds, this one included."""
    rounds: int | None
    """How many there will be; None where tokens or somebody end the run."""
    fragment: int
    fragments: int
    members: tuple[str, ...]
    """Member ids whose contribution it holds."""
    tokens: int
    """Tokens that this round applied, of all members."""
    step: int
    """Inner steps of this region in this run when it merged the round."""
    bytes_up: int
    """Payload this region sent for this round."""
    bytes_down: int
    exchange_seconds: float
    waiting: float
    """Share of the time since the last round in which this region neither trained nor evaluated, 0 to 1."""
    norm: float
    """2-norm of the averaged pseudo-gradient."""
    digest: str
    """Of the fragment's parameters after the outer step, hex: the same in every region."""
    overlap: int = 0
    """Inner steps between this region's snapshot and its merge; 0 also if the round does not hold its contribution."""
    dropped: int = 0
    """Tokens that count as dropped in this round (`outer.merge=mix`), of all members."""
    rejected: tuple[str, ...] = ()
    """Members whose contribution had no weight, because of its norm."""


@dataclass(frozen=True)
class EvalRecord:
    """Loss of the global parameters on one evaluation set."""

    kind: ClassVar[str] = "eval"
    round: int
    loss: float
    """Nats per token."""
    bits_per_byte: float
    perplexity: float
    """Per token."""
    tokens: int
    """That it is the mean of."""
    seconds: float
    set: str = HELD_OUT
    """Or a name of run.eval_sets; region/source of what that region alone holds."""


Record = RunRecord | StepRecord | RoundRecord | EvalRecord


class Metrics:
    """Appends records to a metrics.jsonl and hands their numbers to a tracker."""

    def __init__(self, path: Path | str, tracker: Tracker | None = None) -> None:
        """Creates the directory. A line that a kill left half written is cut off."""
        self.path = Path(path)
        self._tracker = tracker or NullTracker()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        whole = _whole_lines(self.path.read_bytes())
        self._file.truncate(len(whole))

    def write(self, kind: str, **fields: Any) -> None:
        """Writes and flushes {"kind", "time": seconds since 1970 by this machine's clock, **fields} as one
        line. Numbers that are not finite become null: JSON has no others."""
        line = {"kind": kind, "time": round(time.time(), 3), **{k: _jsonable(v) for k, v in fields.items()}}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._tracker.log("/".join(filter(None, (kind, fields.get("set")))), fields)

    def record(self, record: Record) -> None:
        self.write(record.kind, **asdict(record))

    def close(self) -> None:
        self._file.close()
        self._tracker.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path | str, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl in order, of one kind if given; a half-written last line is left out."""
    path = Path(path)
    for line in _whole_lines(path.read_bytes() if path.exists() else b"").splitlines():
        record = json.loads(line)
        if kind is None or record["kind"] == kind:
            yield record


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- numbers ----


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    return nats_per_token / math.log(2) / bytes_per_token


def perplexity(nats_per_token: float) -> float:
    """exp of the loss; infinite where no float holds it."""
    return math.exp(nats_per_token) if nats_per_token < 709 else math.inf


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its CUDA name; None where it is not known, as for any CPU."""
    return next((flops for name, flops in _PEAK_FLOPS if name in device_name), None)


def memory_bytes(device: torch.device) -> int:
    """Allocated device memory at its peak, or the process's resident memory now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- lines for people ----


def step_line(r: StepRecord) -> str:
    """`step 120/400 30 % | loss 1.6635 | 2.400 bits/byte | 12.3k tokens/s | MFU 41.0 % | 310 MB | ETA 2 min
    10 s`"""
    of = f"/{r.steps}" if r.steps is not None else ""
    parts = [
        f"step {r.step}{of} {r.progress:.0%}".replace("%", " %"),
        f"loss {r.loss:.4f}",
        f"{r.bits_per_byte:.3f} bits/byte",
        f"{count(r.tokens_per_second)} tokens/s",
        f"MFU {100 * r.mfu:.1f} %" if r.mfu is not None else "",
        f"{size(r.memory_bytes)}",
        f"ETA {duration(r.eta_seconds)}" if r.eta_seconds is not None else "",
        f"waiting for data {100 * r.data_waiting:.0f} %" if r.data_waiting >= 0.01 else "",
        f"{r.skipped} steps skipped (gradient not finite)" if r.skipped else "",
    ]
    return " | ".join(part for part in parts if part)


def round_line(r: RoundRecord) -> str:
    """`round 3/12 | fragment 1/2 | eu_1, us_2 | 65.5k tokens | up 1.10 MB, down 1.09 MB | exchange 0.12 s |
    overlap 3 steps | waiting 3 % | pseudo-gradient 0.1234 | digest 0123456789ab`; the fragment counts from 1 here,
    for people."""
    of = f"/{r.rounds}" if r.rounds is not None else ""
    parts = [
        f"round {r.round}{of}",
        f"fragment {r.fragment + 1}/{r.fragments}",
        ", ".join(r.members),
        f"{count(r.tokens)} tokens",
        f"{count(r.dropped)} tokens dropped" if r.dropped else "",
        f"weight 0: {', '.join(r.rejected)} (norm)" if r.rejected else "",
        f"up {size(r.bytes_up)}, down {size(r.bytes_down)}",
        f"exchange {r.exchange_seconds:.2f} s",
        f"overlap {r.overlap} steps" if r.overlap else "",
        f"waiting {100 * r.waiting:.0f} %",
        f"pseudo-gradient {r.norm:.4g}",
        f"digest {r.digest[:12]}",
    ]
    return " | ".join(part for part in parts if part)


def eval_line(r: EvalRecord) -> str:
    """`held-out after round 3 | loss 1.7012 | 2.454 bits/byte | perplexity 5.48 | 65.5k tokens | 1.20 s`"""
    return (
        f"{r.set} after round {r.round} | loss {r.loss:.4f} | {r.bits_per_byte:.3f} bits/byte | "
        f"perplexity {r.perplexity:.4g} | {count(r.tokens)} tokens | {r.seconds:.2f} s"
    )


def count(value: float) -> str:
    """Three digits and a decimal prefix: 12345 -> '12.3k', 7 -> '7'."""
    number, prefix = _scaled(value)
    return number + prefix


def size(nbytes: float) -> str:
    """Three digits in decimal units: 310000000 -> '310 MB'."""
    number, prefix = _scaled(nbytes)
    return f"{number} {prefix}B"


def _scaled(value: float) -> tuple[str, str]:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip("."), prefix
    return f"{value:.3g}", ""


def duration(seconds: float) -> str:
    """'42 s', '2 min 10 s', '3 h 5 min', '2 d 4 h'."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = max(0, round(seconds))
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"
