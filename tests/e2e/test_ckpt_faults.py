"""Whole runs whose object store fails under them, and runs that lose regions for good: each goes on, or says in one sentence why
not, and what is resumed afterwards is the last committed state, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from ckpt.store import Store
from diloco.journal import Journal, entry_key
from tests.e2e.cluster import Cluster, RegionProcess, send, uploaders
from tests.s3_proxy import Proxy, Rule
from tests.s3_server import BUCKET, Server

BASE = ["outer.sync_every=4", "run.rounds=1000000", "inner.schedule=wsd"]


class Stored:
    """Regions whose run is in object storage behind a proxy, and the run as its store has it, past the proxy."""

    def __init__(self, cluster: Cluster, weed: Server, proxy: Proxy, store: Store) -> None:
        self.cluster, self.weed, self.proxy, self.store = cluster, weed, proxy, store
        self.journal = Journal(store)

    def start(self, name: str, *overrides: str, nproc: int = 1) -> RegionProcess:
        env = {**self.weed.environment, "AWS_ENDPOINT_URL": self.proxy.url}
        overrides = (f"run.store={self.store.url}", *BASE, *overrides)
        return self.cluster.start(name, *overrides, nproc=nproc, env=env)

    def start_two(self, *overrides: str) -> list[RegionProcess]:
        return [self.start(name, "elastic.start_regions=2", *overrides) for name in ("eu", "us")]

    def rounds(self) -> int:
        self.journal.read()
        return self.journal.state.rounds if self.journal.state else 0

    def entries(self) -> list[dict[str, Any]]:
        self.journal.read()
        assert self.journal.state is not None
        return [json.loads(self.store.read(entry_key(seq))) for seq in range(self.journal.state.seq + 1)]

    def more_rounds(self, count: int) -> None:
        wanted = self.rounds() + count
        self.cluster.until(lambda: self.rounds() >= wanted)

    def resumes(self, of: str = "") -> dict[str, Any]:
        """One region of another shape, from the store alone: loses no committed round, and says of the planes it loaded what
        `of` computed, or without it what the journal's own tool does. Returns its first round."""
        before, seq = self.rounds(), self.entries()[-1]["seq"]
        asia = self.start("asia", "parallel.tp=2", nproc=2)
        first: list[dict[str, Any]] = []

        def committed() -> bool:
            theirs = [e for e in self.entries()[seq + 1 :] if e["kind"] == "round"]
            first[:] = [e for e in theirs if e["answers"][0]["member"].startswith("asia_")]
            return len(first) >= 2

        self.cluster.until(committed)
        assert f"state after {before} rounds from checkpoint" in asia.text(), asia.text()
        send(signal.SIGTERM, asia)
        asia.wait(120)
        if of:
            seen = {r["seq"]: r["digest"] for r in self.cluster.records(of, "round")}
            assert first[0]["base"] in seen, "the round that asia builds on is the last that they merged"
            assert first[0]["theta"] == seen[first[0]["base"]], "bit for bit"
        else:
            replay = [sys.executable, "-m", "diloco.journal", "replay", self.store.url]
            subprocess.run(replay, check=True, timeout=120)
        return first[0]


@pytest.fixture
def stored(
    weed: Server, cluster: Cluster, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stored]:
    for name, value in weed.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # that one may have another server's address
    store = Store(f"s3://{BUCKET}/{request.node.name.translate(str.maketrans('[] ', '---')).strip('-')}")
    with Proxy(weed.port) as proxy:
        yield Stored(cluster, weed, proxy, store)
        cluster.close()  # before the proxy is


def last_merged(stored: Stored, *regions: RegionProcess) -> bool:
    """The first region has merged the last committed round, and none is on its way to the store: the digest that a resume must
    give is in its records."""
    if stored.proxy.underway("PUT", r"/journal/"):
        return False
    last = [entry["seq"] for entry in stored.entries() if entry["kind"] == "round"][-1]
    return any(r["seq"] == last for r in stored.cluster.records(regions[0].name, "round"))


def kill_when_merged(stored: Stored, *regions: RegionProcess) -> None:
    alive = [region for region in regions if region.process.poll() is None]
    stored.cluster.kill_when(lambda: last_merged(stored, *alive), *alive)


