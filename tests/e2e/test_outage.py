"""A part of the store fails while a run goes on, or what a region missed is not there any more."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from tests.e2e.cluster import SLOW_STEPS, Cluster


def test_a_checkpoint_that_cannot_be_stored_costs_itself_only(cluster: Cluster) -> None:
    region = cluster.start("eu", "outer.sync_every=4", "run.rounds=30", "ckpt.keep=1", nproc=2)
    cluster.until(lambda: cluster.rounds() >= 2)
    checkpoints = cluster.run / "store" / "checkpoints"
    os.rename(checkpoints, cluster.run / "store" / "away")
    checkpoints.write_text("in the way")  # root may write anywhere, but not below a file
    cluster.until(lambda: "was not stored" in region.text())
    checkpoints.unlink()
    os.rename(cluster.run / "store" / "away", checkpoints)
    before = cluster.rounds()
    cluster.finish()
    assert before < cluster.rounds() == 30
    saved = [record["prefix"] for record in cluster.records("eu", "checkpoint")]
    assert None in saved and saved[-1] is not None


def rounds(cluster: Cluster, region: str) -> list[dict[str, Any]]:
    """The rounds that hold its work."""
    entries = [json.loads(path.read_text()) for path in sorted((cluster.run / "store" / "journal").glob("*.json"))]
    found = [entry for entry in entries if entry["kind"] == "round"]
    return [e for e in found if any(a["member"].startswith(f"{region}_") for a in e["answers"])]


def test_who_missed_rounds_whose_bits_are_gone_takes_a_newer_state(cluster: Cluster) -> None:
    """us stands still while eu goes on, and the bits are dropped that checkpoints hold; then eu leaves. The run goes on from
    where eu was, with what us had done."""
    settings = ["outer.sync_every=8", "run.rounds=1000000", "elastic.start_regions=2", "elastic.lease_rounds=1000"]
    settings += ["ckpt.every=1", "ckpt.keep=1", "outer.boundary=first", "outer.fragments=2"]
    eu, us = [cluster.start(name, *settings) for name in ("eu", "us")]
    cluster.until(lambda: len(rounds(cluster, "us")) >= 3)
    us.signal(signal.SIGSTOP)
    missed = len(rounds(cluster, "eu")) + 8
    cluster.until(lambda: len(rounds(cluster, "eu")) >= missed)
    eu.signal(signal.SIGTERM)
    assert eu.wait(60) == 0, eu.text()
    last, before = rounds(cluster, "eu")[-2:], len(rounds(cluster, "us"))
    us.signal(signal.SIGCONT)
    cluster.until(lambda: len(rounds(cluster, "us")) >= before + 4)
    us.signal(signal.SIGTERM)
    cluster.finish()
    assert "fragment 0 as of entry" in us.text() and "from checkpoint checkpoints/" in us.text(), us.text()
    theirs = {r["seq"]: r["digest"] for r in cluster.records("eu", "round")}
    based = {e["base"]: e["theta"] for e in rounds(cluster, "us")}
    assert all(based[entry["seq"]] == theirs[entry["seq"]] for entry in last), "it builds on what eu had"


def test_a_store_that_is_away_costs_no_step(cluster: Cluster) -> None:
    """Nothing can be committed, and both regions go on beyond their boundaries; all that they did is in a round then."""
    settings = ["outer.sync_every=8", "run.rounds=1000000", "elastic.start_regions=2", "outer.boundary=first"]
    settings += ["elastic.max_local_steps=400", "run.report_every=1", "elastic.lease_rounds=1000", SLOW_STEPS]
    regions = [cluster.start(name, *settings) for name in ("eu", "us")]
    cluster.until(lambda: len(rounds(cluster, "us")) >= 3)
    journal, away = cluster.run / "store" / "journal", cluster.run / "store" / "away"
    os.rename(journal, away)
    journal.write_text("in the way")  # root may write anywhere, but not below a file
    before = {name: steps(cluster, name) for name in ("eu", "us")}
    cluster.until(lambda: all(steps(cluster, name) >= before[name] + 40 for name in before))
    journal.unlink()
    os.rename(away, journal)
    count = len(rounds(cluster, "us"))
    cluster.until(lambda: len(rounds(cluster, "us")) >= count + 3 and len(rounds(cluster, "eu")) >= count + 3)
    for region in regions:
        region.signal(signal.SIGTERM)
    cluster.finish()
    for name, region in zip(before, regions, strict=True):
        said = [a["steps"] for e in rounds(cluster, name) for a in e["answers"] if a["member"].startswith(f"{name}_")]
        assert max(said) > 24, said
        assert steps(cluster, name) - 16 <= sum(said) <= steps(cluster, name), "each of them once"
        assert "trying again" in region.text() and "Traceback" not in region.text(), region.text()


def steps(cluster: Cluster, region: str) -> int:
    return max((record["step"] for record in cluster.records(region, "step")), default=0)
