"""Sweeps without a run: which jobs there are, what is read from their metrics, and how it is shown."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.errors import ConfigError
from diloco.metrics import EvalRecord, Metrics, RoundRecord
from launch import jobs as jobs_module
from launch import sweep as sweep_module
from launch.comparing import Outcome, Point, as_csv, read_course, read_sweep, report, swept, table
from launch.drawing import picture
from launch.jobs import SweepJob, check, environment, make_job, run_jobs, split_regions, why
from launch.regions import Region, find_override
from launch.svg import linear, logarithmic
from launch.sweep import choose_dir
from tests.test_summary import write_run

SVG = "{http://www.w3.org/2000/svg}"
ROUND = RoundRecord(3, 1, 2, 0, 1, ("eu_1", "us_2"), 256, 4, 1000, 1000, 0.1, 0.0, 1.0, "a" * 64)

# ---- jobs ----


def job(*overrides: str) -> SweepJob:
    return make_job(["+region=eu", *overrides], Path("sweeps/s"), 0)


def test_a_job_is_known_by_what_it_runs_and_not_by_how_that_is_written() -> None:
    one = job("outer.lr=0.3", "data.path='a b'", "sweep.parallel=2")
    assert one.dir == job("data.path=a b", "outer.lr=0.30", "sweep.dir=x").dir
    assert len({one.dir, job("outer.lr=0.3").dir, job("outer.lr=0.5", "data.path=a b").dir, job("~outer.lr").dir}) == 4
    assert make_job(["+regions=[eu,us]"], Path("s"), 7).dir == make_job(["+regions=['eu', 'us']"], Path("s"), 0).dir
    assert one.regions == (Region("eu"),) and not any("sweep" in o.split("=")[0] for o in one.overrides)


def test_jobs_share_neither_store_nor_name() -> None:
    one, two = (job(f"outer.lr={lr}", "run.store=s3://b/x y", "run.name=mine").overrides for lr in (1, 2))
    for key, head in {"run.store": "s3://b/x y/s-", "run.name": "mine-"}.items():
        assert find_override(one, key).startswith(head) and find_override(one, key) != find_override(two, key)
    assert (
        find_override(job().overrides, "run.name").startswith("s-")
        and find_override(job().overrides, "run.store") is None
    )
    for shared in ("run.dir=x", "elastic.lighthouse=http://127.0.0.1:1"):
        for overrides in (["+region=eu", shared], [f"+regions=[{{name: eu, overrides: ['{shared}']}}]"]):
            with pytest.raises(ConfigError, match=f"{shared} would be shared by all jobs"):
                make_job(overrides, Path("s"), 0)
    with pytest.raises(ConfigError, match=r"run\.store in eu"):
        make_job(["+regions=[{name: eu, overrides: ['run.store=x']}]"], Path("s"), 0)


def test_a_store_of_a_recipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compose = jobs_module.compose_config
    monkeypatch.setattr(jobs_module, "compose_config", lambda given: compose(["run.store=s3://b/x", *given]))
    with pytest.raises(ConfigError, match=r"run\.store=s3://b/x of a recipe would be shared"):
        check([job()])


def test_regions_of_a_sweep() -> None:
    assert split_regions(["+region=eu", "outer.lr=0.3"]) == ([Region("eu")], ["outer.lr=0.3"])
    assert split_regions(["+regions=[eu,{name: us,nproc: 2}]"]) == ([Region("eu"), Region("us", 2)], [])
    for bad in ([], ["+region=eu", "+regions=[us]"]):
        with pytest.raises(ConfigError, match=r"add either \+region=eu or '\+regions="):
            split_regions(bad)


def test_what_is_asked_for_twice_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('never')"]
    monkeypatch.setattr(jobs_module, "command", lambda _: command)
    found = [make_job(["+region=eu", f"outer.lr={lr}"], tmp_path, num) for num, lr in enumerate((1, 2, 1))]
    assert run_jobs(found, 3) == [math.inf] * 3 and capsys.readouterr().out.count("failed: never") == 2
    told = {path.parent: json.loads(path.read_text()) for path in tmp_path.glob("*/job.json")}
    assert set(told) == {found[0].dir, found[1].dir} and {t["why"] for t in told.values()} == {"never"}


def test_a_job_is_done_when_its_journal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the exit code of its launcher was, and also if nobody was there to note it."""
    found = [make_job(["+region=eu", f"outer.lr={lr}"], tmp_path, num) for num, lr in enumerate((1, 2, 3))]
    ends = []
    for one in found:
        write_run(one.dir)
        ends.append(max((one.dir / "store" / "journal").iterdir()))
    for end in ends[1:]:
        end.rename(tmp_path / f"{end.parents[2].name}.end")
    moves = f"import os; os.rename({str(tmp_path / found[1].dir.name)!r} + '.end', {str(ends[1])!r}); os._exit(1)"
    commands = {1: [sys.executable, "-c", moves], 2: [sys.executable, "-c", ""]}
    monkeypatch.setattr(jobs_module, "command", lambda job: commands[job.num])
    assert [math.isfinite(loss) for loss in run_jobs(found, 2)] == [True, True, False]
    told = [json.loads((one.dir / "job.json").read_text()) for one in found]
    assert [t["state"] for t in told] == ["done", "done", "failed"] and "before its end" in told[2]["why"]


