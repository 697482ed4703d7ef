"""The doctor: two of them in regions of their own, one beside a live run, and every check that can fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckpt.store import Store
from diloco.composing import compose_config
from diloco.journal import Journal
from elastic import probing
from elastic.node import Identity, Node
from elastic.security import OPEN
from launch.certs import issue
from launch.checks import OK, WARN, Finding, clock, disk, slow
from launch.doctor import main
from launch.peers import Meeting, Peer, examine
from tests.e2e.cluster import Cluster
from tests.e2e.conftest import cluster as cluster
from tests.e2e.test_by_hand import ENDLESS, entries
from tests.ports import free_port
from tests.s3_server import BUCKET
from tests.test_store import Overwriting
from tests.test_summary import write_run

ROOT = Path(__file__).resolve().parents[1]
ALONE = ["+region=eu", "wait=0", "seconds=0.3"]


def start(region: str, directory: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "launch.doctor", f"+region={region}", "--json", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=directory, env=env, text=True, stdout=pipe, stderr=pipe)


def ended(doctor: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    try:
        out, err = doctor.communicate(timeout=120)
    finally:
        doctor.kill()
    assert out.startswith("{"), err
    return doctor.returncode, json.loads(out)


def of(found: dict[str, Any], check: str) -> list[dict[str, Any]]:
    return [finding for finding in found["checks"] if finding["check"] == check]


def failed(text: str, check: str) -> str:
    """The line of the check that has failed, and the next one, which says what to do."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("fail") and line.split("  ")[1].strip() == check)
    assert "→ " in lines[at + 1]
    return "\n".join(lines[at : at + 2])


def test_two_doctors_find_each_other_and_all_is_well(server: str, tmp_path: Path) -> None:
    """With certificates, and S3 as the store."""
    issue(tmp_path / "certs", ["eu", "us"])
    store = f"s3://{BUCKET}/doctors"
    run = [f"run.store={store}", "elastic.tls=certs", f"elastic.lighthouse=http://127.0.0.1:{free_port()}"]
    both = [start(name, tmp_path, *run, "elastic.start_regions=2", "seconds=1") for name in ("eu", "us")]
    for (code, found), other in zip(map(ended, both), ("us", "eu"), strict=True):
        assert code == 0 and found["ok"], found
        assert {c["state"] for c in found["checks"]} <= {"ok", "warn"}
        (way,) = of(found, f"peer {other}")
        assert way["values"]["up"] > 1e6 and way["values"]["down"] > 1e6 and 0 < way["values"]["rtt"] < 1
        assert "ports open both ways" in way["found"] and len(of(found, "clock")) == 2
        assert "365 days" in of(found, "proofs")[0]["found"] or "364 days" in of(found, "proofs")[0]["found"]
        assert of(found, "store rate")[0]["values"]["up"] > 0 and of(found, "lighthouse")[0]["state"] == "ok"
        assert of(found, "devices")[0]["values"]["devices"][0]["flops"] > 1e8
    left = [json.loads(Store(store).read(key)) for key in Store(store).list()]
    assert sorted(device["where"].partition("/")[0] for (device,) in left) == ["eu", "us"], "their speeds, and no more"


