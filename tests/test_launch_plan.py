"""The planner's command: what it prints and writes, and what it says to bad input."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from launch.plan import main, run

ROOT = Path(__file__).resolve().parents[1]
REGIONS = (
    "regions=[{name: eu, gpus: 64, gpu: h100, up: 1gbit, down: 2gbit}, {name: us, gpus: 64, gpu: h100, up: 500mbit}]"
)
TEN_B = [
    "model=10b",
    REGIONS,
    "codec=int8",
    "outer.sync_every=100",
    "parallel.dtype=bfloat16",
    "run.tokens=1_000_000_000_000",
]
SLOW = "regions=[{name: eu, gpu: l4, up: 200mbit, down: 50mbit}, {name: us, gpu: l4, up: 10mbit, down: 50mbit}]"
L4 = "tflops: 121, memory: 24, up: 100mbit"
BY_NUMBERS = f"regions=[{{name: eu, {L4}}}, {{name: us, {L4}}}]"
TINY = ["regions=[{name: eu, gpu: l4, up: 100mbit}, {name: us, gpu: l4, up: 100mbit}]"]


def planned(*arguments: str) -> dict[str, Any]:
    found = json.loads(run([*arguments, "--json"]))
    assert isinstance(found, dict)
    return found


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [x for each in (value.values() if isinstance(value, dict) else value) for x in numbers(each)]
    return [value] if isinstance(value, int | float) else []


def commands(page: str) -> list[list[str]]:
    """Arguments of every command of ours on a page of the docs."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    mark = "    python -m launch.plan "
    return [shlex.split(line.removeprefix(mark)) for line in lines if line.startswith(mark)]