def test_jobs_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    two = make_job(["+regions=[eu,{name: us,nproc: 2}]"], Path("s"), 0)
    assert [environment(two, n)["OMP_NUM_THREADS"] for n in (1, 2, 9)] == ["4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(two, 1)["OMP_NUM_THREADS"] == "3"


def test_the_same_command_finds_its_sweep() -> None:
    found = choose_dir(["+region=eu", "outer.lr=0.3,0.7", "sweep.parallel=2", "hydra/launcher=ray"])
    assert found == choose_dir(["outer.lr=0.3,0.7", "+region=eu"]) and found.parent == Path("sweeps").absolute()
    assert found != choose_dir(["outer.lr=0.3,0.9", "+region=eu"])
    assert choose_dir(["sweep.dir=x"]) == Path("x").absolute()
    with pytest.raises(ConfigError, match=r"set sweep\.dir=DIR"):
        choose_dir(["hydra.sweep.dir=x"])


def test_a_sweep_that_breaks_is_reported_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "it's, {odd} = $x"
    odd.mkdir()
    monkeypatch.chdir(odd)
    monkeypatch.setattr(sys, "argv", ["sweep", "+region=eu", "outer.lr=1,2"])
    monkeypatch.setattr(sweep_module, "hydrate", lambda: 1 / 0)
    reported = list[Path]()
    monkeypatch.setattr(sweep_module, "report", reported.append)
    with pytest.raises(ZeroDivisionError):
        sweep_module.sweep(sys.argv[1:])
    assert [str(path) for path in reported] == [find_override(sys.argv[-1:], "sweep.dir")]
    assert reported[0].parent == odd / "sweeps"


def test_optuna_keeps_a_study_in_a_database(tmp_path: Path) -> None:
    """It breaks with other versions of SQLAlchemy than the extra has."""
    import optuna

    for number in range(2):
        study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="s", load_if_exists=True)
        study.tell(study.ask(), math.inf if number else 2.0)
    assert [trial.values for trial in study.trials] == [[2.0], [math.inf]] and study.best_value == 2.0


def test_why_a_job_failed() -> None:
    said = [
        "eu  | step 1",
        "us  | torch.OutOfMemoryError: 80 GB",
        "eu  | step 2",
        "us  | rank 0 (pid 7) ended with exit code 1",
    ]
    assert (
        why([*said, "us  | ended with exit code 1: the other regions go on", "", "run  r1"])
        == "torch.OutOfMemoryError: 80 GB"
    )
    raised = [
        "eu  | Traceback (most recent call last):",
        "eu  |   File x",
        "us  | step 3",
        "eu  | KeyError: 1",
        "eu  | FATAL: so",
    ]
    assert why([*raised, "eu  | rank 0 (pid 7) ended with SIGABRT", *said]) == "KeyError: 1"
    killed = "us  | rank 0 (pid 7) ended with SIGKILL"
    assert why(["us  | step 2", killed]) == killed
    assert why(["eu  | inner.lr=x: set it", "eu  | ended with exit code 2: stopping the run"]) == "inner.lr=x: set it"
    assert why(["regions names eu more than once", ""]) == "regions names eu more than once" and why([]) == ""


