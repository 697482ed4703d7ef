"""Regions that are killed, join and leave while rounds of several fragments are under way."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.cluster import SLOW_STEPS, Cluster, RegionProcess
from tests.e2e.sampled import lines
from tests.e2e.test_trajectories import Wire, check, load, merged

DECAY = 0.9
SETTINGS = ["outer.fragments=2", "outer.sync_every=8", "outer.max_overlap_steps=7", "inner.lr=1e-3", "codec=int4"]
SETTINGS += ["codec.error_feedback=true", f"codec.feedback_decay={DECAY}", "run.report_every=1"]
ROUNDS = 20
SLOW = 5
"""Inner steps that an exchange takes: more than lie between two boundaries."""


def start(cluster: Cluster, name: str, *overrides: str, nproc: int = 1) -> RegionProcess:
    env = {"RECORD": str(cluster.directory / "record"), "SLOW": str(SLOW)}
    return cluster.start(name, *SETTINGS, *overrides, nproc=nproc, module="tests.e2e.recorded", env=env)


def rounds(cluster: Cluster) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((cluster.run / "store" / "journal").glob("*.json"))]
    return [entry for entry in found if entry["kind"] == "round"]


def names(entry: dict[str, Any]) -> list[str]:
    return [answer["member"].rpartition("_")[0] for answer in entry["answers"]]


def merges(cluster: Cluster, region: str, entry: dict[str, Any]) -> bool:
    """The region has recorded its merge of the round."""
    found = (cluster.directory / "record" / region).glob(f"{entry['seq']}-{entry['fragment']}-r*-residual.npy")
    return bool(list(found))


def in_flight(cluster: Cluster, *regions: str) -> bool:
    """All regions have saved their own planes for the newest round and recorded it, with a fragment in flight."""
    state, entries = cluster.state(), rounds(cluster)
    if state is None or len(entries) < 4 or not all(merges(cluster, region, entries[-1]) for region in regions):
        return False
    paths = [cluster.run / f"store/regions/{state.run}/{r}/{entries[-1]['seq']}/manifest.json" for r in regions]
    return all(p.exists() and json.loads(p.read_text())["progress"]["clock"]["overdue"] > 0 for p in paths)


def trained_on(record: Path, region: str) -> list[int]:
    """The samples behind the region's parameters: steps that a restart threw away do not count."""
    steps: dict[int, list[int]] = {}
    for step, indices in filter(lambda line: isinstance(line, list), lines(record, region)):
        steps = {s: i for s, i in steps.items() if s < step} | {step: indices}
    assert list(steps) == list(range(1, len(steps) + 1))
    return [i for indices in steps.values() for i in indices]


@pytest.mark.parametrize("nproc", [1, 2])
def test_everything_is_killed_with_fragments_in_flight(cluster: Cluster, nproc: int) -> None:
    """And comes back, one region on other ranks: θ, momentum, residuals and local parameters go on bit for bit as numpy says,
    no sample is trained on twice, and the schedule does not go back."""
    settings = [f"run.rounds={ROUNDS}", "elastic.start_regions=2", "inner.schedule=wsd"]
    before = [start(cluster, name, *settings, SLOW_STEPS) for name in ("eu", "us")]
    cluster.kill_when(lambda: in_flight(cluster, "eu", "us"), *before)
    newest = rounds(cluster)[-1]["seq"]
    after = [start(cluster, "eu", *settings, nproc=nproc), start(cluster, "us", *settings)]
    cluster.finish()
    assert all(f"inner state of entry {newest}" in region.text() for region in after)
    assert all("going on from the run's parameters" not in region.text() for region in after)

    record = cluster.directory / "record"
    check(cluster, record, ["eu", "us"], ROUNDS, Wire("int4", decay=DECAY))
    seen = [trained_on(record, name) for name in ("eu", "us")]
    assert len({*seen[0], *seen[1]}) == len(seen[0]) + len(seen[1])
    state = cluster.state()
    assert state is not None and state.rounds == ROUNDS
    assert state.ledger.applied <= len(seen[0]) + len(seen[1]) and state.ledger.applied >= (ROUNDS - 2) * 2 * 4 * 4
    for name in ("eu", "us"):
        steps = {r["step"]: r["progress"] for r in cluster.records(name, "step")}
        progress = [steps[step] for step in sorted(steps)]
        assert progress == sorted(progress) and progress[-1] <= 1.0
    digests = [{r["seq"]: r["digest"] for r in cluster.records(name, "round")} for name in ("eu", "us")]
    assert len(digests[0]) == ROUNDS and digests[0] == digests[1]