def test_the_commands_of_the_docs(tmp_path: Path) -> None:
    """In real processes, from elsewhere, and a picture that any viewer of SVG shows by itself."""
    planning, failing = commands("planning.md")
    assert failing == ["failures"]  # which test_failures runs
    command = [sys.executable, "-m", "launch.plan", *planning, "svg=plan.svg"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done
    for word in (
        "10.2G parameters",
        "64 h100",
        "configured",
        "overlapped",
        "For 95.0 %: outer.sync_every=",
        "Gbit/s",
        "goodput",
    ):
        assert word in done.stdout
    picture = ET.parse(tmp_path / "plan.svg").getroot()
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 5
    text = (tmp_path / "plan.svg").read_text()
    assert "href" not in text and "url(" not in text and "<script" not in text
    for line in lines:
        for corner in str(line.get("points")).split():
            x, y = map(float, corner.split(","))
            assert 0 <= x <= 760 and 0 <= y <= 430


def test_json_holds_every_number() -> None:
    found = planned(*TEN_B, "run.rounds=null")
    assert all(math.isfinite(x) for x in numbers(found))
    eu, us = found["sites"]
    assert found["parameters"] == 10_211_381_248
    assert (eu["name"], eu["gpus"], eu["batch"]) == ("eu", 64, 16 * 64)
    configured = found["ways"][0]
    assert configured["bytes"] == pytest.approx(found["parameters"] * 1.015625, rel=1e-6)
    assert configured["seconds"] == pytest.approx(configured["bytes"] * (8 / 0.5e9 + 8 / 1e9) + 3.5 * 0.08)
    assert configured["utilization"][0] == pytest.approx(
        100 * eu["step_seconds"] / (100 * eu["step_seconds"] + configured["seconds"]), rel=1e-6
    )
    assert configured["run_tokens"] == pytest.approx(1e12)
    assert us["join_seconds"] == pytest.approx(16 * found["parameters"] * 8 / 0.5e9, rel=1e-6)
    assert len(found["sweep"]) == 5 and found["advice"]["enough"] is True


def test_the_config_is_diloco_trains() -> None:
    streaming = planned(*TEN_B, "+experiment=streaming", "inner.batch=64", "inner.seq_len=2048")["ways"][0]["way"]
    assert streaming == {
        "schedule": {"sync_every": 100, "fragments": 4, "overlap": 5, "first": False},
        "codec": "int8",
    }
    assert planned(*TINY, "+experiment=ddp")["ways"][0]["way"]["schedule"]["sync_every"] == 1
    assert planned(*TINY, "inner.batch=8", "inner.seq_len=128")["assumed"] == ["MFU 0.4, of all regions that name none"]


def test_lines_from_a_wan() -> None:
    found = planned("regions=[{name: eu, gpu: l4}, {name: us, gpu: l4, up: 10mbit}]", "+wan=global", "wan.down=50mbit")
    assert found["rtt"] == 0.09
    slow = planned(SLOW, "rtt=90ms")
    assert found["ways"] == slow["ways"]


def test_what_to_look_at() -> None:
    uneven = "regions=[{name: eu, gpus: 8, gpu: 4090, up: 100mbit}, {name: us, gpus: 8, gpu: h100, up: 1gbit}]"
    notes = "\n".join(planned("model=10b", uneven)["notes"])
    for word in ("eu: a GPU needs", "parallel.dtype=float32", "eu waits", "ckpt.durable=true"):
        assert word in notes, (word, notes)
    assert "us waits" not in notes
    often = planned(*TINY, "inner.batch=8", "outer.sync_every=2", "parallel.dtype=bfloat16")["notes"]
    assert len(often) == 1 and "set ckpt.every=" in often[0]
    both = planned(*TEN_B, "parallel.checkpoint_activations=true", "ckpt.durable=false")["notes"]
    assert both == ["run.rounds=20 ends the run before run.tokens=1,000,000,000,000: set run.rounds=null"]


def test_one_region_needs_no_advice() -> None:
    found = planned("regions=[{name: eu, gpu: l4, up: 100mbit}]")
    assert found["advice"] is None and found["sweep"] == []
    assert run(["regions=[{name: eu, gpu: l4, up: 100mbit}]"]).count("configured") == 1


def test_a_gpu_by_its_numbers() -> None:
    known = planned(*TINY, "parallel.dtype=bfloat16")
    given = planned(BY_NUMBERS, "parallel.dtype=bfloat16")
    assert known["ways"] == given["ways"]


def test_your_own_model() -> None:
    own = ["model=own", "model.target=tests.e2e.own_model.Gru", "+model.args={vocab: 256, dim: 64, layers: 2}"]
    assert any("activations are not counted" in note for note in planned(*TINY, *own)["notes"])


def test_failures() -> None:
    text = run(["failures"])
    assert "1,200,000" in text and "58.3 %" in text
    rows = json.loads(run(["failures", "--json"]))
    assert rows[0]["chips"] == 1000 and rows[-1]["chips"] == 2_400_000


HERE = "{name: eu, gpu: l4, up: 1gbit}"
BAD: dict[str, tuple[list[str], list[str]]] = {
    # name: (arguments, what the sentence must contain)
    "no regions": ([], ["regions is not set", "write 'regions=[{name: eu"]),
    "empty regions": (["regions=[]"], ["regions=[] names no regions", "write a list"]),
    "not YAML": (["regions=[{"], ["regions=[{ is not a list in YAML", "write it like"]),
    "a name alone": (["regions=[eu]"], ["regions has eu", "write a list like"]),
    "no name": (["regions=[{gpu: l4, up: 1gbit}]"], ["name=None", "give a name"]),
    "twice": ([f"regions=[{HERE}, {HERE}]"], ["eu more than once"]),
    "unknown region key": (["regions=[{name: eu, gpux: l4}]"], ["unknown key gpux", "did you mean gpu"]),
    "unknown gpu": (
        ["regions=[{name: eu, gpu: h900, up: 1gbit}]"],
        ["regions.eu.gpu=h900", "set it to one of", "h100"],
    ),
    "no gpu": (["regions=[{name: eu, up: 1gbit}]"], ["regions.eu.gpu=None", "set it to one of"]),
    "no memory": (["regions=[{name: eu, tflops: 100, up: 1gbit}]"], ["regions.eu.memory is not set", "GB"]),
    "gpus": (["regions=[{name: eu, gpu: l4, gpus: 0, up: 1gbit}]"], ["regions.eu.gpus=0", "above 0"]),
    "gpus of text": (
        ["regions=[{name: eu, gpu: l4, gpus: many, up: 1gbit}]"],
        ["regions.eu.gpus=many", "whole number"],
    ),
    "no rate": (["regions=[{name: eu, gpu: l4}]"], ["regions.eu.up is not set", "200mbit"]),
    "rate without unit": (["regions=[{name: eu, gpu: l4, up: 100}]"], ["regions.eu.up=100", "200mbit"]),
    "rate of zero": (["regions=[{name: eu, gpu: l4, up: 0}]"], ["regions.eu.up=0", "above 0"]),
    "negative rate": (
        ["regions=[{name: eu, gpu: l4, up: 1gbit, down: -1gbit}]"],
        ["regions.eu.down=-1gbit", "set it to"],
    ),
    "mfu": (["mfu=1.5", *TINY], ["mfu=1.5", "at most 1"]),
    "mfu of a region": (
        ["regions=[{name: eu, gpu: l4, up: 1gbit, mfu: fast}]"],
        ["regions.eu.mfu=fast", "such as 0.4"],
    ),
    "target": (["target=95", *TINY], ["target=95", "at most 1"]),
    "target of all": (["target=1", *TINY], ["target=1", "0.999 or less"]),
    "rtt": (["rtt=80", *TINY], ["rtt=80", "such as 80ms"]),
    "unknown key": ([*TINY, "outer.lrr=1"], ["unknown key outer.lrr", "did you mean outer.lr?"]),
    "unknown model": ([*TINY, "model=11b"], ["model=11b does not exist", "10b"]),
    "unknown codec": ([*TINY, "codec=int3"], ["codec=int3 does not exist", "int4"]),
    "fragments": ([*TINY, "outer.fragments=3"], ["outer.sync_every=50 is not a multiple", "set outer.sync_every"]),
    "more fragments than layers": ([*TINY, "outer.fragments=10"], ["outer.fragments=10", "4 layers"]),
    "overlap": ([*TINY, "outer.max_overlap_steps=51"], ["outer.max_overlap_steps=51", "set it to"]),
    "batch": (
        ["regions=[{name: eu, gpu: l4, gpus: 3, up: 1gbit}]", "inner.batch=8"],
        ["regions.eu", "inner.batch=8", "set it to 9"],
    ),
    "tp": ([*TINY, "parallel.tp=2"], ["parallel.tp=2 does not divide regions.eu.gpus=1", "set one"]),
    "tp of zero": ([*TINY, "parallel.tp=0"], ["parallel.tp=0", "at least 1"]),
    "tp and heads": (
        ["regions=[{name: eu, gpu: l4, gpus: 4, up: 1gbit}]", "parallel.tp=4"],
        ["parallel.tp=4", "kv_heads=2"],
    ),
    "dtype": ([*TINY, "parallel.dtype=fp8"], ["parallel.dtype=fp8", "float32 or bfloat16"]),
    "a region": ([*TINY, "+region=eu"], ["region names one region", "regions=[...]"]),
    "flag": ([*TINY, "--jsn"], ["--jsn is not known", "--json"]),
    "not an override": ([*TINY, "codec"], ["codec", "key=value"]),
    "svg": ([*TINY, "svg=/nowhere/plan.svg"], ["svg=/nowhere/plan.svg cannot be written", "set it to"]),
    "svg of one": ([f"regions=[{HERE}]", "svg=plan.svg"], ["svg=plan.svg", "second one"]),
    "unknown wan": ([*TINY, "+wan=moon"], ["wan=moon is not there", "atlantic"]),
    "wan key": ([*TINY, "wan.up=1gbit"], ["wan.up=1gbit needs a WAN", "+wan="]),
    "failures of what": (["failures", "now"], ["now means nothing", "--json"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments, parts = BAD[name]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("launch.plan: "), said
    for part in parts:
        assert part in said.err, f"{part!r} is not in {said.err!r}"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m launch.plan" in capsys.readouterr().out
