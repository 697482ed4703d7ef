"""A region whose main loop hangs, while its control thread and its connections live."""

from __future__ import annotations

import os
import signal

from tests.e2e.cluster import Cluster, kill


def test_the_others_go_on_without_a_region_that_hangs(cluster: Cluster) -> None:
    overrides = ("outer.sync_every=4", "run.rounds=12", "elastic.start_regions=2", "elastic.hang_timeout=1")
    eu, us = (
        cluster.start(name, *overrides, module="tests.bench._failing", env={"PACE": "0.1"}) for name in ("eu", "us")
    )
    cluster.until(lambda: cluster.rounds() >= 2)
    os.kill(us.process.pid, signal.SIGUSR1)
    cluster.until(lambda: "its main loop hangs (an inner step for" in us.text())
    assert eu.wait() == 0 and cluster.rounds() == 12
    members = [len(record["members"]) for record in cluster.records("eu", "round")]
    assert members[:2] == [2, 2] and members[-1] == 1
    assert "it said goodbye" in eu.text()
    kill(us)
