"""A part of the store fails while a run goes on, or what a region missed is not there any more."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from tests.e2e.cluster import Cluster


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
