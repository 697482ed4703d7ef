"""What a region prints and records: rank 0 only, one line per report and one per round."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diloco.config import Config
from diloco.fold import State
from diloco.inner import StepStats
from diloco.metrics import (
    EvalRecord,
    Metrics,
    RoundRecord,
    RunRecord,
    StepRecord,
    bits_per_byte,
    eval_line,
    memory_bytes,
    peak_flops,
    perplexity,
    round_line,
    step_line,
)
from diloco.model import flops_per_token
from diloco.parallel import Region
from diloco.tracker import build_tracker

if TYPE_CHECKING:
    from diloco.trainer import Trainer


class Reporter:
    """Console and metrics.jsonl. Losses are summed on the device and read once per report."""

    def __init__(self, cfg: Config, region: Region, bytes_per_token: float) -> None:
        self.cfg, self.region, self.bytes_per_token = cfg, region, bytes_per_token
        self.metrics: Metrics | None = None
        self.flops = 0.0
        """Per token, forward and backward."""
        self._nll: list[Any] = []
        self._seconds = 0.0
        self._waited = 0.0

    def open(self, trainer: Trainer) -> None:
        """Once the run is joined: the run's record, and the derived numbers that people want to check."""
        cfg, shape = self.cfg, trainer.cfg.model.args
        self.flops = flops_per_token(
            trainer.parameters, int(shape.get("layers", 0)), int(shape.get("dim", 0)), cfg.inner.seq_len
        )
        if self.region.rank != 0:
            return
        directory = Path(cfg.run.dir) / cfg.region.name
        tracker = build_tracker(cfg.tracker, directory, f"{cfg.run.name}-{cfg.region.name}", {})
        self.metrics = Metrics(directory / "metrics.jsonl", tracker)
        record = RunRecord(
            cfg.region.name,
            trainer.links.member,
            self.region.world,
            self.region.tp,
            trainer.parameters,
            len(trainer.fragments),
            cfg.outer.sync_every,
            cfg.codec.name,
            trainer.tokens_per_step,
            self.bytes_per_token,
        )
        self.metrics.record(record)
        encoded = sum(trainer.averaging.size(f.index, 0, f.blocks) for f in trainer.fragments)
        print(
            f"{trainer.links.member}: {trainer.parameters:,} parameters in {len(trainer.fragments)} fragment(s) · "
            f"{self.region.world} rank(s), dp {self.region.dp} x tp {self.region.tp} on {self.region.device.type} · "
            f"{trainer.tokens_per_step:,} tokens a step, {trainer.tokens_per_step * cfg.outer.sync_every:,} a round · "
            f"{encoded / 1e6:.2f} MB a contribution ({cfg.codec.name}) · "
            f"{trainer.samples.describe()}",
            flush=True,
        )
        self._started = self._round_from = time.monotonic()
        self._progress_at_start = trainer.progress()

    def step(self, trainer: Trainer, stats: StepStats, seconds: float) -> None:
        """One inner step, which took `seconds`, without those that it waited for samples."""
        self._nll.append(stats.nll)
        self._seconds += seconds
        if trainer.clock.steps % self.cfg.run.report_every or self.metrics is None:
            return
        progress, waited = trainer.progress(), trainer.loader.waited
        trainer.loader.waited = 0.0
        loss = sum(float(nll) for nll in self._nll) / len(self._nll)
        rate = len(self._nll) * trainer.tokens_per_step / max(self._seconds, 1e-9)
        peak = peak_flops(_device_name(self.region))
        record = StepRecord(
            trainer.clock.steps,
            self._total_steps(trainer),
            progress,
            loss,
            bits_per_byte(loss, self.bytes_per_token),
            stats.lr,
            stats.grad_norm,
            rate,
            memory_bytes(self.region.device),
            None if peak is None else rate * self.flops / (peak * self.region.world),
            self._eta(progress),
            trainer.inner.skipped,
            waited / max(self._seconds + waited, 1e-9),
        )
        self.metrics.record(record)
        print(step_line(record), flush=True)
        self._nll, self._seconds = [], 0.0

    def _total_steps(self, trainer: Trainer) -> int | None:
        """Of this region: its steps so far, and those of the rounds to come."""
        state = trainer.state
        if state.settings.rounds is None:
            return None
        stamps = [snapshot.stamp for snapshot in trainer.snapshots.values()]
        to_come = state.settings.rounds - state.rounds - trainer.clock.own_rounds(stamps, state.sync_interval)
        return trainer.clock.steps + round(to_come * state.sync_interval)

    def _eta(self, progress: float) -> float | None:
        done = progress - self._progress_at_start
        return None if done <= 0 else (time.monotonic() - self._started) * (1 - progress) / done

    def round(
        self, trainer: Trainer, before: State, entry: dict[str, Any], norm: float, digest: str, overlap: int
    ) -> None:
        links, now = trainer.links, time.monotonic()
        if self.metrics is None or links.coordinator is None or links.control is None:
            return
        outcomes = links.coordinator.outcomes.pop(entry["attempt"], [])
        waited = (links.control.waited - self._waited) / max(now - self._round_from, 1e-9)
        self._waited, self._round_from = links.control.waited, now
        state = trainer.state
        record = RoundRecord(
            entry["seq"],
            state.rounds,
            state.settings.rounds,
            entry["fragment"],
            len(state.fragments),
            tuple(answer["member"] for answer in entry["answers"]),
            state.tokens - before.tokens,
            trainer.clock.steps,
            sum(outcome.sent for outcome in outcomes),
            sum(outcome.received for outcome in outcomes),
            max((outcome.seconds for outcome in outcomes), default=0.0),
            min(waited, 1.0),
            norm,
            digest,
            overlap,
            (state.ledger.dropped - before.ledger.dropped) * state.settings.seq_len,
            tuple(sorted(before.rejected(entry["fragment"], entry["answers"]))),
        )
        self.metrics.record(record)
        print(round_line(record), flush=True)

    def evaluation(
        self, name: str, round_number: int, nll: float, bytes_per_token: float, tokens: int, seconds: float
    ) -> None:
        """Of the set of that name. nll: nats per token."""
        if self.metrics is None:
            return
        bits = bits_per_byte(nll, bytes_per_token)
        record = EvalRecord(round_number, nll, bits, perplexity(nll), tokens, seconds, name)
        self.metrics.record(record)
        print(eval_line(record), flush=True)

    def saved(self, prefix: str, seq: int, **numbers: Any) -> None:
        """numbers, of rank 0: `seconds` since it was handed over, `bytes` that it has uploaded, and the seconds that this `took`
        and that training was `blocked`."""
        if self.metrics is not None:
            self.metrics.write("checkpoint", prefix=prefix, seq=seq, **numbers)

    def not_saved(self, seq: int, reason: str) -> None:
        if self.metrics is not None:
            self.metrics.write("checkpoint", prefix=None, seq=seq, reason=reason)
            print(f"checkpoint at entry {seq} was not stored: {reason}", flush=True)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


def _device_name(region: Region) -> str:
    if region.device.type != "cuda":
        return ""
    import torch

    return torch.cuda.get_device_name(region.device)
