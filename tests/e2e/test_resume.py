"""Everything is killed at once; what comes back goes on from the last committed state, with any machines."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e.cluster import SLOW_STEPS, Cluster, RegionProcess, children, kill, parent

BASE = ["outer.sync_every=8", "run.rounds=10", "inner.schedule=wsd"]
TWO = [*BASE, "elastic.start_regions=2"]


def kept(cluster: Cluster, *regions: str) -> list[str]:
    """Sockets of uploaders that have what a rank of these one-rank regions has saved."""
    state = cluster.state()
    assert state is not None
    names = [hashlib.sha256(f"regions/{state.run}/{name} 0 1".encode()).hexdigest()[:32] for name in regions]
    return [x for x in Path("/proc/net/unix").read_text().splitlines() if any(f"@ckpt-{name}-" in x for name in names)]


def digests(cluster: Cluster, region: str) -> list[str]:
    return [r["digest"] for r in cluster.records(region, "round")]


def start_two(cluster: Cluster, *overrides: str) -> list[RegionProcess]:
    return [cluster.start(name, *TWO, *overrides) for name in ("eu", "us")]


@pytest.mark.parametrize(("fragments", "memory"), [(1, False), (2, False), (2, True)])
def test_the_same_regions_reach_the_same_digest(cluster: Cluster, tmp_path, fragments: int, memory: bool) -> None:
    """10 rounds in one go, and with a kill -9 of everything on the way: bit for bit the same. memory: of everything but the
    uploaders; these still have all that the ranks had saved, and the store's copy of the regions' own state is gone."""
    overrides = [f"outer.fragments={fragments}"]
    start_two(cluster, *overrides)
    cluster.finish()
    whole = digests(cluster, "eu")
    assert len(whole) == 10 and digests(cluster, "us") == whole

    (tmp_path / "second").mkdir()
    second = Cluster(tmp_path / "second")
    try:
        overrides += ["ckpt.linger=60"] if memory else []
        second.kill_when(
            lambda: second.rounds() >= 5 and second.inner_states_saved("eu", "us"),
            *start_two(second, *overrides, SLOW_STEPS),
            spare="ckpt.uploader" if memory else "",
        )
        places = kept(second, "eu", "us")
        if memory:
            shutil.rmtree(second.run / "store" / "regions")
        after = start_two(second, *overrides)
        second.finish()
        state = second.state()
        assert state is not None and state.rounds == 10
        assert digests(second, "eu")[-1] == digests(second, "us")[-1] == whole[-1]
        assert len(places) == 2 * memory and not kept(second, "eu", "us"), "handed over, or not there at all"
        for region in after:
            assert region.text().count("from this machine's memory") == 2 * memory, region.text()
    finally:
        second.close()


def test_another_shape_goes_on(cluster: Cluster) -> None:
    """Killed with 2 x 1 rank, resumed by one region of 4 ranks with tensor parallelism: same θ and momentum at the
    resume, and a loss curve that goes on. It waits for a second region as the run did at its start, but not for ever."""
    regions = start_two(cluster)
    cluster.kill_when(
        lambda: len(cluster.records("eu", "round")) >= cluster.rounds() >= 5, *regions
    )  # it says its last one
    at_resume = cluster.state()
    assert at_resume is not None
    asia = cluster.start("asia", *TWO, "elastic.start_patience=3", "parallel.tp=2", nproc=4)
    cluster.finish()
    assert "waiting for 2 regions" in asia.text()
    entries = [json.loads(p.read_text()) for p in sorted((cluster.run / "store" / "journal").glob("*.json"))]
    rounds = [e for e in entries if e["kind"] == "round"]
    first = next(e for e in rounds if e["answers"][0]["member"].startswith("asia"))
    # What the new shape says of the planes it loaded is what the old one computed.
    loaded = [r["digest"] for r in cluster.records("eu", "round") if r["seq"] == first["base"]]
    assert loaded == [first["theta"]]
    losses = [r["loss"] for r in cluster.records("eu", "eval")]
    later = [r["loss"] for r in cluster.records("asia", "eval")]
    assert later[0] < losses[0] and later[-1] < losses[-1] + 0.05


def test_one_region_resumes_its_own_run(cluster: Cluster) -> None:
    """FSDP 4 and then one rank: inner state comes back through flat space, so the curves agree to fp32 noise."""
    eu = cluster.start("eu", *BASE, SLOW_STEPS, nproc=4)
    cluster.kill_when(lambda: cluster.rounds() >= 4 and cluster.inner_states_saved("eu"), eu)
    cluster.start("eu", *BASE)
    cluster.finish()
    state = cluster.state()
    assert state is not None and state.rounds == 10
    assert "inner state of entry" in cluster.regions[-1].text()
    assert state.ledger.applied == state.rounds * 8 * 4


def test_torchrun_brings_a_region_back_whose_rank_was_killed(cluster: Cluster) -> None:
    """Twice, either rank: every start's ranks find each other, not those of the start before, and the memory of these."""
    endless = [*BASE, "run.rounds=1000000", "ckpt.linger=60", SLOW_STEPS]  # a save is whole when the kill comes
    region = cluster.start("eu", *endless, nproc=2, env={"PET_MAX_RESTARTS": "10"})
    for starts in range(1, 3):
        cluster.until(lambda n=starts: len(cluster.records("eu", "run")) == n)
        saved = len(cluster.records("eu", "checkpoint"))
        cluster.until(lambda n=saved: len(cluster.records("eu", "checkpoint")) > n)
        ranks = [pid for pid in children(region.process.pid) if parent(pid) == region.process.pid]
        os.kill(ranks[starts % 2], signal.SIGKILL)
    cluster.until(lambda: len(cluster.records("eu", "run")) == 3)
    rounds = cluster.rounds()
    cluster.until(lambda: cluster.rounds() > rounds)
    assert region.text().count("from this machine's memory, inner state of entry") == 2, region.text()


def test_a_region_comes_back_while_the_lighthouse_is_gone(cluster: Cluster) -> None:
    """Its address is of a network that is nowhere (RFC 5737): the journal says where the others are."""
    endless, env = [*TWO, "run.rounds=1000000"], {"DILOCO_SECRET": "of this run, and long enough for it"}
    eu, us = [cluster.start(name, *endless, env=env) for name in ("eu", "us")]
    cluster.until(lambda: cluster.rounds() >= 2)
    kill(us)
    cluster.regions.remove(us)
    again = cluster.start("us", *endless, "elastic.lighthouse=http://192.0.2.1:1", "elastic.host=127.0.0.1", env=env)
    cluster.until(lambda: len(cluster.records("us", "run")) == 2)
    first = cluster.rounds()

    def together() -> bool:
        return any(r["round"] > first and len(r["members"]) == 2 for r in cluster.records("us", "round"))

    cluster.until(together)
    assert "warning: elastic.lighthouse=http://192.0.2.1:1 does not answer" in again.text()
    for region in (eu, again):
        region.signal(signal.SIGINT)
    cluster.finish()
