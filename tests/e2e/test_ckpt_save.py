"""Saves beside training, with whole regions: uploaders killed, stores that refuse, regions lost half-way, clean stops."""

from __future__ import annotations

import os
import signal

from ckpt.checkpoint import load_manifest
from ckpt.reading import verify
from ckpt.store import Store
from tests.e2e.cluster import Cluster, children, kill, parent, uploaders

BASE = ["outer.sync_every=8", "run.rounds=1000000"]


def saved(cluster: Cluster, region: str = "eu") -> list[int]:
    return [record["seq"] for record in cluster.records(region, "checkpoint") if record["prefix"]]


def newest_verifies(cluster: Cluster, seq: int) -> None:
    state, store = cluster.state(), Store(str(cluster.run / "store"))
    assert state is not None
    verify(store, load_manifest(store, f"checkpoints/{state.run}/{seq}"))


def test_killed_uploaders_are_replaced_under_a_run(cluster: Cluster) -> None:
    """Of both ranks, again and again: the run goes on, and so do its checkpoints."""
    eu = cluster.start("eu", *BASE, "ckpt.keep=1000", nproc=2)
    cluster.until(lambda: saved(cluster))
    for _ in range(3):
        found = uploaders(eu.process.pid)
        assert found
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        seen = len(saved(cluster))
        cluster.until(lambda n=seen: len(saved(cluster)) > n + 1)
    assert "another one goes on" in eu.text()
    for rank in (pid for pid in children(eu.process.pid) if parent(pid) == eu.process.pid):
        os.kill(rank, signal.SIGTERM)  # torchrun itself would end with an error
    cluster.finish()
    newest_verifies(cluster, saved(cluster)[-1])


def test_a_save_while_saving_is_skipped_and_counted_and_a_clean_stop_waits(cluster: Cluster) -> None:
    eu = cluster.start("eu", *BASE)
    cluster.until(lambda: saved(cluster))
    store = cluster.run / "store"
    os.rename(store / "checkpoints", store / "away")
    (store / "checkpoints").write_text("in the way")
    before = cluster.rounds()
    cluster.until(lambda: "skipped so far" in eu.text() and cluster.rounds() > before + 3)
    eu.signal(signal.SIGTERM)
    cluster.until(lambda: "does so after this step" in eu.text())
    assert eu.process.poll() is None
    (store / "checkpoints").unlink()
    os.rename(store / "away", store / "checkpoints")
    cluster.finish()
    reasons = [record.get("reason") or "" for record in cluster.records("eu", "checkpoint")]
    skips = [reason for reason in reasons if "still being uploaded" in reason]
    assert skips and f"{len(skips)} skipped so far" in skips[-1]
    assert cluster.records("eu", "checkpoint")[-1]["prefix"], "the one under way was waited for"
    newest_verifies(cluster, saved(cluster)[-1])


def test_others_save_for_a_region_that_is_gone(cluster: Cluster) -> None:
    """us and its uploader are killed at any moment; checkpoints go on, each of them whole."""
    settings = [*BASE, "elastic.start_regions=2", "ckpt.make_up_after=0.5", "ckpt.keep=1000"]
    eu, us = cluster.start("eu", *settings), cluster.start("us", *settings)
    cluster.until(lambda: len(saved(cluster)) > 2)
    kill(us)
    seen = len(saved(cluster))
    cluster.until(lambda: len(saved(cluster)) > seen + 2)
    eu.signal(signal.SIGTERM)
    assert eu.wait(120) == 0, eu.text()
    for seq in saved(cluster)[-3:]:
        newest_verifies(cluster, seq)