def test_regions_come_and_go_while_fragments_are_in_flight(cluster: Cluster) -> None:
    """Who joins starts without a residual and loses nothing of its work until it is in a round; who leaves or dies takes
    nothing from the others."""
    endless = ["run.rounds=1000000", "ckpt.every=4", "elastic.peer_timeout=2"]

    def until(*expected: str) -> None:
        since = len(rounds(cluster))
        cluster.until(lambda: sum(names(e) == sorted(expected) for e in rounds(cluster)[since:]) >= 4)

    eu = start(cluster, "eu", *endless, "elastic.start_regions=2")
    us = start(cluster, "us", *endless, "elastic.start_regions=2")
    until("eu", "us")
    asia = start(cluster, "asia", *endless)
    until("asia", "eu", "us")
    us.signal(signal.SIGTERM)
    assert us.wait() == 0, us.text()
    until("asia", "eu")
    asia.signal(signal.SIGKILL)
    asia.wait()
    until("eu")
    eu.signal(signal.SIGINT)
    cluster.finish()

    record, wire = cluster.directory / "record", Wire("int4", decay=DECAY)
    for entry in rounds(cluster):
        f, seq = entry["fragment"], entry["seq"]
        if not merges(cluster, "eu", entry):
            continue  # the last ones
        theta, old = load(record, "eu", seq, f, "theta"), load(record, "eu", entry["base"], f, "theta")
        for name in filter(lambda name: merges(cluster, name, entry), ("eu", "us", "asia")):
            assert np.array_equal(load(record, name, seq, f, "theta"), theta)
            base = load(record, name, seq, f, "local") if name in names(entry) else old
            x = merged(load(record, name, seq, f, "before"), theta, base, None)
            assert np.array_equal(load(record, name, seq, f, "after"), x), (name, seq)
            if name in names(entry):
                wire.contribution(name, f, old - base)
            residual = wire.residual.get((name, f), np.zeros_like(theta))
            assert np.array_equal(load(record, name, seq, f, "residual"), residual), (name, seq)
    state = cluster.state()
    assert state is not None and sorted(m.region for m in state.members.values()) == ["asia"], (
        "who died says no goodbye"
    )


def test_with_boundary_first_unlike_regions_overlap(cluster: Cluster) -> None:
    """A region of 16 times the work per step contributes what it has; fragments take turns, and all agree."""
    settings = ["outer.boundary=first", "run.rounds=24", "elastic.start_regions=2"]
    for name, more in (("eu", "inner.batch=4"), ("us", "inner.batch=64")):
        cluster.start(name, *SETTINGS, *settings, more)
    cluster.finish()
    steps = [{a["member"].rpartition("_")[0]: a["steps"] for a in entry["answers"]} for entry in rounds(cluster)]
    assert len(steps) == 24 and all(sorted(step) == ["eu", "us"] for step in steps)
    assert sum(step["us"] for step in steps) < sum(step["eu"] for step in steps)
    state = cluster.state()
    assert state is not None and [fragment.rounds for fragment in state.fragments] == [12, 12]
    digests = [[r["digest"] for r in cluster.records(name, "round")] for name in ("eu", "us")]
    assert digests[0] == digests[1]
    assert max(r["overlap"] for r in cluster.records("eu", "round")) > 0
