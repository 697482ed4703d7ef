"""Uploads by real processes: killed at every stage, raced, refused by the store, and stood up by the other members."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ckpt.checkpoint import load_manifest
from ckpt.parts import skipped_key
from ckpt.reading import Reader, verify
from ckpt.store import Store
from tests.s3_server import BUCKET
from tests.uploading import SIZES, Planes, Rank, planes, stored, until

AT = "checkpoints/run/5"


def check(url: str, state: Planes, prefix: str = AT) -> dict[str, Any]:
    """The checkpoint holds this state, bit for bit."""
    store = Store(url)
    manifest = load_manifest(store, prefix)
    verify(store, manifest)
    for (plane, fragment), size in SIZES.items():
        read = Reader(store, manifest).read(plane, fragment, 0, size).numpy()
        assert (read == state[plane, fragment]).all()
    return manifest


def kill(rank: Rank) -> int:
    pid = rank.uploads.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def replaced(rank: Rank, pid: int) -> bool:
    return rank.uploads.pid not in (None, pid)


@pytest.fixture(params=["directory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return str(tmp_path)
    request.getfixturevalue("server")
    return f"s3://{BUCKET}/{tmp_path.name}"


def test_regions_of_different_shapes_share_one_copy(url: str) -> None:
    state, members = planes(), ["asia_1", "eu_1", "us_1"]
    ranks = [Rank(url, "asia_1", state), *(Rank(url, "eu_1", state, r, 3) for r in range(3)), Rank(url, "us_1", state)]
    for rank in ranks:
        rank.save(rank.attempt(AT, members, members.index(rank.member)))
    outcomes = [outcome for rank in ranks for outcome in rank.outcomes()]
    assert [o["kind"] for o in outcomes] == ["stored"] * 5 and [o["mine"] for o in outcomes].count(True) == 1
    manifest = check(url, state)
    elements = sum(p["stop"] - p["start"] for shard in manifest["shards"] for p in shard["pieces"])
    sizes = [Store(url).size(key) for key in Store(url).list(AT) if key.endswith(".safetensors")]
    assert elements == sum(SIZES.values()) and sum(sizes) == sum(shard["bytes"] for shard in manifest["shards"])


STAGES = {"before any shard": AT, "before its part": f"{AT}/parts", "before the manifest": f"{AT}/manifest.json/x"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_uploader_is_replaced_and_goes_on(tmp_path: Path, stage: str) -> None:
    """What it needs next cannot be made until it has been killed: something is in the way."""
    obstacle, state = tmp_path / STAGES[stage], planes()
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    rank = Rank(str(tmp_path), "eu_1", state)
    rank.save(rank.attempt(AT, ["eu_1"], 0))
    if stage == "before its part":
        until(lambda: list((tmp_path / AT).glob("*.safetensors")))
    if stage == "before the manifest":
        until(lambda: list((tmp_path / AT / "parts").glob("*.json")))
    pid = kill(rank)
    until(lambda: replaced(rank, pid))
    assert rank.uploads.busy() and not stored(tmp_path, AT), "it must not be there before"
    obstacle.unlink()
    if stage == "before the manifest":
        obstacle.parent.rmdir()
    assert [o["kind"] for o in rank.outcomes()] == ["stored"]
    check(str(tmp_path), state)


def test_one_that_dies_while_idle_is_replaced_by_the_next_save(tmp_path: Path) -> None:
    state = planes()
    rank = Rank(str(tmp_path), "eu_1", state)
    kill(rank)
    until(lambda: rank.uploads.pid is None)
    rank.save(rank.attempt(AT, ["eu_1"], 0))
    assert [o["kind"] for o in rank.outcomes()] == ["stored"]
    check(str(tmp_path), state)


def test_others_make_up_for_a_region_that_is_lost_half_way(url: str) -> None:
    """One of two ranks of eu said its part; the other never does. us and asia have the rest, and one of them is enough."""
    state, members = planes(), ["asia_1", "eu_1", "us_1"]
    half = Rank(url, "eu_1", state, 1, 2)
    half.save(half.attempt(AT, members, 1))
    until(lambda: any("/parts/eu_1-1" in key for key in Store(url).list(AT)))
    kill(half)
    others = [Rank(url, "asia_1", state), Rank(url, "us_1", state, 0, 2), Rank(url, "us_1", state, 1, 2)]
    for rank in others:
        rank.save(rank.attempt(AT, members, members.index(rank.member), patience=0.5))
    assert {o["kind"] for rank in others for o in rank.outcomes()} == {"stored"}
    check(url, state)


def test_eight_commit_at_once_and_one_wins(url: str) -> None:
    state, members = planes(), [f"r{i}_1" for i in range(8)]
    ranks = [Rank(url, member, state) for member in members]
    for rank in ranks:
        rank.save(rank.attempt(AT, members, 0))
    outcomes = [outcome for rank in ranks for outcome in rank.outcomes()]
    assert [o["kind"] for o in outcomes] == ["stored"] * 8
    assert [o["mine"] for o in outcomes].count(True) == 1, outcomes
    check(url, state)


def test_different_states_are_an_alarm_and_no_checkpoint(url: str) -> None:
    state, other = planes(), planes()
    other["momentum", 1][77] += 1e-7
    members = ["eu_1", "us_1"]
    ranks = [Rank(url, "eu_1", state), Rank(url, "us_1", other)]
    for place, rank in enumerate(ranks):
        rank.save(rank.attempt(AT, members, place))
    for rank in ranks:
        (outcome,) = rank.outcomes()
        assert (outcome["kind"], outcome["reason"]) == ("differ", "momentum/1: eu_1 against us_1")
        assert "theta" not in outcome["reason"] and not rank.uploads.busy(), "and the next save can be"
    assert not Store(url).exists(f"{AT}/manifest.json")


def test_a_zombie_that_goes_on_late_changes_nothing(tmp_path: Path) -> None:
    """us is stopped before it uploads, made up for, and goes on when all is over."""
    state, members, url = planes(), ["eu_1", "us_1"], str(tmp_path)
    eu, us = Rank(url, "eu_1", state), Rank(url, "us_1", state)
    assert us.uploads.pid is not None
    os.kill(us.uploads.pid, signal.SIGSTOP)
    us.save(us.attempt(AT, members, 1))
    eu.save(eu.attempt(AT, members, 0, patience=0.3))
    assert [o["kind"] for o in eu.outcomes()] == ["stored"]
    manifest = (tmp_path / AT / "manifest.json").read_bytes()
    os.kill(us.uploads.pid, signal.SIGCONT)
    (outcome,) = us.outcomes()
    assert outcome["kind"] == "stored" and not outcome["mine"] and outcome["bytes"] == 0
    assert (tmp_path / AT / "manifest.json").read_bytes() == manifest
    check(url, state)


def test_one_whose_checkpoint_was_removed_meanwhile_does_not_bring_it_back(tmp_path: Path) -> None:
    state, url = planes(), str(tmp_path)
    Store(url).create(f"{AT}/removed", b"")
    rank = Rank(url, "eu_1", state)
    rank.save(rank.attempt(AT, ["eu_1"], 0))
    assert [o["kind"] for o in rank.outcomes()] == ["removed"] and not stored(tmp_path, AT)


def test_a_store_that_refuses_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    rank = Rank(str(tmp_path), "eu_1", planes())
    began = time.monotonic()
    rank.save(rank.attempt(AT, ["eu_1"], 0), seconds=2)
    (outcome,) = rank.outcomes()
    assert outcome["kind"] == "failed" and "deadline" in outcome["reason"] and 2 <= time.monotonic() - began < 10
    (tmp_path / "checkpoints").unlink()
    rank.save(rank.attempt("checkpoints/run/6", ["eu_1"], 0))
    assert [o["kind"] for o in rank.outcomes()] == ["stored"]


def test_an_uploader_finishes_what_a_dead_rank_has_handed_over_and_ends(tmp_path: Path) -> None:
    """A rank's death closes its end of the pipes."""
    state, obstacle = planes(), tmp_path / AT
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    rank = Rank(str(tmp_path), "eu_1", state)
    process = rank.uploads._process
    assert process is not None and process.stdin is not None and process.stdout is not None
    rank.save(rank.attempt(AT, ["eu_1"], 0))
    time.sleep(0.1)  # for the job to be in the pipe
    process.stdin.close()
    obstacle.unlink()
    until(lambda: process.poll() is not None)
    assert process.returncode == 0
    check(str(tmp_path), state)


