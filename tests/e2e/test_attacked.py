"""A run under TLS, or with a secret, commits on time while everybody who does not belong to it does what he can at every port."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from elastic.handshake import dial
from elastic.security import Security
from tests.attackers import Address, Papers, address, idle, meanwhile, said, said_over_tls
from tests.e2e.cluster import Cluster, RegionProcess, exchanges
from tests.test_attacks import HELLO, KILL, LENGTHS, LIGHT

ROUNDS = 4
"""Without attackers, and with."""


def memory(pid: int) -> tuple[int, int]:
    """Bytes in use and threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) << 10, int(status["Threads"])


def memories(regions: list[RegionProcess]) -> list[tuple[int, int]]:
    """The same of every process that listens: a region's rank, and that of its exchanges."""
    ranks = [region.process.pid for region in regions]
    listening = [pid for rank in ranks for pid in (rank, *exchanges(rank))]
    assert len(listening) == 2 * len(regions)
    return [memory(pid) for pid in listening]


def seconds(cluster: Cluster, rounds: int) -> float:
    """How long so many more rounds take."""
    begin, target = time.monotonic(), cluster.rounds() + rounds
    cluster.until(lambda: cluster.rounds() >= target, 150)
    return time.monotonic() - begin


@pytest.mark.parametrize("kind", ["tls", "secret"])
def test_two_regions_commit_on_time_while_attacked(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    papers = Papers(tmp_path / "papers")
    for name in ("ours", "guessed"):
        (tmp_path / name).write_text(f"a secret that is {name}")
    proof = {"tls": f"elastic.tls={papers.run}", "secret": f"elastic.secret_file={tmp_path}/ours"}[kind]
    common = (proof, "outer.sync_every=10", "run.rounds=100000", "ckpt.every=1000")
    regions = [cluster.start(n, "elastic.start_regions=2", "elastic.min_regions=2", *common) for n in ("eu", "us")]
    cluster.until(lambda: cluster.rounds() >= 2)
    before, quiet = memories(regions), seconds(cluster, ROUNDS)
    state = cluster.state()
    assert state is not None
    ports: list[Address] = [address(one) for m in state.members.values() for one in (*m.endpoints, *m.data)]
    assert len(ports) == 4, "a rank's, and that of its exchanges"
    ports.append(("127.0.0.1", cluster.port))
    done: set[tuple[str, Address]] = set()

    def strangers() -> None:
        for port in ports:
            for shown in papers.forged.values():
                assert said_over_tls(port, shown, HELLO + LIGHT + KILL) == b""
            for data in (*LENGTHS.values(), KILL, HELLO, LIGHT + KILL):
                assert b"HTTP" not in said(port, data)
            with suppress(OSError):  # refused
                hello = {"type": "hello", "purpose": "lighthouse", "member": "us_2"}
                dial(f"127.0.0.1:{port[1]}", hello, Security(secret_from=f"{tmp_path}/guessed"), 10)
                raise AssertionError("a guessed secret was accepted")
            done.add(("strangers", port))

    def flood() -> None:
        for port in ports:
            with idle(port, 2000, "127.0.0.2"):
                time.sleep(0.5)  # they stay a while, as idle ones do
            done.add(("flood", port))

    with meanwhile(strangers, flood):
        attacked = seconds(cluster, ROUNDS)
        cluster.until(lambda: len(done) == 2 * len(ports), 120)
        after = memories(regions)
    seconds(cluster, 1)
    for (was, threads), (now, more) in zip(before, after, strict=True):
        assert now - was < 64 << 20 and more - threads < 20, (before, after)
    # The attackers' own work shares the cores with the regions'; a round that waited for a time-out would take far longer.
    assert attacked < 3 * quiet + 20, (quiet, attacked)
    for region in regions:
        assert "given up" not in region.text() and "Traceback" not in region.text(), region.text()
        assert region.text().count("refused a connection") <= 20, "each reason is said once"
        sentence = {"tls": "its certificate is revoked", "secret": "the run's secret is another one"}[kind]
        assert sentence in region.text()