FAULTS = {
    "503 storm": (Rule("status"), 20),
    "500 storm": (Rule("status", status=500), 20),
    "credentials revoked": (Rule("status", status=403), 20),
    "disk full": (Rule("status", "PUT", status=507), 10),
    "time-outs": (Rule("hang"), 4),
    "slow": (Rule("slow", rate=100e3), 40),
    "answers lost": (Rule("lose", "PUT"), 10),
    "uploads reset": (Rule("cut", "PUT", at=1000), 10),
    "reads break off": (Rule("truncate", "GET", at=100), 10),
}
"""Name -> what happens to requests, and how many of them it hits before it is over."""


REFUSED = ("503 storm", "500 storm", "credentials revoked", "disk full")
BROKEN = ("time-outs", "slow", "answers lost", "uploads reset", "reads break off")


@pytest.mark.parametrize("names", [REFUSED, BROKEN], ids=["refusing", "breaking"])
def test_a_store_that_fails_for_a_while(stored: Stored, names: tuple[str, ...]) -> None:
    """Again and again, each time in another way: training goes on meanwhile, rounds are committed again afterwards, and the
    resume is exact."""
    regions = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 2)
    for name in names:
        rule, hits = FAULTS[name]
        with stored.proxy.fault(replace(rule, hits=0)) as rule:
            stored.cluster.until(lambda rule=rule, hits=hits: rule.hits >= hits)
        stored.more_rounds(2)
        assert all(region.process.poll() is None for region in regions), name
        assert all("Traceback" not in region.text() for region in regions), stored.cluster.logs()
    kill_when_merged(stored, *regions)
    stored.resumes(of="eu")


def test_a_server_that_is_killed_and_started_again(stored: Stored) -> None:
    regions = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 2)
    stored.weed.kill()
    try:
        stored.cluster.until(lambda: all("trying again" in r.text() or "was not stored" in r.text() for r in regions))
    finally:
        stored.weed.start()
    stored.more_rounds(3)
    assert all("Traceback" not in region.text() for region in regions), stored.cluster.logs()
    kill_when_merged(stored, *regions)
    stored.resumes(of="eu")


@pytest.mark.parametrize("name", ["credentials revoked", "nobody there"])
def test_a_resume_without_the_store_is_one_sentence(stored: Stored, name: str) -> None:
    """Nothing is trained from a made-up state because the real one cannot be read; later it can."""
    regions = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 2)
    kill_when_merged(stored, *regions)
    if name == "nobody there":
        stored.weed.kill()
        rules = []
    else:
        rules = [stored.proxy.add(FAULTS[name][0])]
    try:
        late = stored.start("late")
        code = late.wait(300)
        assert code != 0 and "Traceback" not in late.text() and stored.store.url in late.text().splitlines()[-1]
    finally:
        if name == "nobody there":
            stored.weed.start()
        for rule in rules:
            stored.proxy.remove(rule)
    stored.cluster.regions.remove(late)
    stored.resumes(of="eu")


def test_the_end_to_end_of_the_issue(stored: Stored) -> None:
    """One region's process group is killed for good and the other goes on; everything is killed; one region of another shape
    resumes from S3: the same global digest, and the loss goes on where it was."""
    eu, us = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 3)
    os.killpg(us.process.pid, signal.SIGKILL)
    us.process.wait()
    stored.more_rounds(3)
    alone = [e for e in stored.entries() if e["kind"] == "round"][-1]
    assert [answer["member"].split("_")[0] for answer in alone["answers"]] == ["eu"], "it goes on alone"
    kill_when_merged(stored, eu)
    stored.resumes(of="eu")
    before = [r["loss"] for r in stored.cluster.records("eu", "eval")]
    later = [r["loss"] for r in stored.cluster.records("asia", "eval")]
    assert later[0] < before[0] and later[-1] < before[-1] + 0.05, (before, later)


def test_a_stop_while_the_store_is_slow(stored: Stored) -> None:
    """SIGTERM during uploads: the region leaves in order, and the resume is exact."""
    regions = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 2)
    with stored.proxy.fault(Rule("slow", "PUT", rate=200e3)) as rule:
        stored.cluster.until(lambda: rule.hits >= 5)
        send(signal.SIGTERM, *regions)
        assert [region.wait(120) for region in regions] == [0, 0], stored.cluster.logs()
    assert stored.rounds() >= 2
    stored.resumes()  # the last round may be one that they left without


