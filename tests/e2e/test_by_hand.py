"""Regions that come, leave, die and lag, started as a person would start them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import SMALL, Cluster, children, parent

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = ["outer.sync_every=8", "run.rounds=1000000", "ckpt.every=4"]


def entries(cluster: Cluster, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((cluster.run / "store" / "journal").glob("*.json"))]
    return [entry for entry in found if entry["kind"] == kind]


def regions_of(entry: dict[str, Any]) -> list[str]:
    """Who contributed to a round."""
    return sorted(answer["member"].rpartition("_")[0] for answer in entry["answers"])


def wait_for_rounds(cluster: Cluster, regions: list[str], count: int = 2) -> None:
    """Until `count` more rounds hold the contributions of exactly these regions."""
    since = len(entries(cluster, "round"))
    cluster.until(lambda: sum(regions_of(e) == regions for e in entries(cluster, "round")[since:]) >= count)


def digests(cluster: Cluster, region: str) -> dict[int, str]:
    return {record["seq"]: record["digest"] for record in cluster.records(region, "round")}


def test_a_second_region_joins_a_live_run(cluster: Cluster) -> None:
    """The first is alone, starts the lighthouse and trains; the second fetches θ and momentum from it, contributes, and
    both end with the same parameters."""
    settings = ["outer.sync_every=32", "run.rounds=40"]
    eu = cluster.start("eu", *settings)
    cluster.until(lambda: cluster.rounds() >= 2)
    us = cluster.start("us", *settings)
    cluster.finish()
    assert "lighthouse: none answered, started one at" in eu.text() and "lighthouse" not in us.text()
    assert "from a member that is alive" in us.text()
    contributors = [regions_of(entry) for entry in entries(cluster, "round")]
    assert contributors[:2] == [["eu"], ["eu"]] and contributors[-1] == ["eu", "us"], contributors
    state = cluster.state()
    assert state is not None and (state.rounds, state.stopped) == (40, "run.rounds=40 reached")
    ours, theirs = digests(cluster, "eu"), digests(cluster, "us")
    assert len(ours) == 40 and theirs and theirs == {seq: ours[seq] for seq in theirs} and max(theirs) == max(ours)


def test_a_region_leaves_comes_back_is_killed_and_comes_back(cluster: Cluster) -> None:
    eu = cluster.start("eu", *ENDLESS, "elastic.start_regions=2")
    cluster.until(lambda: "lighthouse: none answered" in eu.text())
    first = cluster.start("us", *ENDLESS, "elastic.start_regions=2")
    wait_for_rounds(cluster, ["eu", "us"])
    first.signal(signal.SIGTERM)
    cluster.until(lambda: "asked to leave (SIGTERM)" in first.text())
    first.signal(signal.SIGTERM)  # as from Slurm, and then from torchrun
    assert first.wait() == 0, first.text()
    assert [entry["member"].rpartition("_")[0] for entry in entries(cluster, "leave")] == ["us"]
    wait_for_rounds(cluster, ["eu"])

    second = cluster.start("us", *ENDLESS)
    wait_for_rounds(cluster, ["eu", "us"])
    second.signal(signal.SIGKILL)
    second.wait()
    wait_for_rounds(cluster, ["eu"])

    third = cluster.start("us", *ENDLESS)
    wait_for_rounds(cluster, ["eu", "us"])
    state = cluster.state()
    assert state is not None and sorted(m.region for m in state.members.values()) == ["eu", "us"]
    for region in (eu, third):
        region.signal(signal.SIGINT)
    cluster.finish()
    assert len(entries(cluster, "join")) == 4 and len(entries(cluster, "leave")) == 3
    ours, theirs = digests(cluster, "eu"), digests(cluster, "us")
    both = ours.keys() & theirs.keys()
    assert len(both) >= 6 and all(ours[seq] == theirs[seq] for seq in both)


@pytest.mark.parametrize("nproc", [1, 2])
def test_who_is_asked_to_leave_before_it_is_a_member_ends_without_an_error(cluster: Cluster, nproc: int) -> None:
    """torchrun would start it again."""
    eu = cluster.start("eu", *ENDLESS, "elastic.start_regions=2", nproc=nproc)

    def ranks() -> list[int]:
        pid = eu.process.pid
        return [pid] if nproc == 1 else [child for child in children(pid) if parent(child) == pid]

    cluster.until(lambda: len(ranks()) == nproc and all(map(catches_sigterm, ranks())))
    for pid in ranks():
        os.kill(pid, signal.SIGTERM)
    assert eu.wait(60) == 0, eu.text()
    assert "before this region was a member" in eu.text() and "Traceback" not in eu.text(), eu.text()
    assert not entries(cluster, "join")


def catches_sigterm(pid: int) -> bool:
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def test_a_second_ctrl_c_exits_at_once(cluster: Cluster) -> None:
    """Even from within an inner step that does not end."""
    eu = cluster.start("eu", *ENDLESS, "model.loss=tests.e2e.own_model.stuck_loss")
    cluster.until(lambda: "stuck" in eu.text())
    eu.signal(signal.SIGINT)
    cluster.until(lambda: "asked to leave (SIGINT)" in eu.text())
    eu.signal(signal.SIGINT)
    assert eu.wait(30) == 130 and "Traceback" not in eu.text(), eu.text()


def test_with_boundary_first_nobody_waits_for_the_slow(cluster: Cluster) -> None:
    settings = ["outer.boundary=first", "outer.sync_every=24", "run.rounds=6", "elastic.start_regions=2"]
    cluster.start("eu", *settings)
    cluster.start("us", *settings, "inner.batch=64")
    cluster.finish()
    rounds = entries(cluster, "round")
    assert len(rounds) == 6 and all(regions_of(entry) == ["eu", "us"] for entry in rounds)
    steps = [{a["member"].rpartition("_")[0]: a["steps"] for a in entry["answers"]} for entry in rounds]
    assert all(max(step.values()) >= 24 for step in steps), steps
    assert 0 < sum(step["us"] for step in steps) < sum(step["eu"] for step in steps), steps
    assert digests(cluster, "eu") == digests(cluster, "us")


# ---- the launchers ----


def processes_of(mark: str) -> list[str]:
    """Command lines of the living processes with this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def launch(directory: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "E2E_MARK": str(directory)}
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=directory, env=env, stdout=log, stderr=subprocess.STDOUT
        )


