"""The attacker's suite, on real sockets: nothing is accepted at any port of whoever does not belong to the run, and he costs
little."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from elastic import door, gateway, lighthouse
from elastic.gateway import Gateway
from elastic.handshake import MAX_HELLO, MAX_UNPROVEN
from elastic.lighthouse import Lighthouse, connect
from elastic.node import Identity, Refused
from elastic.security import OPEN, Security, choose
from elastic.tunnel import Entrance, Exit
from elastic.wire import HEAD, MAGIC, MAX_PAYLOAD, WireError, encode
from launch.certs import issue
from tests.attackers import Of, Papers, Target, address, idle, meanwhile, node, said, said_over_tls, until
from tests.exchange_cluster import BLOCK, Cluster

REPO = Path(__file__).resolve().parents[1]
KILL = b"POST /replica/eu_1/kill HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
KINDS = ("tls", "secret", "open")


HELLO = encode({"type": "hello", "purpose": "echo", "run": "run", "fingerprint": "{}", "member": "us_2", "rank": 0})
REGISTER = encode({"type": "hello", "purpose": "register", "member": "eu_1", "name": "eu_1.0"})
LIGHT = encode({"type": "hello", "purpose": "lighthouse", "member": "us_2"})


@pytest.mark.parametrize("shown", ["none", "foreign", "expired", "revoked"])
def test_certificates_that_are_not_good_open_no_port(
    papers: Papers, stack: ExitStack, capsys: pytest.CaptureFixture[str], shown: str
) -> None:
    target = Target(stack, papers.of("eu"))
    desk = Gateway("127.0.0.1", 0, papers.of("gateway"))
    stack.callback(desk.close)
    light = Lighthouse("127.0.0.1", 0, papers.of("lighthouse"))
    stack.callback(light.shutdown)
    ports = [target.node.endpoint, desk.endpoint, light.address.removeprefix("http://")]
    for port, words in zip(ports, (HELLO, REGISTER, LIGHT + KILL), strict=True):
        assert said_over_tls(address(port), papers.forged[shown], words) == b""
        assert MAGIC not in said(address(port), words)[1:]  # at most one frame: a refusal
        assert b"HTTP" not in said(address(port), KILL)
    assert not target.reached and not desk._ranks
    assert said_over_tls(target.address, papers.run / "us", HELLO, 3), (
        "with the right papers the same bytes are answered"
    )
    assert until(lambda: len(target.reached) == 1)
    why = {"none": "showed no", "foreign": "not of this run's", "expired": "has expired", "revoked": "is revoked"}
    printed: list[str] = []
    assert until(lambda: printed.append(capsys.readouterr().out) or "".join(printed).count(why[shown]) == 3), printed


def test_a_member_of_another_run_with_a_good_certificate_is_refused(papers: Papers, stack: ExitStack) -> None:
    target, other = Target(stack, papers.of("eu")), node(stack, "us_2", papers.of("us"))
    other.identity = Identity("another run", "{}", "us_2")
    with pytest.raises(Refused, match="run is another run at us_2 and run at eu_1"):
        other.dial(target.node.endpoint, "echo")
    assert not target.reached


def test_frames_of_other_rounds_and_repeated_ones_change_nothing(tmp_path: Path, stack: ExitStack) -> None:
    """From a member of the run with good papers who is not of the attempts: those end with the right bits."""
    issue(tmp_path / "c", ["m0", "m1", "m2"])
    c = Cluster((1, 1, 1), 40 * BLOCK, security=lambda k: choose(str(tmp_path / "c"), "", f"m{k}"))
    stack.callback(lambda: [rank.node.close() for member in c.members for rank in member])
    for n in range(3):
        c.start(f"a{n}", [0, 1])
        for kind in ("part", "sum"):
            for attempt in (f"a{n - 1}", f"a{n}", f"a{n + 1}", "never"):
                endpoint = c.members[0][0].node.endpoint
                intruder, _ = c.members[2][0].node.dial(endpoint, "data", 10, link=attempt + kind, further=False)
                frame = encode({"type": kind, "attempt": attempt, "first": 0}, bytes(100)) + bytes(100)
                with suppress(OSError):  # it is hung up on
                    intruder.send_bytes(frame * 3)
                intruder.close()
        c.assert_result(f"a{n}", [0, 1])


LENGTHS = {
    "10 GB of payload": HEAD.pack(MAGIC, 2, 10 << 30, 0) + b"{}",
    "4 GiB of header": HEAD.pack(MAGIC, 2**32 - 1, 0, 0) + b"{}",
    "more than a hello": HEAD.pack(MAGIC, MAX_HELLO + 1, 0, 0) + b"{" * MAX_HELLO,
    "a long TLS record": b"\x16\x03\x01\xff\xff" + bytes(1000),
    "two TLS records": (b"\x16\x03\x01\x20\x00" + bytes(0x2000)) * 2,
    "not this protocol": b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n",
}


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_looked_at_before_memory_is_taken(stack: ExitStack, security: Of, kind: str) -> None:
    target, friend = Target(stack, security(kind, "eu")), node(stack, "us_2", security(kind, "us"))
    assert target.serves(friend)
    before = target.door.refusals
    tracemalloc.start()
    for data in LENGTHS.values():
        for _ in range(5):
            said(target.address, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
    assert until(lambda: target.door.refusals >= before + 5 * len(LENGTHS) - 5), target.door.refusals
    assert len(target.reached) == 1 and target.serves(friend)


def test_a_member_cannot_have_memory_taken_either(papers: Papers, stack: ExitStack) -> None:
    target, friend = Target(stack, papers.of("eu")), node(stack, "us_2", papers.of("us"))
    connection, _ = friend.dial(target.node.endpoint, "echo", 10)
    tracemalloc.start()
    connection.send_bytes(HEAD.pack(MAGIC, 2, 10 << 30, 0) + b"{}")
    with pytest.raises(OSError):
        connection.receive()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_PAYLOAD and until(lambda: target.door.refusals == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_slow_talkers_have_a_deadline_for_all_they_say(
    stack: ExitStack, security: Of, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_TIMEOUT", 1.0)
    target, friend = Target(stack, security(kind, "eu")), node(stack, "us_2", security(kind, "us"))
    words = (
        b"\x16\x03\x01\x10\x00" + bytes(MAX_UNPROVEN) if kind == "tls" else HEAD.pack(MAGIC, 4000, 0, 0) + b" " * 4000
    )
    slow = [socket.create_connection(target.address, 10) for _ in range(20)]
    begin, said_so_far = time.monotonic(), 0
    assert until(lambda: len(target.door.strangers) == 20)
    while target.door.strangers and time.monotonic() - begin < 20:
        for sock in slow:
            with suppress(OSError):
                sock.send(words[said_so_far : said_so_far + 1])
        said_so_far += 1
        assert said_so_far < len(words)
        time.sleep(0.02)  # slowness is what is tested
    assert 0.5 < time.monotonic() - begin < 15 and not target.door.strangers and said_so_far > 5
    assert not target.reached and target.serves(friend)
    for sock in slow:
        sock.close()


@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_idle_connections(stack: ExitStack, security: Of, kind: str) -> None:
    target, friend = Target(stack, security(kind, "eu")), node(stack, "us_2", security(kind, "us"))
    assert target.serves(friend)
    standing, _ = friend.dial(target.node.endpoint, "echo", 20)
    threads = threading.active_count()
    tracemalloc.start()
    with idle(target.address, 2000, "127.0.0.2"):
        assert until(lambda: len(target.door.strangers) == door.STRANGERS)
        assert all(target.serves(friend) for _ in range(5))
        standing.send({"still": "here"})
        assert standing.receive()[0] == {"still": "here"}
        assert threading.active_count() <= threads + 5
        assert len(target.door.strangers) <= door.STRANGERS
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert until(lambda: not target.door.strangers) and len(target.reached) == 7


def test_a_flood_pushes_itself_out_not_those_who_come_from_elsewhere(
    papers: Papers, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "STRANGERS", 20)
    target, friend = Target(stack, papers.of("eu")), node(stack, "us_2", papers.of("us"))
    with socket.create_connection(target.address, 10) as early:
        assert until(lambda: len(target.door.strangers) == 1)
        with idle(target.address, 100, "127.0.0.2"):
            assert until(lambda: len(target.door.strangers) == 20)
            assert [one.address for one in target.door.strangers].count("127.0.0.1") == 1
            assert target.serves(friend)
        early.close()

    def flood() -> None:
        with idle(target.address, 50, "127.0.0.2"):
            pass

    with meanwhile(flood, lambda: said(target.address, b"GET / HTTP/1.0\r\n\r\n")):
        assert all(target.serves(friend) for _ in range(8))


# ---- the lighthouse ----


@pytest.mark.parametrize("kind", ["tls", "secret"])
def test_the_lighthouse_is_reached_through_the_tunnel_alone(
    papers: Papers, stack: ExitStack, security: Of, kind: str
) -> None:
    """Its own port is on 127.0.0.1, so 127.0.0.2 stands for every other address of this machine."""
    us = security(kind, "us")
    proofs = ["--tls", str(papers.run)] if kind == "tls" else ["--secret-file", us.secret_from]
    command = [sys.executable, "-m", "elastic.lighthouse", "--bind", "0.0.0.0:0", *proofs]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait, 20)
    stack.callback(process.terminate)
    assert process.stdout is not None
    stack.enter_context(closing(process.stdout))
    port = int(process.stdout.readline().rsplit(":", 1)[1])
    own, public = listening(process.pid)
    assert own == ["0100007F"] and public == ["00000000"], "one port on loopback, one for all, and no IPv6"
    for host in ("127.0.0.1", "127.0.0.2"):
        assert b"HTTP" not in said((host, port), KILL)
        assert b"HTTP" not in said((host, port), LIGHT + KILL)
        assert b"HTTP" not in said_over_tls((host, port), papers.forged["foreign"], LIGHT + KILL)
    with Entrance("127.0.0.2", port, us, "us_2") as entrance:
        connect(entrance.address).heartbeat("us_2", timeout=timedelta(seconds=5))
        inside = said(address(entrance.address.removeprefix("http://")), KILL.replace(b"eu_1", b"nobody_1"))
        assert inside.startswith(b"HTTP/1.1"), "what strangers must not reach is there"


def listening(pid: int) -> tuple[list[str], list[str]]:
    """(loopback, other) addresses, in the kernel's hex, on which a process listens for TCP."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(str(entry.readlink()).removeprefix("socket:[").rstrip("]"))
    found = []
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
        found += [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets]
    return [a for a in found if a == "0100007F"], [a for a in found if a != "0100007F"]


