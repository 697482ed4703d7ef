"""The summary of a run, from a real journal and real metrics; sweeps, with a stand-in for the training
loop."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt.store import Store
from diloco.errors import ConfigError
from diloco.fold import PROTOCOL
from diloco.journal import Journal
from diloco.metrics import EvalRecord, Metrics, RoundRecord, RunRecord, StepRecord
from launch.regions import Region
from launch.summary import describe, main, read_summary
from launch.sweep import Result, final_loss, split_regions, table

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS, STEPS, SENT = 1_000_000, 8, 1_000_100
SETTINGS = {
    "sync_every": 4, "lr": 0.7, "momentum": 0.9, "boundary": "steps", "rounds": 2, "tokens": None,
    "seq_len": 16, "seed": 0, "ahead": 8, "lease_rounds": 4, "start_regions": 2,
}  # fmt: skip
RUN = RunRecord("eu", "eu_1", 1, 1, PARAMETERS, 1, 4, "int8", 32, 1.0)
STEP = StepRecord(1, STEPS, 0.1, 5.0, 7.2, 1e-3, 1.0, 1e3, 10**8)
ROUND = RoundRecord(3, 1, 2, 0, 1, ("eu_1", "us_2"), 256, 4, SENT, SENT, 0.1, 0.0, 1.0, "a" * 64)


def write_run(run_dir: Path, us_digest: str = "b" * 64) -> None:
    """Two regions, two rounds of four steps, a restart of us that reports its first round again."""
    store = Store(str(run_dir / "store"))
    journal = Journal(store)

    def append(**entry: object) -> None:
        assert journal.append(entry) and journal.read()

    append(kind="open", protocol=PROTOCOL, run="r1", settings=SETTINGS, fingerprint={"fragments": 1},
           checkpoint="checkpoints/0")  # fmt: skip
    for member in ("eu_1", "us_2"):
        append(kind="join", member=member, region=member[:2], endpoints=["h:1"], data=["h:2"], samples_per_step=2)
    for base in (0, 3):
        assert journal.state
        leases = {name: member.leases[0] for name, member in journal.state.members.items()}
        answers = [
            {"member": name, "tokens": 128, "leases": [[lease.id, lease.applied + 8]]} for name, lease in leases.items()
        ]
        append(kind="round", epoch=0, fragment=0, base=base, head=0, answers=answers, digest="d")
    append(kind="stop", reason="run.rounds=2 reached")
    for n in (0, 2, 10):
        store.write(f"checkpoints/{n}/manifest.json", b"{}")
    store.write("checkpoints/11/shard", b"not whole")
    for region, last in (("eu", "b" * 64), ("us", us_digest)):
        with Metrics(run_dir / region / "metrics.jsonl") as metrics:
            metrics.record(replace(RUN, region=region))
            metrics.record(STEP)
            metrics.record(ROUND)
            if region == "us":
                metrics.record(ROUND)
            metrics.record(replace(STEP, step=STEPS, loss=3.0 if region == "eu" else 4.0, bits_per_byte=4.5))
            metrics.record(replace(ROUND, seq=4, round=2, step=STEPS, digest=last))
            metrics.record(EvalRecord(2, 3.25, 4.69, 25.8, 100, 1.0))
            metrics.record(EvalRecord(2, 2.0, 2.9, 7.39, 100, 1.0, "books"))


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    found = read_summary(tmp_path)
    assert found and (found.rounds, found.tokens, found.regions) == (2, 512, ("eu", "us"))
    assert found.sent == 4 * SENT and found.data_parallel == 2 * (1 / 2) * 4 * PARAMETERS * STEPS * 2
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run            r1: run.rounds=2 reached",
        "rounds         2 by eu, us",
        "tokens         512",
        "training loss  5.0000 → 3.5000 nats/token (7.200 → 4.500 bits/byte, perplexity 148.4 → 33.12)",
        "held-out loss  3.2500 → 3.2500 nats/token (4.690 → 4.690 bits/byte, perplexity 25.79 → 25.79)",
        "books loss     2.0000 → 2.0000 nats/token (2.900 → 2.900 bits/byte, perplexity 7.389 → 7.389)",
        "sent           4.00 MB by all regions; data parallel would have sent 64.0 MB, 16 times as much",
        "digests        equal in every round that two or more regions have seen (2); the last is bbbbbbbbbbbb",
        f"checkpoint     {tmp_path}/store/checkpoints/10",
        f"metrics        {tmp_path}/eu/metrics.jsonl",
        f"metrics        {tmp_path}/us/metrics.jsonl",
    ]


def test_regions_that_differ_are_shouted_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, us_digest="c" * 64)
    assert main([str(tmp_path)]) == 1
    assert "digests        DIFFER between regions after journal entries 4: this is a bug" in capsys.readouterr().out


def test_a_run_of_one_region_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "us" / "metrics.jsonl").unlink()
    found = read_summary(tmp_path)
    assert found and "one region has nobody to send to" in describe(found) and "(no round was seen" in describe(found)
    assert main([str(tmp_path / "nowhere")]) == 0 and "no run in" in capsys.readouterr().out
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_journal_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "store" / "journal" / "0000000002.json").write_text("{}")
    assert main([str(tmp_path)]) == 1
    assert "journal" in capsys.readouterr().err


# ---- sweeps ----


def test_regions_of_a_sweep() -> None:
    assert split_regions(["+region=eu", "outer.lr=0.3", "run.dir=x"]) == ([Region("eu")], ["outer.lr=0.3"])
    assert split_regions(["+regions=[eu,{name:us,nproc:2}]"]) == ([Region("eu"), Region("us", 2)], [])
    for bad in ([], ["+region=eu", "+regions=[us]"]):
        with pytest.raises(ConfigError, match=r"add either \+region=eu or '\+regions="):
            split_regions(bad)


def test_the_result_is_the_latest_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no evaluation"):
        final_loss(tmp_path, ["eu", "us"])
    for region, (number, loss) in {"eu": (3, 1.5), "us": (2, 1.25)}.items():
        with Metrics(tmp_path / region / "metrics.jsonl") as metrics:
            metrics.record(EvalRecord(number, loss, loss, 1.0, 1, 1.0))
            metrics.record(EvalRecord(9, 0.5, 0.5, 1.0, 1, 1.0, "books"))
    assert final_loss(tmp_path, ["eu", "us"]) == (1.5, 1.5)
    with Metrics(tmp_path / "us" / "metrics.jsonl") as metrics:
        metrics.record(EvalRecord(4, math.nan, math.nan, math.nan, 1, 1.0))
    assert final_loss(tmp_path, ["eu", "us"]) == (math.inf, math.inf)


def test_table_is_sorted() -> None:
    results = [Result("0", ("a=1",), 2.5, 3.6, Path()), Result("1", ("a=2", "b=3"), 1.5, 2.2, Path())]
    assert table(results).splitlines() == [
        "held-out  bits/byte  job  overrides",
        "  1.5000      2.200    1  a=2 b=3",
        "  2.5000      3.600    0  a=1",
    ]


SWEEP = """
    from launch import sweep
    sweep.TRAIN, sweep.LIGHTHOUSE = "fake_train", "fake_lighthouse"
    sweep.main()