def test_parts_that_are_none_are_made_up_for(tmp_path: Path) -> None:
    state, members = planes(), ["eu_1", "us_1"]
    (tmp_path / AT / "parts").mkdir(parents=True)
    (tmp_path / AT / "parts" / "us_1-0-x.json").write_text('{"format": 3, "rank": "../.."}')
    rank = Rank(str(tmp_path), "eu_1", state)
    rank.save(rank.attempt(AT, members, 0, patience=0.2))
    assert [o["kind"] for o in rank.outcomes()] == ["stored"]
    check(str(tmp_path), state)
    shutil.rmtree(tmp_path / AT)


def test_who_skips_an_attempt_is_not_waited_for(tmp_path: Path) -> None:
    """Each skips what the other one is at; then both are at the same one again."""
    members, state = ["eu_1", "us_2"], planes()
    eu, us = (Rank(str(tmp_path), member, state) for member in members)
    store = Store(str(tmp_path))
    eu.save(eu.attempt("c/2", members, 0, patience=300))
    us.save(us.attempt("c/1", members, 1, patience=300))
    until(lambda: list(tmp_path.glob("c/1/parts/us_2-*")) and list(tmp_path.glob("c/2/parts/eu_1-*")))
    store.create(skipped_key("c/1", "eu_1"), b"")
    store.create(skipped_key("c/2", "us_2"), b"")
    assert [each["kind"] for rank in (eu, us) for each in rank.outcomes()] == ["stored"] * 2
    assert stored(tmp_path, "c/1") and stored(tmp_path, "c/2")
    for place, rank in enumerate((eu, us)):
        rank.save(rank.attempt("c/3", members, place, patience=300))
    assert [each["kind"] for rank in (eu, us) for each in rank.outcomes()] == ["stored"] * 2 and stored(tmp_path, "c/3")