def test_launch_local_trains_unlike_regions_and_ctrl_c_stops_all(cluster: Cluster) -> None:
    """mars has no file in configs/region."""
    regions = "regions=[{name: eu, nproc: 4, overrides: [parallel.tp=2]}, mars]"
    directory = cluster.directory
    launcher = launch(directory, "launch.local", regions, f"run.dir={cluster.run}", *SMALL, *ENDLESS)
    try:
        deadline = time.monotonic() + 150
        while len(entries(cluster, "round")) < 3:
            assert launcher.poll() is None and time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.05)
        launcher.send_signal(signal.SIGINT)
        code = launcher.wait(90)
    finally:
        launcher.kill()
    said = (directory / "log").read_text()
    assert code == 0 and "Traceback" not in said and "killed" not in said, said
    assert processes_of(f"E2E_MARK={directory}") == []
    assert all(regions_of(entry) == ["eu", "mars"] for entry in entries(cluster, "round")[:3])
    assert entries(cluster, "leave"), "a region says so when it goes"
    for name in ("eu", "mars"):
        assert re.search(rf"^{name} +\| step \d+", said, re.MULTILINE), said
        assert re.search(rf"^{name} +\| round \d+.*eu_\d+, mars_\d+", said, re.MULTILINE), said
    assert re.search(r"^digests +equal in every round", said, re.MULTILINE), said