@pytest.mark.parametrize("main", [lighthouse.main, gateway.main])
def test_a_service_that_anybody_could_reach_does_not_start(
    main: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DILOCO_SECRET", raising=False)
    assert main(["--bind", "0.0.0.0:0"]) == 2
    assert "--bind 0.0.0.0:0 is not loopback: add --tls DIR" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tls", "secret"])
def test_a_tunnel_asks_for_a_proof_and_serves_nothing_else(stack: ExitStack, security: Of, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as behind:
        behind.settimeout(0.3)
        tunnel = Exit("127.0.0.1", 0, security(kind, "lighthouse"), behind.getsockname()[1])
        stack.callback(tunnel.close)
        said(("127.0.0.1", tunnel.port), LIGHT + KILL)
        friend = node(stack, "us_2", security(kind, "us"))
        with pytest.raises(Refused, match="here is a lighthouse"):
            friend.dial(f"127.0.0.1:{tunnel.port}", "echo")
        with pytest.raises(TimeoutError):
            behind.accept()
        behind.settimeout(10)
        entrance = stack.enter_context(Entrance("localhost", tunnel.port, security(kind, "us"), "us_2"))
        with socket.create_connection(address(entrance.address.removeprefix("http://")), 10) as near:
            near.sendall(b"ping")
            far, _ = behind.accept()
            with far:
                far.settimeout(10)
                assert far.recv(4) == b"ping"
                far.sendall(b"pong")
                assert near.recv(4) == b"pong"
            assert near.recv(1) == b"", "an end on one side is one on the other"


def test_garbage_in_a_frame_of_a_proof_is_no_frame() -> None:
    from elastic.handshake import Line, receive_hello

    steps = receive_hello(Line(Security(secret_from="nowhere")))
    with pytest.raises(ValueError, match="nowhere cannot be read"):
        next(steps)
    steps = receive_hello(Line(OPEN))
    assert next(steps) == (b"", HEAD.size)
    with pytest.raises(WireError):
        steps.send(bytes(HEAD.size))