def test_a_doctor_beside_a_live_run_measures_the_way_and_is_not_noticed(cluster: Cluster, tmp_path: Path) -> None:
    """The member's device is compared as its own doctor found it."""
    eu = cluster.start("eu", *ENDLESS)
    fast = {"where": "eu/there", "device": "cpu", "kind": "cpu with 1 threads", "flops": 1e15}
    for place, device in (("eu", fast), ("asia", {**fast, "where": "asia/gone", "flops": 1e18}), ("odd", {})):
        Store(str(cluster.run / "store")).write(f"doctor-rates/{place}.json", json.dumps([device]).encode())
    cluster.until(lambda: cluster.rounds() >= 2)
    before = Store(str(cluster.run / "store")).list("journal")
    lighthouse = f"elastic.lighthouse=http://127.0.0.1:{cluster.port}"
    code, found = ended(start("us", tmp_path, f"run.dir={cluster.run}", lighthouse, "peers=1", "wait=30"))
    assert code == 0, found
    assert of(found, "peer eu")[0]["values"]["up"] > 1e6 and "ports open both ways" in of(found, "peer eu")[0]["found"]
    (slow,) = of(found, "devices")[0]["values"]["slow"]
    assert slow.startswith("us/") and "of the usual" in slow, "named, next to the live member's"
    since = cluster.rounds()
    cluster.until(lambda: cluster.rounds() >= since + 2)
    eu.signal(signal.SIGTERM)
    assert eu.wait() == 0 and "refused" not in eu.text(), eu.text()
    kinds = [e["kind"] for kind in ("join", "set", "leave", "round") for e in entries(cluster, kind)]
    assert kinds.count("join") == kinds.count("leave") == 1 and "set" not in kinds and len(before) >= 3


def test_who_has_another_secret_is_told_so(tmp_path: Path) -> None:
    run = ["run.dir=run", f"elastic.lighthouse=http://127.0.0.1:{free_port()}", "elastic.start_regions=2"]
    eu = start("eu", tmp_path, *run, DILOCO_SECRET="one secret of the run")
    us = start("us", tmp_path, *run, DILOCO_SECRET="another one of the run")
    for (code, found), other in zip(map(ended, (eu, us)), ("us", "eu"), strict=True):
        (way,) = of(found, f"peer {other}")
        assert code == 1 and way["state"] == "fail" and "secret" in way["found"] + way["remedy"], found


# ---- one check that fails ----


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DILOCO_SECRET", raising=False)
    return [*ALONE, "run.dir=run", f"elastic.lighthouse=http://127.0.0.1:{free_port()}"]


