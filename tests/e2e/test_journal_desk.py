"""`python -m diloco.journal` on live runs: what it says of them, and that they obey."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt.store import Store
from diloco.journal import Journal, main, say
from diloco.lineage import origin
from tests.e2e.cluster import SLOW_STEPS, Cluster, RegionProcess
from tests.e2e.test_by_hand import ENDLESS, digests, entries, regions_of, wait_for_rounds

Desk = Callable[..., tuple[int, str]]


@pytest.fixture
def desk(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Desk:
    """desk("set", "outer.lr=0.5"): exit code and what was said."""

    def run(verb: str, *rest: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([verb, str(cluster.run), *rest])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def state_of(cluster: Cluster) -> Any:
    state = cluster.state()
    assert state is not None
    return state


def checked(desk: Desk, cluster: Cluster) -> None:
    """verify finds nothing; replay from the oldest checkpoint that reaches gives the digests that the regions saw; the
    tokens add up."""
    code, said = desk("verify")
    assert code == 0 and said.rstrip().endswith("all right"), said
    code, said = desk("replay")
    assert code == 0, said
    code, said = desk("tokens")
    state = state_of(cluster)
    handed = [int(n.replace(",", "")) for n in said.splitlines()[-1].split()[2:]]
    assert code == 0 and handed[-1] == sum(handed[:-1]) == state.ledger.cursor * state.settings.seq_len, said
    assert handed[0] == state.tokens


def gone(cluster: Cluster, region: RegionProcess, code: int) -> None:
    """The region ended by itself, as it should."""
    assert region.wait(60) == code, region.text()
    assert "Traceback" not in region.text(), region.text()
    cluster.regions.remove(region)


def test_a_live_run_obeys_and_its_journal_proves_it(cluster: Cluster, desk: Desk) -> None:
    eu, us = (cluster.start(name, *ENDLESS, "elastic.start_regions=2", "ckpt.keep=9") for name in ("eu", "us"))
    wait_for_rounds(cluster, ["eu", "us"])
    assert desk("pause")[0] == 0
    cluster.until(lambda: all("the run is paused" in region.text() for region in (eu, us)), 20)
    paused, since = len(entries(cluster, "round")), time.monotonic()
    assert desk("set", "outer.lr=0.5", "outer.sync_every=12")[0] == 0
    cluster.until(lambda: time.monotonic() - since > 7, 20)  # longer than heartbeats and peers may be silent
    assert len(entries(cluster, "round")) == paused and state_of(cluster).members.keys(), "nothing moves"
    assert desk("pause") == (0, "the run is paused: nothing to do\n")
    assert desk("resume")[0] == 0
    wait_for_rounds(cluster, ["eu", "us"], 3)
    steps = [[a["steps"] for a in entry["answers"]] for entry in entries(cluster, "round")]
    assert steps[:paused] == [[8, 8]] * paused and steps[-1] == [12, 12], steps
    assert len(entries(cluster, "join")) == 2, "nobody had to come again"

    back = next(r["seq"] for r in cluster.records("eu", "checkpoint") if r["prefix"])
    assert desk("rewind", str(back), "--skip-data")[0] == 0
    cluster.until(lambda: entries(cluster, "round")[-1]["epoch"] > 0, 30)
    wait_for_rounds(cluster, ["eu", "us"])
    assert state_of(cluster).ledger.skipped > 0 and state_of(cluster).settings.sync_every == 12
    assert desk("stop", "--reason", "that will do")[0] == 0
    cluster.finish()
    state = state_of(cluster)
    assert state.stopped == "that will do" and digests(cluster, "eu") == digests(cluster, "us")
    checked(desk, cluster)
    newest = max(f.base for f in state.fragments)
    code, said = desk("replay", "--from", str(back), "--to", str(newest))
    assert code == 0 and re.search(
        rf"^entry {newest} · fragment 0 · θ {digests(cluster, 'eu')[newest]}$", said, re.M
    ), said
    code, said = desk("set", "outer.lr=0.1")
    assert code == 2 and "the run has stopped (that will do)" in said


def test_a_rewind_to_a_damaged_checkpoint_goes_further_back(
    cluster: Cluster, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The desk refuses it; if the damage comes after the order, the regions find it, and agree on the checkpoint before."""
    for name in ("eu", "us"):
        cluster.start(name, *ENDLESS, SLOW_STEPS, "elastic.start_regions=2", "ckpt.keep=9")

    def saved() -> list[int]:
        found = (cluster.run / "store").glob(f"checkpoints/{state_of(cluster).run}/*/manifest.json")
        return sorted(int(path.parent.name) for path in found)

    cluster.until(lambda: cluster.rounds() > 2 and len(saved()) > 3)
    *_, before, damaged = saved()
    shard = next((cluster.run / "store").glob(f"checkpoints/*/{damaged}/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    code, said = desk("rewind", str(damaged))
    assert code == 2 and f"SEQ={damaged} cannot be gone back to" in said
    monkeypatch.setattr("diloco.steer.verify", lambda *_: None)
    assert desk("rewind", str(damaged))[0] == 0
    cluster.until(lambda: len(entries(cluster, "rewind")) > 1, 60)
    first, second = entries(cluster, "rewind")[:2]
    assert origin(first["checkpoint"]) == damaged and first["reason"] == "by hand"
    assert origin(second["checkpoint"]) == before and second["reason"] == "damaged"
    wait_for_rounds(cluster, ["eu", "us"])
    assert desk("stop")[0] == 0
    cluster.finish()
    assert digests(cluster, "eu") == digests(cluster, "us") and len(entries(cluster, "rewind")) == 2
    assert len(entries(cluster, "join")) == 2, "nobody had to come again"


def test_an_expelled_region_goes_and_stays_out(cluster: Cluster, desk: Desk) -> None:
    _, us = [cluster.start(name, *ENDLESS, "elastic.start_regions=2") for name in ("eu", "us")]
    wait_for_rounds(cluster, ["eu", "us"])
    assert desk("expel", "mars")[0] == 2 and desk("expel", "us")[0] == 0
    gone(cluster, us, 1)
    assert "us is expelled from this run" in us.text()
    wait_for_rounds(cluster, ["eu"])
    again = cluster.start("us", *ENDLESS)
    gone(cluster, again, 2)
    assert "diloco.train: region.name=us is expelled from this run" in again.text()
    assert desk("admit", "us")[0] == 0
    cluster.start("us", *ENDLESS)
    wait_for_rounds(cluster, ["eu", "us"])
    for region in cluster.regions:
        region.signal(signal.SIGINT)
    cluster.finish()
    checked(desk, cluster)


STREAMING = ["outer.fragments=2", "outer.max_overlap_steps=3", "codec.error_feedback=true"]


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_region_that_diverges_has_no_weight_and_is_expelled(cluster: Cluster, desk: Desk, fragments: int) -> None:
    how = STREAMING if fragments == 2 else []
    eu = cluster.start("eu", *ENDLESS, *how)
    cluster.until(lambda: cluster.rounds() >= 12)
    us = cluster.start("us", *ENDLESS, *how, "inner.lr=30", "inner.warmup=0")
    gone(cluster, us, 1)
    assert us.text().count("its contribution was rejected, going on from the run's parameters") == 3, us.text()
    assert "us is expelled from this run" in us.text() and "weight 0: us_" in eu.text()
    wait_for_rounds(cluster, ["eu"])
    eu.signal(signal.SIGINT)
    cluster.finish()
    state = state_of(cluster)
    norms = [a["norm"] for e in entries(cluster, "round") for a in e["answers"] if a["member"].startswith("us")]
    steps = [a["steps"] for e in entries(cluster, "round") for a in e["answers"] if a["member"].startswith("us")]
    assert len(norms) >= 3 and state.expelled == ("us",)
    assert state.ledger.rejected == sum(steps) * 4 if fragments == 1 else state.ledger.rejected > 0
    ours = digests(cluster, "eu")
    assert {seq: d for seq, d in digests(cluster, "us").items() if ours[seq] != d} == {}
    losses = [record["loss"] for record in cluster.records("eu", "eval")]
    assert losses[-1] < losses[0], "what it sent did no harm"
    assert "(weight 0)" in desk("show")[1]
    checked(desk, cluster)


LOSSY = ["outer.sync_every=8", "run.rounds=1000000", "ckpt.every=5", "ckpt.durable=false", "ckpt.lost_wait=6"]


def test_lost_bits_are_waited_for_and_then_the_run_goes_back(cluster: Cluster) -> None:
    eu = cluster.start("eu", *LOSSY)
    cluster.kill_when(lambda: cluster.rounds() % 5 == 3 and cluster.rounds() > 5, eu)
    begin = time.monotonic()
    again = cluster.start("eu", *LOSSY)
    cluster.until(lambda: entries(cluster, "rewind"))
    assert time.monotonic() - begin > 6
    lost, rewind = entries(cluster, "lost")[-1], entries(cluster, "rewind")[-1]
    assert rewind["seq"] == lost["seq"] + 1 and rewind["reason"] == "lost"
    assert lost["round"] > origin(rewind["checkpoint"]) > 0
    cluster.until(lambda: entries(cluster, "round")[-1]["epoch"] == rewind["seq"])
    again.signal(signal.SIGINT)
    cluster.finish()


def test_a_member_that_cannot_get_bits_takes_the_run_back(cluster: Cluster) -> None:
    """Both ways: us is frozen while eu goes on. First eu is still there when us thaws, and gives it its θ; then it is killed
    first, and nobody has the bits."""
    settings = [*LOSSY, "ckpt.keep=99", "outer.boundary=first"]
    eu, us = [cluster.start(name, *settings, "elastic.start_regions=2") for name in ("eu", "us")]
    wait_for_rounds(cluster, ["eu", "us"])
    us.signal(signal.SIGSTOP)
    wait_for_rounds(cluster, ["eu"], 4)
    us.signal(signal.SIGCONT)
    wait_for_rounds(cluster, ["eu", "us"])
    assert "from a member that is ahead" in us.text() and not entries(cluster, "lost")
    us.signal(signal.SIGSTOP)
    wait_for_rounds(cluster, ["eu"], 4)
    cluster.kill_when(lambda: cluster.rounds() % 5 == 3, eu)
    us.signal(signal.SIGCONT)
    cluster.until(lambda: entries(cluster, "rewind"))
    lost, rewind = entries(cluster, "lost")[-1], entries(cluster, "rewind")[-1]
    assert rewind["seq"] == lost["seq"] + 1 and lost["member"].startswith("us")
    cluster.until(lambda: entries(cluster, "round")[-1]["epoch"] == rewind["seq"])
    us.signal(signal.SIGINT)
    cluster.finish()
    ours, theirs = digests(cluster, "eu"), digests(cluster, "us")
    assert all(ours[seq] == theirs[seq] for seq in ours.keys() & theirs.keys())


def test_a_member_that_reaches_no_peer_takes_planes_from_a_checkpoint(cluster: Cluster) -> None:
    """us is frozen while eu goes on, and the bits are dropped that checkpoints hold; then eu leaves. Nothing is lost."""
    settings = [*ENDLESS, "ckpt.every=1", "ckpt.keep=1", "outer.boundary=first"]
    eu, us = [cluster.start(name, *settings, "elastic.start_regions=2") for name in ("eu", "us")]
    wait_for_rounds(cluster, ["eu", "us"])
    us.signal(signal.SIGSTOP)
    wait_for_rounds(cluster, ["eu"], 4)
    eu.signal(signal.SIGINT)
    assert eu.wait(60) == 0
    rounds = len(entries(cluster, "round"))
    us.signal(signal.SIGCONT)
    cluster.until(lambda: len(entries(cluster, "round")) >= rounds + 2)
    us.signal(signal.SIGINT)
    cluster.finish()
    assert "fragment 0 as of entry" in us.text() and "from checkpoint checkpoints/" in us.text(), us.text()
    assert not entries(cluster, "lost") and not entries(cluster, "rewind")
    theta = {e["base"]: e["theta"] for e in entries(cluster, "round")[rounds:]}
    ours = digests(cluster, "eu")
    assert theta[max(ours)] == ours[max(ours)], "the next round builds on what eu had"


def test_who_has_lost_bits_uploads_them(cluster: Cluster) -> None:
    """A round's bits are with one member alone; somebody says that it cannot get them."""
    eu = cluster.start("eu", *LOSSY)
    cluster.until(lambda: cluster.rounds() >= 7)
    assert main(["pause", str(cluster.run)]) == 0
    cluster.until(lambda: "the run is paused" in eu.text(), 20)
    wanted = entries(cluster, "round")[-1]
    assert not list((cluster.run / "store" / "rounds").glob("*/*")), "nothing was stored"
    store = Store(str(cluster.run / "store"))
    assert say(Journal(store), {"kind": "lost", "round": wanted["seq"], "member": "us_1"}) is None
    cluster.until(lambda: [e["round"] for e in entries(cluster, "have")] == [wanted["seq"]], 20)
    cluster.until(lambda: store.list(f"rounds/{state_of(cluster).run}/{wanted['attempt']}"), 20)
    main(["resume", str(cluster.run)])
    cluster.until(lambda: entries(cluster, "round")[-1]["seq"] > wanted["seq"], 30)
    eu.signal(signal.SIGINT)
    cluster.finish()
    assert not entries(cluster, "rewind")


def test_verify_says_what_is_missing_or_wrong(cluster: Cluster, desk: Desk, tmp_path: Path) -> None:
    cluster.start("eu", "outer.sync_every=8", "run.rounds=6", "ckpt.every=4", "outer.fragments=2")
    cluster.finish()
    checked(desk, cluster)
    store = cluster.run / "store"
    bits = sorted(store.glob("rounds/*/*/*"))
    assert bits and json.loads(sorted(store.glob("journal/*.json"))[-1].read_text())["kind"] == "stop"
    for path, sentence in (
        (bits[-1], "do not have the digest of the entry"),
        (next(store.glob("checkpoints/*/[1-9]*/*.safetensors")), "digest"),
        (next(store.glob("regions/*/eu/*/*.safetensors")), "digest"),
        (sorted(store.glob("journal/*.json"))[3], "journal entry 4 does not follow its predecessor"),
    ):
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[-9] ^= 1
        path.write_bytes(changed)
        code, said = desk("verify")
        assert code == 1 and sentence in said, said
        path.write_bytes(whole)
    assert desk("verify")[0] == 0
    newest = max(store.glob("checkpoints/*/*"), key=lambda path: int(path.name))
    for path in [*newest.glob("*.*"), *bits]:
        path.unlink()
    code, said = desk("verify")
    assert code == 1 and re.search(
        r"the bits of entry \d+ are not stored, and the newest whole checkpoint is of entry", said
    )
    code, said = desk("replay")
    assert code == 1 and "θ cannot be rebuilt beyond it" in said
    (store / "journal" / "0000000003.json").unlink()
    code, said = desk("verify")
    assert code == 1 and "journal entry 3 is missing, and journal/0000000004.json is there" in said


def test_bad_commands_are_one_sentence(cluster: Cluster, desk: Desk) -> None:
    assert desk("show")[0] == 2
    cluster.start("eu", "outer.sync_every=8", "run.rounds=2", "outer.fragments=2")
    cluster.until(lambda: cluster.rounds() >= 1)
    for command, sentence in (
        (("set", "outer.sync_every=9"), "outer.sync_every=9: set it to a multiple of the run's 2 fragment(s)"),
        (("set", "inner.lr=1"), "inner.lr cannot be set while a run goes on"),
        (("set", "outer.lr"), "outer.lr is no setting: write KEY=VALUE"),
        (("set",), "nothing is set"),
        (("expel", "mars"), "name one region of the run, eu"),
        (("rewind", "77"), "SEQ=77 is no stored checkpoint of the run: those are 0"),
        (("rewind",), "is no stored checkpoint"),
        (("stop", "now"), "now is not known here"),
        (("pause", "now"), "now is too much"),
        (("tokens", "now"), "now is too much"),
        (("replay", "--to", "x"), "is not known here"),
        (("replay", "--to", "9999"), "--to=9999 is no entry of the run"),
        (("replay", "--from", "9999"), "--from=9999 is no checkpoint on the way"),
        (("dance",), "usage"),
    ):
        code, said = desk(*command)
        assert code == 2 and sentence in said and "Traceback" not in said, (command, said)
    assert not entries(cluster, "set") and not entries(cluster, "rewind")
    cluster.finish()
    assert all(regions_of(entry) == ["eu"] for entry in entries(cluster, "round"))