# ---- what jobs came to ----


def write_course(run_dir: Path, losses: Sequence[float] = (3.0, 2.0)) -> None:
    """Two regions; us missed the first round and reports its second one again after a restart."""
    for region, first in (("eu", 1), ("us", 2)):
        with Metrics(run_dir / region / "metrics.jsonl") as metrics:
            for number in [n for n in range(first, len(losses) + 1) for _ in range(first)]:
                metrics.record(replace(ROUND, seq=number, round=number, bytes_up=1000 * first))
                loss = losses[number - 1] + (0.5 if region == "us" else 0)
                metrics.record(EvalRecord(number, loss, loss / 2, 2.7, 64, 0.1))
                metrics.record(EvalRecord(number, 9.0, 9.0, 9.0, 64, 0.1, "books"))


def test_a_course_counts_tokens_once_and_bytes_of_all_regions(tmp_path: Path) -> None:
    assert read_course(tmp_path) == ()
    write_course(tmp_path)
    assert read_course(tmp_path) == (Point(1, 256, 1000, 3.0, 1.5), Point(2, 512, 4000, 2.25, 1.125))
    write_course(tmp_path / "bad", [math.nan])
    assert read_course(tmp_path / "bad")[-1].loss == math.inf


def outcome(num: int, loss: float, state: str = "done", why: str = "", **values: Any) -> Outcome:
    course = (Point(1, 1000, 5000, loss + 1, loss), Point(2, 2000, 10_000, loss, loss / 2))
    return Outcome(num, Path(f"{num:012}"), state, why, values, course if state == "done" else ())


GRID = [
    outcome(3 * i + j, 2 + abs(lr - 0.5) + h / 1000, lr=lr, H=h, region="eu")
    for i, lr in enumerate((0.3, 0.5, 0.9))
    for j, h in enumerate((30, 100))
]
JOBS = [*sorted(GRID, key=lambda j: j.loss), outcome(9, 0, "failed", "no, <it> failed", lr=2.0, H=30, region="eu")]


def test_the_table_has_the_best_first_and_says_what_failed() -> None:
    lines = table(JOBS).splitlines()
    assert swept(JOBS) == ["lr", "H"]
    assert lines[0].split() == ["job", "lr", "H", "held-out", "bits/byte", "tokens", "sent"]
    assert lines[1].split() == ["best", "3", "0.5", "30", "2.0300", "1.015", "2.00k", "10.0", "kB"]
    assert [line.split()[0] for line in lines[2:]] == [str(j.num) for j in JOBS[1:]]
    assert lines[-1].endswith("–  failed: no, <it> failed")
    assert "diverged" in table([outcome(0, math.inf, lr=1)]) and "best" not in table([outcome(0, math.inf, lr=1)])


def test_the_csv_has_a_line_a_job() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(JOBS))))
    assert len(rows) == 7 and rows[0]["lr"] == "0.5" and float(rows[0]["held_out_nats_per_token"]) == JOBS[0].loss
    assert rows[0]["sent_bytes"] == "10000" and rows[-1]["why"] == "no, <it> failed" and rows[-1]["tokens"] == ""


def test_a_sweep_is_read_and_reported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not report(tmp_path) and list(tmp_path.iterdir()) == []
    for num, (state, losses) in enumerate([("started", [1.0]), ("done", [3.0, 2.0]), ("failed", []), ("done", [1.5])]):
        write_course(tmp_path / str(num), losses)
        told = {"num": num, "state": state, "why": "", "values": {"lr": num}}
        (tmp_path / str(num) / "job.json").write_text(json.dumps(told))
    found = [(job.num, job.loss) for job in read_sweep(tmp_path)]
    assert found == [(3, 1.5), (1, 2.25), (0, math.inf), (2, math.inf)]
    assert report(tmp_path) and "not finished" in capsys.readouterr().out
    assert {"results.csv", "sweep.svg"} <= {path.name for path in tmp_path.iterdir()}


# ---- the picture ----