def test_a_closed_port(local: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside entries that no doctor wrote."""
    entry = {"member": "us_1", "endpoint": f"127.0.0.1:{free_port()}", "facts": {}}
    store = Store(str(tmp_path / "run/store"))
    store.write("doctor/us_1.json", json.dumps(entry).encode())
    odd = [{}, [], {**entry, "facts": None}, {**entry, "facts": {"devices": [{"flops": 1}]}}, {**entry, "member": 1}]
    for number, value in enumerate([*map(json.dumps, odd), "{", "[" * 100_000]):
        store.write(f"doctor/odd_{number}.json", value.encode())
    assert main(local) == 1
    said = failed(capsys.readouterr().out, "peer us")
    assert entry["endpoint"] in said and "Connection refused" in said and "open the way" in said


def test_a_peer_that_cannot_dial_back_says_why() -> None:
    nodes = [Node("127.0.0.1") for _ in range(2)]
    for name, node in zip(("eu_1", "us_2"), nodes, strict=True):
        node.identity = Identity("doctor", "{}", name)
        probing.serve(node)
    closed = f"127.0.0.1:{free_port()}"
    way = probing.measure(nodes[0], nodes[1].endpoint, closed, 0.5, "")
    assert way.back == probing.REFUSED and way.up > 1e6 and abs(way.clock) < 1
    assert probing.measure(nodes[0], nodes[1].endpoint, nodes[0].endpoint, 0.5, "").back == probing.OPEN
    for node in nodes:
        node.close()


def test_whom_a_doctor_looks_for(tmp_path: Path) -> None:
    """Not for members of a run that has ended, nor for those in regions with a doctor; and a machine of its own region is none of
    the others."""
    write_run(tmp_path)
    store, cfg = Store(str(tmp_path / "store")), compose_config(["+region=eu"])
    states = []
    for _ in range(2):
        journal = Journal(store)
        journal.read()
        states.append(journal.state)
        store.delete(max(store.list("journal")))
    (ended, live), found = states, []
    entry = {"member": "eu_7", "endpoint": "h:3", "facts": {}}
    for state in (ended, live):
        meeting = Meeting(cfg, store, OPEN, state, {})
        found.append(meeting.find(0, 0))
        if state is live:
            assert live is not None and found == [[], [Peer("us_2", ("h:2", "h:1"), {})]]
            (silent,) = examine(meeting, Peer("us_2", (f"127.0.0.1:{free_port()}",), {}), 0.1)
            assert silent.state == WARN and "is in the journal, and does not answer" in silent.found
            store.write("doctor/eu_7.json", json.dumps(entry).encode())
            assert meeting.regions(meeting.find(0, 0)) == set(), "it is dead: the doctor goes on waiting for another"
            other = Node("127.0.0.1", security=OPEN)
            other.identity = meeting.node.identity
            probing.serve(other)
            assert meeting.regions([Peer("us_3", (other.endpoint,), {})]) == {"us"}
            other.close()
            store.write("doctor/us_8.json", json.dumps({**entry, "member": "us_8"}).encode())
            assert {peer.member for peer in meeting.find(0, 0)} == {"eu_7", "us_8"}
        meeting.close([])


def test_wrong_settings_of_the_model_are_for_the_config_to_tell() -> None:
    assert disk(compose_config(["+region=eu", "++model.args.nonsense=1"])).state == OK


def test_an_expired_certificate(local: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    issue(tmp_path / "certs", ["eu"], days=1e-7)
    assert main([*local, "elastic.tls=certs"]) == 1
    assert "certificate has expired" in failed(capsys.readouterr().out, "proofs")


def test_wrong_credentials(
    local: list[str], server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert main([*local, f"run.store=s3://{BUCKET}/run"]) == 1
    said = failed(capsys.readouterr().out, "store")
    assert f"s3://{BUCKET}/run: cannot write" in said and "AWS_ACCESS_KEY_ID" in said


def test_a_store_without_conditional_creation(local: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*local, f"run.store={Overwriting.protocol}://bucket/run"]) == 1
    assert "does not refuse to create an object twice" in failed(capsys.readouterr().out, "store")


def test_no_lighthouse(local: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DILOCO_SECRET", "a secret of this run alone")
    address = f"http://{socket.gethostname()}:{free_port()}"
    assert main([*local, f"elastic.lighthouse={address}"]) == 1
    assert f"elastic.lighthouse={address} does not answer" in failed(capsys.readouterr().out, "lighthouse")


def device(where: str, name: str, flops: float, kind: str = "H100") -> dict[str, Any]:
    return {"where": where, "device": name, "kind": kind, "flops": flops}


def test_a_slow_device_is_named_and_only_compared_with_its_kind() -> None:
    eu = [device("eu/a", f"cuda:{i}", 6e14) for i in range(4)]
    cpu = device("us/b", "cpu", 1e11, "cpu with 2 threads")
    assert slow("eu/a", [*eu, cpu]).state == OK
    found = slow("eu/a", [*eu, cpu, device("us/b", "cuda:3", 3e14)])
    assert found.state == WARN and "us/b cuda:3 at 50% of the usual" in found.found and "eu/a cuda" not in found.found
    pair = slow("eu/a", [device("eu/a", "cuda:0", 3e14), device("us/b", "cuda:0", 6e14)])
    assert pair.state == WARN and "eu/a cuda:0 at 50%" in pair.found


def test_clocks() -> None:
    assert [clock("its", s).state for s in (0.5, -1.5, 3.0, -400.0)] == ["ok", "ok", "warn", "fail"]
    assert isinstance(clock("its", 3.0), Finding) and "NTP" in clock("its", 3.0).remedy


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["+region=eu", "--fast"], ["--fast is not known", "--json"]),
        (["+region=eu", "outer.lrr=1"], ["unknown key outer.lrr"]),
        (["+region=eu", "wait=long"], ["wait=long is not a number"]),
        ([], ["no region is named"]),
        (["+region=eu", "run.store=gopher://x"], ["gopher://x"]),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and all(part in said.err for part in parts), said.err
    assert not list(tmp_path.iterdir())
