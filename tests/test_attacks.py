"""The attacker's suite, on real sockets: nothing is accepted at any port of whoever does not belong to the run, and he costs
little."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from elastic import door
from elastic.gateway import Gateway
from elastic.handshake import MAX_HELLO, MAX_UNPROVEN
from elastic.lighthouse import Lighthouse, connect
from elastic.node import Identity, Node, Refused
from elastic.security import OPEN, Security, choose
from elastic.tunnel import Entrance, Exit
from elastic.wire import HEAD, MAGIC, MAX_PAYLOAD, Connection, Message, WireError, encode
from launch.certs import issue
from tests.attackers import Address, Papers, Wire, idle, meanwhile, said, said_over_tls, until
from tests.exchange_cluster import BLOCK, Cluster

REPO = Path(__file__).resolve().parents[1]
SECRET = "a secret of this run"
KILL = b"POST /replica/eu_1/kill HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
KINDS = ("tls", "secret", "open")


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def security(papers: Papers, tmp_path: Path) -> Callable[[str, str], Security]:
    (tmp_path / "secret").write_text(SECRET)

    def of(kind: str, name: str) -> Security:
        return {"tls": papers.of(name), "secret": Security(secret_from=str(tmp_path / "secret")), "open": OPEN}[kind]

    return of


Of = Callable[[str, str], Security]


def node(stack: ExitStack, member: str, security: Security) -> Node:
    made = Node("127.0.0.1", security=security)
    made.identity = Identity("run", "{}", member)
    stack.callback(made.close)
    return made


def address(endpoint: str) -> Address:
    host, port = endpoint.rsplit(":", 1)
    return host, int(port)


class Target:
    """eu's port: counts how often its handler was reached."""

    def __init__(self, stack: ExitStack, security: Security) -> None:
        self.reached: list[Message] = []
        self.heard: list[Message] = []
        self.node = node(stack, "eu_1", security)
        self.node.handlers["echo"] = self._echo
        self.door = self.node._door
        self.address = address(self.node.endpoint)

    def _echo(self, connection: Connection, hello: Message) -> None:
        self.reached.append(hello)
        while True:
            message, payload = connection.receive()
            self.heard.append(message)
            connection.send(message, payload)

    def serves(self, friend: Node, seconds: float = 10.0) -> bool:
        """A member is served, and soon."""
        begin, before = time.monotonic(), len(self.reached)
        connection, _ = friend.dial(self.node.endpoint, "echo", 20)
        connection.send({"n": before}, b"x" * 1000)
        answered = connection.receive() == ({"n": before}, b"x" * 1000)
        friend.release(connection)
        return answered and len(self.reached) == before + 1 and time.monotonic() - begin < seconds


HELLO = encode({"type": "hello", "purpose": "echo", "run": "run", "fingerprint": "{}", "member": "us_2", "rank": 0})
REGISTER = encode({"type": "hello", "purpose": "register", "member": "eu_1", "name": "eu_1.0"})
LIGHT = encode({"type": "hello", "purpose": "lighthouse", "member": "us_2"})


@pytest.mark.parametrize("shown", ["none", "foreign", "expired", "revoked"])
def test_certificates_that_are_not_good_open_no_port(
    papers: Papers, stack: ExitStack, capsys: pytest.CaptureFixture[str], shown: str
) -> None:
    target = Target(stack, papers.of("eu"))
    gateway = Gateway("127.0.0.1", 0, papers.of("gateway"))
    stack.callback(gateway.close)
    lighthouse = Lighthouse("127.0.0.1", 0, papers.of("lighthouse"))
    stack.callback(lighthouse.shutdown)
    ports = [target.node.endpoint, gateway.endpoint, lighthouse.address.removeprefix("http://")]
    for port, words in zip(ports, (HELLO, REGISTER, LIGHT + KILL), strict=True):
        assert said_over_tls(address(port), papers.forged[shown], words) == b""
        assert MAGIC not in said(address(port), words)[1:]  # at most one frame: a refusal
        assert b"HTTP" not in said(address(port), KILL)
    assert not target.reached and not gateway._ranks
    assert said_over_tls(target.address, papers.run / "us", HELLO), "with the right papers the same bytes are answered"
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


