"""Regions that cannot be dialled directly: one behind a gateway's single port, one that can only dial out; and regions whose
lighthouses are two."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.certs import issue
from tests.e2e.cluster import Cluster, gateway
from tests.ports import free_port


@pytest.mark.parametrize("secured", ["tls", "open"])
def test_a_region_behind_a_gateway_and_one_that_only_dials_out(cluster: Cluster, tmp_path: Path, secured: str) -> None:
    common = ["outer.sync_every=4", "run.rounds=3", "elastic.start_regions=2", "elastic.min_regions=2"]
    options: list[str] = []
    if secured == "tls":
        issue(tmp_path / "certs", ["eu", "us"])
        common, options = [*common, f"elastic.tls={tmp_path}/certs"], ["--tls", f"{tmp_path}/certs"]
    with gateway(free_port(), *options) as address:
        cluster.start("eu", f"elastic.gateway={address}", *common, nproc=2)
        cluster.start("us", "elastic.dial_only=true", *common)
        cluster.until(lambda: cluster.rounds() >= 1)
        state = cluster.state()
        assert state is not None
        members = {member.region: member for member in state.members.values()}
        assert members["us"].endpoints == members["us"].data == ("",)
        ways = [*members["eu"].endpoints, *members["eu"].data]
        assert [way.split("/")[0] for way in ways] == [address] * 4 and len(set(ways)) == 4
        cluster.finish()
    rounds = [[record["digest"] for record in cluster.records(name, "round")] for name in ("eu", "us")]
    assert len(rounds[0]) == 3 and rounds[0] == rounds[1]


def test_a_gateway_that_is_not_there_is_one_sentence(cluster: Cluster) -> None:
    region = cluster.start("eu", f"elastic.gateway=127.0.0.1:{free_port()}")
    assert region.wait() == 2
    assert "elastic.gateway=" in region.text() and "Traceback" not in region.text()


def test_regions_at_two_lighthouses_train_together(cluster: Cluster) -> None:
    """Each asks one of its own: they know each other from the journal."""
    common = ["outer.sync_every=4", "run.rounds=3", "elastic.start_regions=2", "elastic.min_regions=2"]
    cluster.start("eu", *common)
    cluster.start("us", *common, f"elastic.lighthouse=http://127.0.0.1:{free_port()}")
    cluster.finish()
    assert all("lighthouse: none answered, started one" in region.text() for region in cluster.regions)
    rounds = [[record["digest"] for record in cluster.records(name, "round")] for name in ("eu", "us")]
    assert len(rounds[0]) == 3 and rounds[0] == rounds[1]
