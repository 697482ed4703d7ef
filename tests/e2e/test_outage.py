"""A part of the store fails while a run goes on."""

from __future__ import annotations

import os

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
