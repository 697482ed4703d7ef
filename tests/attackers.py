"""What strangers do to a port, and how to see that it gets them nowhere."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from elastic.node import Identity, Node
from elastic.security import OPEN, Security, choose
from elastic.wire import Connection, Message
from launch.certs import Authority, issue

Address = tuple[str, int]


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


class Papers:
    """The certificates of a run with regions eu and us, and what its attackers have."""

    def __init__(self, directory: Path) -> None:
        self.run, other, late = directory / "run", directory / "other", directory / "late"
        issue(self.run, ["eu", "us", "lost"])
        Authority(self.run).revoke("lost")
        issue(other, ["eu"])
        for name in ("authority.crt", "authority.key", "revoked.crl"):
            late.mkdir(exist_ok=True)
            (late / name).write_bytes((self.run / name).read_bytes())
        issue(late, ["asia"], days=1e-7)
        self.forged: dict[str, Path | None] = {
            "none": None,
            "foreign": other / "eu",
            "expired": late / "asia",
            "revoked": self.run / "lost",
        }

    def of(self, name: str) -> Security:
        return choose(str(self.run), "", name)


def context(papers: Path | None) -> ssl.SSLContext:
    """A client that believes any server and shows this certificate."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if papers is not None:
        made.load_cert_chain(f"{papers}.crt", f"{papers}.key")
    return made


def said_over_tls(address: Address, papers: Path | None, data: bytes, patience: float = 10.0) -> bytes:
    """What a port answers to who shows these papers: every byte under TLS until it hangs up or says nothing for so many s."""
    answer = b""
    with (
        suppress(OSError),
        socket.create_connection(address, patience) as sock,
        context(papers).wrap_socket(sock) as session,
    ):
        session.sendall(data)
        while piece := session.recv(1 << 16):
            answer += piece
    return answer


def said(address: Address, data: bytes) -> bytes:
    """The same without TLS."""
    answer = b""
    with suppress(OSError), socket.create_connection(address, 10) as sock:
        sock.sendall(data)
        while piece := sock.recv(1 << 16):
            answer += piece
    return answer


@contextmanager
def idle(address: Address, count: int, source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """So many connections that say nothing."""
    held: list[socket.socket] = []
    try:
        while len(held) < count:
            with suppress(ConnectionError, TimeoutError):  # the port's queue is full: once more
                held.append(socket.create_connection(address, 10, source_address=(source, 0)))
        yield held
    finally:
        for sock in held:
            sock.close()


@contextmanager
def meanwhile(*attacks: Callable[[], object]) -> Iterator[None]:
    """Each attack again and again, in a thread of its own, for as long as the block takes; each at least once."""
    ended, counts = threading.Event(), [0] * len(attacks)
    failed: list[BaseException] = []

    def repeat(n: int, attack: Callable[[], object]) -> None:
        while not ended.is_set():
            try:
                attack()
            except OSError:
                pass  # hung up on, as attackers are
            except BaseException as error:  # it got somewhere
                failed.append(error)
            counts[n] += 1
            ended.wait(0.02)

    threads = [threading.Thread(target=repeat, args=one, daemon=True) for one in enumerate(attacks)]
    for thread in threads:
        thread.start()
    try:
        yield
        assert until(lambda: all(counts), 60), counts
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)
    assert not failed, failed[0]


class Wire:
    """A port that passes a connection on to `target` and keeps what was said there and back, to be replayed. up, down: what
    becomes of it on the way."""

    def __init__(self, target: Address) -> None:
        self.target, self.heard, self.answered = target, bytearray(), bytearray()
        self.up: Callable[[bytes], bytes] = bytes
        self.down: Callable[[bytes], bytes] = bytes
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._pass, daemon=True).start()

    def _pass(self) -> None:
        near, _ = self._server.accept()
        far = socket.create_connection(self.target, 10)
        threading.Thread(target=self._copy, args=(far, near, self._back), daemon=True).start()
        self._copy(near, far, self._there)

    def _there(self, data: bytes) -> bytes:
        data, said = self.up(data), data
        self.heard += said
        return data

    def _back(self, data: bytes) -> bytes:
        data, said = self.down(data), data
        self.answered += said
        return data

    def _copy(self, source: socket.socket, target: socket.socket, pass_on: Callable[[bytes], bytes]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(pass_on(data))
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


# ---- a member of the run, and what tests need for one ----

SECRET = "a secret of this run"
Of = Callable[[str, str], Security]


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