"""
TRAIN = """
    import sys
    from pathlib import Path
    from diloco.metrics import EvalRecord, Metrics
    args = dict(a.split("=", 1) for a in sys.argv[1:])
    lr = float(args["outer.lr"])
    if lr < 0:
        sys.exit(print(f"outer.lr={lr} is negative", file=sys.stderr) or 2)
    with Metrics(Path(args["run.dir"], args["+region"], "metrics.jsonl")) as metrics:
        metrics.record(EvalRecord(1, lr + 1, lr + 2, 1.0, 1, 1.0))
"""


def run_sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "region").mkdir(parents=True)
    (folder / "config.yaml").write_text("outer: {lr: 0.7}\nhydra: {output_subdir: null}\n")
    (folder / "region" / "eu.yaml").write_text("name: eu\n")
    lighthouse = "import signal; print('lighthouse http://127.0.0.1:1', flush=True); signal.pause()"
    for name, text in {"sweeping": SWEEP, "fake_train": TRAIN, "fake_lighthouse": lighthouse}.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    command = [sys.executable, "sweeping.py", "--config-path", str(folder), *arguments]
    env = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=60)


def test_a_sweep_runs_each_job_and_ends_with_a_table(tmp_path: Path) -> None:
    done = run_sweep(tmp_path, "-m", "+region=eu", "outer.lr=0.7,0.3", "hydra.sweep.dir=out")
    assert done.returncode == 0, done
    assert [line.split() for line in done.stdout.splitlines()[-2:]] == [
        ["1.3000", "2.300", "1", "+region=eu", "outer.lr=0.3"],
        ["1.7000", "2.700", "0", "+region=eu", "outer.lr=0.7"],
    ]
    assert (tmp_path / "out" / "1" / "eu" / "metrics.jsonl").exists()


def test_a_job_that_fails_ends_the_sweep_with_its_code(tmp_path: Path) -> None:
    done = run_sweep(tmp_path, "-m", "+region=eu", "outer.lr=-1,0.3")
    assert done.returncode == 2 and "outer.lr=-1.0 is negative" in done.stdout and "Traceback" not in done.stderr
    assert "outer.lr=0.3" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["+region=eu"], "runs sweeps: add -m"),
        (["-m", "outer.lr=1"], "+region=eu or"),
        (["-m", "+region=eu", "outer.lrr=1,2"], "did you mean outer.lr?"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = run_sweep(tmp_path / "a", *arguments)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done
