"""Regions as jobs of a real Slurm."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from ckpt.store import Store
from diloco.journal import Journal
from tests.e2e.cluster import SMALL
from tests.e2e.test_bad_input import command
from tests.ports import free_port
from tests.slurm import Slurm
from tests.slurm import slurm as slurm

TIMEOUT = 300.0


def submit(slurm: Slurm, region: str, folder: Path, *arguments: str) -> None:
    """As somebody would who follows docs/launching.md."""
    done = command(["slurm", f"+region={region}", *arguments], folder, "launch.render")
    assert done.code == 0 and done.err == "", done
    (line,) = re.findall(r"^    (sbatch .*)$", done.out, re.MULTILINE)
    slurm.command(*shlex.split(line), cwd=folder)


def contributors(folder: Path) -> list[list[str]]:
    """Who contributed, round by round."""
    return [sorted(a["member"].rpartition("_")[0] for a in e["answers"]) for e in entries(folder, "round")]


def entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((folder / "run/store/journal").glob("*.json"))]
    return [entry for entry in found if entry["kind"] == kind]


def test_a_job_is_cancelled_and_its_region_leaves_and_submitted_again_it_joins(slurm: Slurm, tmp_path: Path) -> None:
    """us has two ranks. Slurm's SIGTERM reaches every process of the job; torchrun passes its own on to the ranks."""
    slurm.environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    lighthouse = f"elastic.lighthouse=http://127.0.0.1:{free_port()}"
    run = [*SMALL, "outer.sync_every=8", "run.rounds=1000000", "ckpt.every=4", "run.dir=run", lighthouse]
    shape = ["parallel.device=cpu", "sbatch=[--oversubscribe]", "max_restarts=1"]

    def wait_for(regions: list[str]) -> None:
        since = len(contributors(tmp_path))
        slurm.until(lambda: contributors(tmp_path)[since:].count(regions) >= 2, TIMEOUT)

    try:
        submit(slurm, "eu", tmp_path, *run, *shape, "nproc=1", "elastic.start_regions=2")
        submit(slurm, "us", tmp_path, *run, *shape, "nproc=2", "elastic.start_regions=2")
        wait_for(["eu", "us"])
        slurm.command("scancel", "--name=diloco-us")
        slurm.until(lambda: slurm.jobs() == ["diloco-eu"], TIMEOUT)
        assert [entry["member"].rpartition("_")[0] for entry in entries(tmp_path, "leave")] == ["us"]
        wait_for(["eu"])
        slurm.command("sbatch", "diloco-us.sbatch", cwd=tmp_path)
        wait_for(["eu", "us"])
        for region in ("us", "eu"):
            slurm.command("scancel", f"--name=diloco-{region}")
        slurm.until(lambda: not slurm.jobs(), TIMEOUT)
    except AssertionError as error:
        logs = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(tmp_path.glob("*.log"))]
        raise AssertionError("\n".join([str(error), *logs, slurm.command("squeue"), slurm.command("sinfo")])) from error
    journal = Journal(Store(str(tmp_path / "run/store")))
    journal.read()
    assert journal.state is not None and not journal.state.members  # the last two have left in order, too
    us = "".join(path.read_text() for path in tmp_path.glob("diloco-us-*.log"))
    assert us.count("asked to leave (SIGTERM), does so") == 2 and "from a member that is alive" in us, us
    rounds = [{r["seq"]: r["digest"] for r in records(tmp_path, name, "round")} for name in ("eu", "us")]
    assert rounds[1] and rounds[1].items() <= rounds[0].items()


def records(folder: Path, region: str, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "run" / region / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]