def drawn(jobs: Sequence[Outcome], keys: Sequence[str]) -> tuple[ET.Element, list[str]]:
    """The picture, all of whose marks are inside of it, and its words."""
    root = ET.fromstring(picture(jobs, keys, "a<b"))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for mark in root.iter(f"{SVG}polyline"):
        for corner in str(mark.get("points")).split():
            x, y = map(float, corner.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    for mark in [*root.iter(f"{SVG}circle"), *root.iter(f"{SVG}text")]:
        x, y = (float(mark.get(name) or mark.get(f"c{name}") or -1) for name in "xy")
        assert 0 <= x <= width and 0 <= y <= height
    assert not [
        e for e in root.iter() if e.tag.endswith(("script", "image")) or any("href" in name for name in e.attrib)
    ]
    return root, ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]


def test_the_picture_of_two_keys() -> None:
    root, words = drawn(JOBS, ["lr", "H"])
    lines = [e.findtext(f"{SVG}title") for e in root.iter(f"{SVG}polyline")]
    for found in JOBS[:-1]:
        name = f"lr={found.values['lr']} H={found.values['H']}"
        assert lines.count(name) == 2 and f"{name}: {found.loss:.4f}" in words
    assert lines.count("H=30") == lines.count("H=100") == 1 and len(lines) == 14
    assert len(root.findall(f"{SVG}circle[@class='best']")) == 1 and "Final loss against lr (○ best: 2.0300)" in words
    assert {
        "committed tokens, all regions",
        "bytes sent, all regions",
        "lr",
        "held-out loss (nats/token)",
        "10.0 kB",
    } <= {*words}
    assert "Sweep a<b: 6 of 7 jobs done" in words


def best_at(root: ET.Element) -> tuple[float, float]:
    (best,) = root.findall(f"{SVG}circle[@class='best']")
    return float(best.get("cx", 0)), float(best.get("cy", 0))


def test_the_best_is_marked_where_it_is() -> None:
    jobs = sorted(
        (outcome(i, (lr - 0.6) ** 2 + 2, lr=lr) for i, lr in enumerate((0.3, 0.5, 0.9))), key=lambda j: j.loss
    )
    root, _ = drawn(jobs, ["lr"])
    x, y = best_at(root)
    dots = [(float(e.get("cx", 0)), float(e.get("cy", 0))) for e in root.iter(f"{SVG}circle") if e.get("r") == "3.5"]
    assert sorted(dots)[1] == (x, y) == max(dots, key=lambda at: at[1]), "lowest loss is lowest in the picture"


def test_pictures_of_many_jobs_names_and_nothing() -> None:
    many = sorted(
        (outcome(i, 2 + 1 / (i + 1), lr=i, codec=f"c{i % 3}", H=i % 2) for i in range(20)), key=lambda j: j.loss
    )
    root, words = drawn(many, ["lr", "codec", "H"])
    assert len(root.findall(f"{SVG}circle[@class='best']")) == 3 and "and 12 more, in grey" in words
    assert {"Final loss against codec (○ best: 2.0500)", "c0", "c1", "c2"} <= set(words)
    _, words = drawn([outcome(0, 2.0, lr=1)], [])
    assert "job 0: 2.0000" in words
    _, words = drawn([outcome(0, 0, "failed", "x")], [])
    assert "no loss to show yet" in words[0]
    silent = [replace(found, course=tuple(replace(p, sent=0) for p in found.course)) for found in JOBS[:2]]
    assert any("nobody to send to" in text for text in drawn(silent, ["lr"])[1])


values = st.lists(st.floats(1e-6, 1e12) | st.just(1.0), min_size=1, max_size=5)


@given(values, st.booleans())
def test_axes_hold_their_values_between_few_round_ticks(numbers: list[float], zero: bool) -> None:
    for axis in (linear("", numbers, str, zero), logarithmic("", numbers, str)):
        assert all(-1e-3 <= axis.share(value) <= 1.001 for value in numbers), axis
        assert 2 <= len(axis.ticks) <= 20 and axis.low < axis.high
        assert [axis.share(value) for value, _ in axis.ticks] == sorted(axis.share(value) for value, _ in axis.ticks)
        assert axis.share(axis.ticks[-1][0]) == pytest.approx(1) and axis.share(axis.ticks[0][0]) == pytest.approx(0)