@pytest.mark.parametrize("kind", ["tls", "secret"])
def test_what_was_recorded_on_the_way_and_is_said_again_is_worth_nothing(
    stack: ExitStack, security: Of, kind: str
) -> None:
    target, friend = Target(stack, security(kind, "eu")), node(stack, "us_2", security(kind, "us"))
    wire = Wire(target.address)
    stack.callback(wire.close)
    connection, _ = friend.dial(wire.endpoint, "echo", 10)
    connection.send({"a": 1}, b"payload")
    assert connection.receive() == ({"a": 1}, b"payload") and len(target.reached) == 1
    before = target.door.refusals
    said(target.address, bytes(wire.heard))
    assert until(lambda: target.door.refusals == before + 1) and len(target.reached) == 1
    assert target.serves(friend)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :]


ON_THE_WAY: dict[str, Callable[[bytes], bytes]] = {
    "changed": lambda data: flip(data, len(data) - 20),
    "changed length": lambda data: flip(data, 15),
    "repeated": lambda data: data + data,
    "put before": lambda data: encode({"n": "forged"}) + data,
    "left out": lambda data: b"",
}
"""What who sits between the two does with one frame."""


@pytest.mark.parametrize("done", ON_THE_WAY)
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("kind", ["tls", "secret"])
def test_frames_that_are_tampered_with_on_the_way_end_the_connection(
    stack: ExitStack, security: Of, kind: str, way: str, done: str
) -> None:
    target, friend = Target(stack, security(kind, "eu")), node(stack, "us_2", security(kind, "us"))
    wire = Wire(target.address)
    stack.callback(wire.close)
    connection, _ = friend.dial(wire.endpoint, "echo", 10)
    connection.send({"n": 0})
    assert connection.receive()[0] == {"n": 0}
    passed = wire.heard if way == "up" else wire.answered
    before = len(passed)
    setattr(wire, way, ON_THE_WAY[done])
    connection.send({"n": 1})
    assert until(lambda: len(passed) > before)
    setattr(wire, way, bytes)
    with suppress(OSError):
        connection.send({"n": 2})  # what follows one that was left out is not taken either
    got: list[Message] = []
    with pytest.raises(OSError):
        while True:
            got.append(connection.receive()[0])
    once = [{"n": 1}] if done == "repeated" else []
    assert got == once
    if way == "up":
        assert target.heard == [{"n": 0}, *once] and until(lambda: target.door.refusals == 1)
    assert target.serves(friend)


def test_a_hello_that_is_changed_on_the_way_is_not_taken(stack: ExitStack, security: Of) -> None:
    target, friend = Target(stack, security("secret", "eu")), node(stack, "us_2", security("secret", "us"))
    wire = Wire(target.address)
    stack.callback(wire.close)
    wire.up = lambda data: data.replace(b'"rank":0', b'"rank":1')
    with pytest.raises(OSError):
        friend.dial(wire.endpoint, "echo", 10)
    assert b'"rank":0' in wire.heard and not target.reached and target.door.refusals == 1


def test_a_side_that_hears_its_own_frames_does_not_take_them(stack: ExitStack, security: Of) -> None:
    target, friend = Target(stack, security("secret", "eu")), node(stack, "us_2", security("secret", "us"))
    wire = Wire(target.address)
    stack.callback(wire.close)
    connection, _ = friend.dial(wire.endpoint, "echo", 10)
    before = len(wire.answered)
    connection.send({"n": 0})
    assert connection.receive()[0] == {"n": 0}
    wire.up = lambda data: bytes(wire.answered[before:])
    connection.send({"n": 1})
    with pytest.raises(OSError):
        connection.receive()
    assert target.heard == [{"n": 0}] and until(lambda: target.door.refusals == 1)


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


def test_the_lighthouse_is_reached_through_the_tunnel_alone(papers: Papers, stack: ExitStack) -> None:
    """Its own port is on 127.0.0.1, so 127.0.0.2 stands for every other address of this machine."""
    command = [sys.executable, "-m", "elastic.lighthouse", "--bind", "0.0.0.0:0", "--tls", str(papers.run)]
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
        assert b"HTTP" not in said_over_tls((host, port), papers.forged["foreign"], LIGHT + KILL)
    with Entrance("127.0.0.2", port, papers.of("us"), "us_2") as entrance:
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
