"""Sweeps of real runs, with real processes: side by side, failed, stopped, run again, by Optuna and by Ray."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.store import Store
from diloco.journal import Journal
from tests.e2e.cluster import SMALL
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TINY = [*(o for o in SMALL if not o.startswith("outer.lr")), "outer.sync_every=4", "run.rounds=2"]


class Sweep:
    """`python -m launch.sweep` in a process group of its own, and what it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DILOCO_TEST_TREE": str(folder)}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "launch.sweep", *arguments]
        piped = subprocess.PIPE
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.env,
            stdout=piped,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=200)
        return process.returncode, said

    def left(self) -> list[str]:
        """Command lines of what lives of it, whoever its parents are."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if f"DILOCO_TEST_TREE={self.folder}\0".encode() in (entry / "environ").read_bytes():
                        found.append((entry / "cmdline").read_text().replace("\0", " "))
                except OSError:
                    continue
        return found

    def wait_for_nothing(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.left():
            assert time.monotonic() < deadline, self.left()
            time.sleep(0.05)


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    started = Sweep(tmp_path)
    yield started
    for process in started.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def records(directory: Path) -> dict[Path, dict[str, object]]:
    return {path.parent: json.loads(path.read_text()) for path in directory.glob("*/job.json")}


def run_id(job: Path) -> str:
    journal = Journal(Store(str(job / "store")))
    journal.read()
    assert journal.state is not None and journal.state.stopped
    return journal.state.run


def test_jobs_side_by_side_one_of_which_fails(sweep: Sweep) -> None:
    own, fine = "tests.e2e.own_model", "diloco.model.next_token_loss"
    grid = ["-m", "+regions=[eu,us]", *TINY, "sweep.parallel=3", "sweep.dir=s"]
    code, said = sweep.run(*grid, f"model.loss={own}.failing_loss,{fine},{own}.slow_loss")
    assert code == 1, said
    directory = sweep.folder / "s"
    jobs = records(directory)
    assert sorted(str(told["state"]) for told in jobs.values()) == ["done", "done", "failed"], said
    done = [path for path, told in jobs.items() if told["state"] == "done"]
    assert len({run_id(path) for path in done}) == 2
    assert {path.parent.name for path in done[0].glob("*/metrics.jsonl")} == {"eu", "us"}
    assert said.index("job 2   | regions=") < min(said.index(" done after"), said.index(" failed:")), "side by side"
    assert said.count("failed: RuntimeError: this loss was never meant to be") == 2, "as it happens, and in the table"
    rows = list(csv.DictReader((directory / "results.csv").open()))
    assert [row["state"] for row in rows] == ["done", "done", "failed"] and rows[2][
        "model.loss"
    ] == f"{own}.failing_loss"
    assert 3 < float(rows[0]["held_out_nats_per_token"]) <= float(rows[1]["held_out_nats_per_token"]) < 7
    assert rows[0]["tokens"] == str(2 * 2 * 4 * 4 * 32) and 100_000 < int(rows[0]["sent_bytes"]) < 1_000_000
    picture = ET.parse(directory / "sweep.svg").getroot()
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2 + 2 + 1

    before = {path: (path / "eu" / "metrics.jsonl").read_bytes() for path in done}
    code, said = sweep.run(*grid, f"model.loss={fine}")
    assert code == 1 and said.count("done before: held-out loss") == 1, "the failed one is still there"
    assert before == {path: (path / "eu" / "metrics.jsonl").read_bytes() for path in done}
    (directory / "results.csv").unlink()
    assert sweep.run("report", "s")[0] == 0 and len((directory / "results.csv").read_text().splitlines()) == 4
    sweep.wait_for_nothing()


def test_ctrl_c_leaves_what_is_done_and_the_same_command_goes_on(sweep: Sweep) -> None:
    command = ["+region=eu", *TINY[:-1], "run.rounds=1,5000", "run.tokens=null", "ckpt.every=1000", "sweep.parallel=2"]
    process = sweep.start(*command)
    assert process.stdout is not None
    said = ""
    while " done after" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    (directory,) = (sweep.folder / "sweeps").iterdir()
    (other,) = (path for path, told in records(directory).items() if told["state"] == "started")
    deadline = time.monotonic() + 60
    while not list(other.glob("store/journal/*4.json")):
        assert time.monotonic() < deadline, (other / "log.txt").read_text()
        time.sleep(0.05)
    assert sweep.run(*command)[0] == 2, "it is in use"
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=90)
    assert (
        process.returncode == 130 and "stopped: the same command goes on with it" in rest and "Traceback" not in rest
    ), rest
    sweep.wait_for_nothing()
    assert "not finished" in rest and (directory / "sweep.svg").exists()
    assert "leave" in (other / "store" / "journal" / sorted(os.listdir(other / "store" / "journal"))[-1]).read_text()

    process = sweep.start(*command)
    assert process.stdout is not None
    said = process.stdout.readline() + process.stdout.readline()
    assert said.count("done before: held-out loss") == 1 and said.count("run.rounds=5000") == 1, said
    process.kill()
    process.communicate()
    sweep.wait_for_nothing(60)


@pytest.fixture
def ray(sweep: Sweep) -> Iterator[str]:
    """The address of a Ray cluster of one node."""
    port = free_port()
    sweep.env["RAY_AUTH_MODE"] = "disabled"  # a token may lie in the home directory
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", "--num-cpus=2", "--block"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false"]
    command += [f"--temp-dir=/tmp/ray-{port}"]  # its sockets' names may not be long
    away = sweep.folder / "away"  # what lies in a worker's directory by mistake is not where the sweep looks
    away.mkdir()
    process = subprocess.Popen(
        command, cwd=away, env=sweep.env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert any("Ray runtime started" in line for line in process.stdout)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=60)
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)


def test_optuna_on_a_ray_cluster_minimizes_the_held_out_loss(sweep: Sweep, ray: str) -> None:
    study = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.sampler.seed=1",
    ]
    command = ["+region=eu", *TINY, *study, "outer.lr=interval(0.1,1.0)", "sweep.dir=s"]
    code, said = sweep.run(*command, "hydra/launcher=ray", f"hydra.launcher.ray.init.address={ray}")
    assert code == 0 and "pid=" in said, said  # workers of Ray have said so
    rows = list(csv.DictReader((sweep.folder / "s" / "results.csv").open()))
    best = (sweep.folder / "s" / "optimization_results.yaml").read_text()
    assert len(rows) == 2 and all(0.1 <= float(row["outer.lr"]) <= 1 for row in rows)
    assert f"outer.lr: {rows[0]['outer.lr']}" in best and f"best_value: {rows[0]['held_out_nats_per_token']}" in best
    code, said = sweep.run(*command)
    assert code == 0 and said.count("done before") == 2, "the seed asks for the same, whoever launches them"


def test_a_ray_cluster_that_is_not_there_is_one_sentence(sweep: Sweep) -> None:
    code, said = sweep.run("+region=eu", *TINY, "hydra/launcher=ray", "hydra.launcher.ray.init.address=auto")
    assert code == 2 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith(
        "launch.sweep: hydra.launcher.ray.init.address=auto: Could not find any running Ray"
    )
