"""Journal, bits and checkpoints in object storage: everything is killed, and another region goes on from there."""

from __future__ import annotations

from ckpt.store import Store
from diloco.journal import Journal
from tests.e2e.cluster import Cluster
from tests.s3_server import BUCKET

BASE = [f"run.store=s3://{BUCKET}/run", "outer.sync_every=4", "run.rounds=6"]


def test_two_regions_and_a_resume_from_s3(server: str, cluster: Cluster) -> None:
    journal = Journal(Store(f"s3://{BUCKET}/run"))

    def rounds() -> int:
        journal.read()
        return journal.state.rounds if journal.state else 0

    both = [cluster.start(name, *BASE, "elastic.start_regions=2") for name in ("eu", "us")]
    cluster.kill_when(lambda: rounds() >= 3, *both)
    before = rounds()
    asia = cluster.start("asia", *BASE)
    cluster.finish()
    assert f"state after {before} rounds from checkpoint" in asia.text()  # not one committed round is lost
    assert rounds() == 6 and journal.state is not None and journal.state.epoch == 0