def test_nobody_waits_for_the_uploads_of_a_region_that_leaves(stored: Stored) -> None:
    """Its store hangs when it is asked to leave: the other goes on alone at once, while it waits for its store."""
    eu, us = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 2)
    with stored.proxy.fault(Rule("hang", "PUT", r"regions/.*/eu/")) as rule:
        stored.cluster.until(lambda: rule.hits >= 1)
        send(signal.SIGTERM, eu)
        stored.cluster.until(lambda: "it said goodbye" in us.text())
        stored.more_rounds(3)
        assert eu.process.poll() is None, eu.text()
        assert stored.entries()[-1]["kind"] == "round" and "leave" in [entry["kind"] for entry in stored.entries()]
        assert us.text().count("gone") == 1 and "not ready" not in us.text(), us.text()
    assert eu.wait(120) == 0, eu.text()
    send(signal.SIGTERM, us)
    assert us.wait(120) == 0, us.text()


STAGES = {
    "arena": Rule("hang", "PUT", r"checkpoints/.*\.safetensors"),
    "a part": Rule("hang", "PUT", r"checkpoints/.*/parts/", spare=1),
    "manifest": Rule("hang", "PUT", r"checkpoints/.*/manifest\.json"),
    "manifest written": Rule("lose", "PUT", r"checkpoints/.*/manifest\.json"),
}
"""Stage of a save -> what is done to its request; everything is killed when it comes."""


@pytest.mark.parametrize("stage", STAGES)
def test_everything_is_killed_at_a_stage_of_a_save(stored: Stored, stage: str) -> None:
    regions = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 3)
    with stored.proxy.fault(replace(STAGES[stage])) as rule:
        stored.cluster.until(lambda: rule.hits >= 1)
        kill_when_merged(stored, *regions)
    stored.resumes(of="eu")


def all_uploaders(*regions: RegionProcess) -> list[int]:
    return [pid for region in regions for pid in uploaders(region.process.pid)]


def checkpoints(stored: Stored) -> set[str]:
    return {key for key in stored.store.list("checkpoints") if key.endswith("/manifest.json")}


def test_uploaders_are_killed_again_and_again(stored: Stored) -> None:
    """Each is replaced, which a region says; checkpoints are committed afterwards, and training has not noticed."""
    regions = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 2 and all(all_uploaders(region) for region in regions))
    for turn in range(4):
        victim = regions[turn % 2]
        with stored.proxy.fault(Rule("slow", "PUT", r"checkpoints/", rate=50e3)) as rule:
            stored.cluster.until(lambda rule=rule: rule.hits >= 1)
            old = all_uploaders(victim)
            for pid in old:
                os.kill(pid, signal.SIGKILL)
        stored.cluster.until(lambda v=victim, old=old: all_uploaders(v) and not set(all_uploaders(v)) & set(old))
        seen = checkpoints(stored)
        stored.cluster.until(lambda seen=seen: checkpoints(stored) - seen)
    assert all("Traceback" not in region.text() for region in regions), stored.cluster.logs()
    kill_when_merged(stored, *regions)
    stored.resumes(of="eu")


def stopped_when_merged(stored: Stored, *regions: RegionProcess) -> bool:
    """Stops the regions, but not their uploaders, which are in sessions of their own."""
    for region in regions:
        region.signal(signal.SIGSTOP)
    if last_merged(stored, *regions):
        return True
    for region in regions:
        region.signal(signal.SIGCONT)
    return False


def test_uploaders_outlive_their_regions(stored: Stored) -> None:
    """The regions are killed during an upload: what they had handed over is committed all the same."""
    regions = stored.start_two()
    stored.cluster.until(lambda: stored.rounds() >= 2 and all(all_uploaders(region) for region in regions))
    orphans = all_uploaders(*regions)
    seen = checkpoints(stored)
    with stored.proxy.fault(Rule("hang", "PUT", r"checkpoints/.*\.safetensors")) as rule:
        stored.cluster.until(lambda: rule.hits >= 2)
        stored.cluster.until(lambda: stopped_when_merged(stored, *regions))
        for region in regions:
            region.signal(signal.SIGKILL)
            region.process.wait()
    stored.cluster.until(lambda: checkpoints(stored) - seen)
    stored.cluster.until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in orphans))
    stored.resumes(of="eu")
