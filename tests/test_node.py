"""A rank's port: hellos are checked on both sides, handlers are found by purpose, close wakes everybody."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from elastic.node import Identity, Node, Refused
from elastic.wire import Connection, Message

EU = Identity("run-1", '{"model":"a"}', "eu_1")
US = replace(EU, member="us_2", rank=3)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.fixture
def nodes() -> Iterator[Callable[[Identity | None], Node]]:
    made: list[Node] = []

    def make(identity: Identity | None) -> Node:
        made.append(Node("127.0.0.1"))
        made[-1].identity = identity
        return made[-1]

    yield make
    for node in made:
        node.close()


Make = Callable[[Identity | None], Node]


def echo(connection: Connection, hello: Message) -> None:
    while True:
        message, payload = connection.receive()
        connection.send({**message, "member": hello["member"], "more": hello.get("more")}, payload)


def test_a_hello_of_the_run_reaches_its_handler(nodes: Make) -> None:
    eu, us = nodes(EU), nodes(US)
    eu.handlers["echo"] = echo
    connection, hello = us.dial(eu.endpoint, "echo", timeout=5, more=[1])
    assert (hello["member"], hello["rank"], hello["run"]) == ("eu_1", 0, "run-1")
    connection.send({"a": 1}, b"xyz")
    assert connection.receive() == ({"a": 1, "member": "us_2", "more": [1]}, b"xyz")
    us.release(connection)
    assert until(lambda: not eu._open) and eu.refusals == 0


@pytest.mark.parametrize(("key", "mine", "theirs"), [("run", "run-9", "run-1"), ("fingerprint", "{}", '{"model":"a"}')])
def test_another_run_or_fingerprint_is_refused_with_both_values(
    nodes: Make, capsys: pytest.CaptureFixture[str], key: str, mine: str, theirs: str
) -> None:
    eu, stranger = nodes(EU), nodes(replace(US, **{key: mine}))
    eu.handlers["echo"] = lambda connection, hello: pytest.fail("a stranger reached a handler")
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            stranger.dial(eu.endpoint, "echo")
        for said in (str(caught.value), eu.refusal):
            assert f"{key} is {mine} at us_2 and {theirs} at eu_1" in said
    assert eu.refusals == 2 and until(lambda: not eu._open) and not stranger._open
    assert capsys.readouterr().out.count(f"{theirs} at eu_1") == 1  # said once, not at every try


@pytest.mark.parametrize(("key", "mine", "theirs"), [("run", "run-9", "run-1"), ("fingerprint", "{}", '{"model":"a"}')])
def test_the_dialler_checks_the_answer_too(nodes: Make, key: str, mine: str, theirs: str) -> None:
    class Gullible(Identity):
        def mismatch(self, hello: Message) -> str | None:
            return None

    foreign = nodes(Gullible(**{**EU.__dict__, key: mine}))
    foreign.handlers["echo"] = echo
    us = nodes(US)
    with pytest.raises(Refused, match=key) as caught:
        us.dial(foreign.endpoint, "echo")
    assert mine in str(caught.value) and theirs in str(caught.value)
    assert not us._open and until(lambda: not foreign._open)


def test_unknown_purposes_and_nodes_that_are_not_ready_refuse(nodes: Make) -> None:
    eu, us, early = nodes(EU), nodes(US), nodes(None)
    early.handlers["echo"] = echo
    for endpoint, purpose in ((eu.endpoint, "nonsense"), (early.endpoint, "echo")):
        with pytest.raises(Refused, match="not ready"):
            us.dial(endpoint, purpose)
    assert not us._open


@pytest.mark.parametrize("change", [{"member": None}, {"member": 7}, {"rank": "x"}])
def test_a_hello_without_a_member_is_refused(nodes: Make, change: Message) -> None:
    eu = nodes(EU)
    eu.handlers["echo"] = lambda connection, hello: pytest.fail("reached a handler")
    host, port = eu.endpoint.split(":")
    connection = Connection(socket.create_connection((host, int(port)), 5))
    connection.send({**US.hello("echo"), **change})
    assert connection.receive()[0] == {"type": "refused", "reason": "no member"}
    connection.close()


def test_garbage_and_silence_leave_the_node_alive(nodes: Make) -> None:
    eu, us = nodes(EU), nodes(US)
    eu.handlers["echo"] = echo
    address = (eu.endpoint.split(":")[0], int(eu.endpoint.split(":")[1]))
    silent = [socket.create_connection(address, 5) for _ in range(50)]
    for _ in range(20):
        with socket.create_connection(address, 5) as noise:
            noise.sendall(b"GET / HTTP/1.0\r\n\r\n" * 3)
            with contextlib.suppress(ConnectionResetError):  # it hangs up on us
                assert noise.recv(100) == b""
    connection, _ = us.dial(eu.endpoint, "echo", 5)
    connection.send({})
    connection.receive()
    for sock in silent:
        sock.close()
    us.release(connection)
    assert until(lambda: not eu._open)


@pytest.mark.parametrize("error", [KeyError, TypeError, ValueError])
def test_a_handler_that_makes_no_sense_of_a_message_ends_its_connection_alone(
    nodes: Make, error: type[Exception]
) -> None:
    eu, us = nodes(EU), nodes(US)

    def handler(connection: Connection, hello: Message) -> None:
        raise error("nonsense")

    eu.handlers |= {"bad": handler, "echo": echo}
    connection, _ = us.dial(eu.endpoint, "bad", 5)
    with pytest.raises(ConnectionError):
        connection.receive()
    assert until(lambda: eu.refusals == 1)
    us.dial(eu.endpoint, "echo", 5)


def test_close_wakes_handlers_and_peers_and_frees_the_port(nodes: Make) -> None:
    eu, us = nodes(EU), nodes(US)
    begun, ended = threading.Event(), threading.Event()

    def handler(connection: Connection, hello: Message) -> None:
        begun.set()
        try:
            connection.receive()
        finally:
            ended.set()

    eu.handlers["wait"] = handler
    connection, _ = us.dial(eu.endpoint, "wait")
    assert begun.wait(5)
    eu.close()
    assert ended.wait(5)
    with pytest.raises(ConnectionError):
        connection.receive()
    with pytest.raises(OSError):
        us.dial(eu.endpoint, "wait")
    host, port = eu.endpoint.split(":")
    Node(host, int(port)).close()


def test_close_of_the_dialling_side_wakes_its_own_receiver(nodes: Make) -> None:
    eu, us = nodes(EU), nodes(US)
    eu.handlers["wait"] = lambda connection, hello: connection.receive()  # type: ignore[assignment,return-value]
    connection, _ = us.dial(eu.endpoint, "wait")
    errors: list[BaseException] = []

    def receive() -> None:
        try:
            connection.receive()
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    us.close()
    thread.join(5)
    assert not thread.is_alive() and errors
    with pytest.raises(OSError):
        us.dial(eu.endpoint, "wait")
    assert not us._open


def test_a_peer_that_never_answers_is_given_up(nodes: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.node.HANDSHAKE_TIMEOUT", 0.2)
    us = nodes(US)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        begin = time.monotonic()
        with pytest.raises(OSError):
            us.dial(f"127.0.0.1:{mute.getsockname()[1]}", "echo")
        assert time.monotonic() - begin < 3 and not us._open
