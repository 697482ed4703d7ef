"""Metrics: what is written can be read again, also after a kill, and the lines for people say it with
units."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diloco.errors import ConfigError
from diloco.metrics import (
    EvalRecord,
    Metrics,
    RoundRecord,
    StepRecord,
    bits_per_byte,
    count,
    duration,
    eval_line,
    memory_bytes,
    peak_flops,
    read_metrics,
    round_line,
    size,
    step_line,
)
from diloco.tracker import NullTracker, TrackerConfig, build_tracker

STEP = StepRecord(
    step=120,
    steps=400,
    progress=0.3,
    loss=1.66354,
    bits_per_byte=2.4,
    lr=3e-3,
    grad_norm=0.5,
    tokens_per_second=12_345.6,
    memory_bytes=310_000_000,
    mfu=0.41,
    eta_seconds=130.2,
)
ROUND = RoundRecord(
    seq=5,
    round=3,
    rounds=12,
    fragment=1,
    fragments=2,
    members=("eu_1", "us_2"),
    tokens=65_536,
    step=90,
    bytes_up=1_100_000,
    bytes_down=1_090_000,
    exchange_seconds=0.123,
    waiting=0.034,
    norm=0.12341,
    digest="0123456789abcdef" * 4,
)


class Listening:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        self.heard.append(kind)

    def close(self) -> None:
        self.heard.append("closed")


def test_records_are_lines_that_are_there_at_once(tmp_path: Path) -> None:
    tracker = Listening()
    with Metrics(tmp_path / "eu" / "metrics.jsonl", tracker) as metrics:
        metrics.record(STEP)
        metrics.record(ROUND)
        metrics.write("note", loss=math.nan, text="θ")
        lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]  # before it is closed
    assert [line["kind"] for line in lines] == ["step", "round", "note"]
    assert lines[0]["loss"] == STEP.loss and lines[0]["mfu"] == 0.41 and lines[0]["time"] > 1.7e9
    assert lines[1]["members"] == ["eu_1", "us_2"] and lines[2]["loss"] is None and lines[2]["text"] == "θ"
    assert list(read_metrics(metrics.path)) == lines and list(read_metrics(metrics.path, "round")) == lines[1:2]
    assert tracker.heard == ["step", "round", "note", "closed"]


def test_a_torn_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(read_metrics(path)) == []
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b", "lo')
    assert [r["kind"] for r in read_metrics(path)] == ["a"]
    with Metrics(path) as metrics:
        metrics.write("c")
    assert [r["kind"] for r in read_metrics(path)] == ["a", "c"]


def test_a_value_that_is_no_json_is_an_error_and_leaves_no_half_line(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        with pytest.raises(TypeError):
            metrics.write("step", loss=torch.zeros(1))
        metrics.write("b")
    assert [r["kind"] for r in read_metrics(metrics.path)] == ["b"]


def test_step_line() -> None:
    assert step_line(STEP) == (
        "step 120/400 30 % | loss 1.6635 | 2.400 bits/byte | 12.3k tokens/s | MFU 41.0 % | 310 MB | ETA 2 min 10 s"
    )
    bare = step_line(replace(STEP, steps=None, mfu=None, eta_seconds=None, skipped=2))
    assert bare.startswith("step 120 30 % | ") and "MFU" not in bare and "ETA" not in bare
    assert bare.endswith("310 MB | 2 steps skipped (gradient not finite)")
    assert "loss nan" in step_line(replace(STEP, loss=math.nan))
    assert " | waiting for data 25 %" in step_line(replace(STEP, data_waiting=0.25))


def test_round_and_eval_line() -> None:
    assert round_line(ROUND) == (
        "round 3/12 | fragment 2/2 | eu_1, us_2 | 65.5k tokens | up 1.10 MB, down 1.09 MB | "
        "exchange 0.12 s | waiting 3 % | pseudo-gradient 0.1234 | digest 0123456789ab"
    )
    assert round_line(replace(ROUND, rounds=None)).startswith("round 3 | ")
    assert eval_line(EvalRecord(round=3, loss=1.7, bits_per_byte=2.45, perplexity=5.474, tokens=999, seconds=1.2)) == (
        "held-out after round 3 | loss 1.7000 | 2.450 bits/byte | perplexity 5.474 | 999 tokens | 1.20 s"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.7, "1.00k"),
        (12_345, "12.3k"),
        (310e6, "310M"),
        (2.5e12, "2.50T"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert count(value) == text


def test_size() -> None:
    assert [size(n) for n in (12, 310_000_000)] == ["12 B", "310 MB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (130, "2 min 10 s"),
        (11_100, "3 h 5 min"),
        (187_300, "2 d 4 h"),
        (math.inf, "unknown"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_about_the_machine() -> None:
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(2), 4.0) == pytest.approx(0.25)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("Some CPU") is None
    before = memory_bytes(torch.device("cpu"))
    held = torch.ones(50_000_000, dtype=torch.uint8)
    assert memory_bytes(torch.device("cpu")) - before > 0.8 * held.numel()


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(build_tracker(TrackerConfig(), tmp_path, "r", {}), NullTracker)
    with pytest.raises(ConfigError, match=r"tracker\.kind=csv is unknown: set it to none, "):
        build_tracker(TrackerConfig("csv"), tmp_path, "r", {})
    for kind in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, kind, None)  # importing it fails, installed or not
        with pytest.raises(ConfigError, match=rf"tracker\.kind={kind} needs .* pip install 'diloco\[{kind}\]'"):
            build_tracker(TrackerConfig(kind), tmp_path, "r", {})


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_hosted_tracker_gets_the_numbers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    library = ModuleType(kind)
    library.init = lambda **what: calls.append(("init", what))  # type: ignore[attr-defined]
    library.log = lambda what: calls.append(("log", what))  # type: ignore[attr-defined]
    library.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kind, library)
    with Metrics(tmp_path / "m.jsonl", build_tracker(TrackerConfig(kind, "p"), tmp_path, "eu", {"a": 1})) as metrics:
        metrics.write("step", step=3, loss=1.5, text="no number", bad=math.nan)
        metrics.write("note", text="only text")
    assert calls == [
        ("init", {"project": "p", "name": "eu", "config": {"a": 1}}),
        ("log", {"step/step": 3.0, "step/loss": 1.5, "step/position": 3}),
        ("finish", None),
    ]


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Metrics(tmp_path / "m.jsonl", build_tracker(TrackerConfig("tensorboard"), tmp_path, "eu", {})) as metrics:
        metrics.record(STEP)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("step/loss")[0].step == 120
