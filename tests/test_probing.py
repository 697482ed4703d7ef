"""Probes: what they measure, and what a rank lets a peer do with them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from elastic import probing, tcp
from elastic.node import Identity, Node
from elastic.wire import Connection


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    found = [Node("127.0.0.1") for _ in range(2)]
    for name, node in zip(("eu_1", "us_2"), found, strict=True):
        node.identity = Identity("doctor", "{}", name)
    yield found
    for node in found:
        node.close()


def asked(nodes: list[Node], kind: str) -> tuple[Connection, str]:
    """A connection on which a flood was asked for, and the answer."""
    connection, _ = nodes[0].dial(nodes[1].endpoint, "probe", 10)
    connection.send({"type": kind, "seconds": 0.0})
    return connection, str(connection.receive()[0]["type"])


def test_a_slow_link_has_a_rate(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """Below what an exchange's meter takes for one."""

    def tune(sock: socket.socket, congestion: str) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)  # a loopback's is large for so slow a link
        tcp.pace(sock, 5e5)

    monkeypatch.setattr(tcp, "tune", tune)
    probing.serve(nodes[1])
    way = probing.measure(nodes[0], nodes[1].endpoint, "", 0.7, "")
    assert 2e5 < way.up < 1.5e6 and 2e5 < way.down < 1.5e6 and way.back is None, way


@pytest.mark.parametrize(("message", "payload"), [({"type": "more"}, bytes((64 << 10) + 1)), ({"x": "x" * 5000}, b"")])
def test_a_frame_of_a_flood_is_bounded(nodes: list[Node], message: dict[str, Any], payload: bytes) -> None:
    probing.serve(nodes[1])
    connection, answer = asked(nodes, "sink")
    assert answer == "go"
    with pytest.raises(OSError):
        connection.send(message, payload)
        connection.receive()
    assert nodes[1].refusals == 1


@pytest.mark.parametrize("kind", ["source", "call", "drain"])
def test_a_connection_is_flooded_and_calls_once(nodes: list[Node], kind: str) -> None:
    probing.serve(nodes[1])
    connection, _ = nodes[0].dial(nodes[1].endpoint, "probe", 10)
    with pytest.raises(OSError):
        for _ in range(2):
            connection.send({"type": kind, "seconds": 0.0, "endpoint": nodes[1].endpoint})
            kinds = [connection.receive()[0]["type"] for _ in range(2 if kind == "source" else 1)]
            assert kinds == (["go", "end"] if kind == "source" else ["called"])
    assert nodes[1].refusals == 1


def test_who_sends_for_ever_or_nothing_loses_its_turn(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "FLOODS", 1)
    monkeypatch.setattr(probing, "TURN", 0.1)
    probing.serve(nodes[1])
    holder, answer = asked(nodes, "sink")
    assert answer == "go"
    with pytest.raises(ConnectionError, match="busy"):
        probing.measure(nodes[0], nodes[1].endpoint, "", 0.1, "")
    holder.close()
    monkeypatch.setattr(probing, "TURN", 20)
    monkeypatch.setattr(probing, "LONGEST", 0.2)
    monkeypatch.setattr(probing, "DRAIN", 0.1)
    silent, answer = asked(nodes, "sink")
    begin = time.monotonic()
    with pytest.raises(OSError):
        silent.receive()
    assert answer == "go" and time.monotonic() - begin < 8, "not only its own time-out"
    endless, answer = asked(nodes, "sink")
    assert answer == "go"
    with pytest.raises(OSError):
        while time.monotonic() - begin < 20:
            endless.send({"type": "more"}, b"x")
    assert asked(nodes, "source")[1] == "go"


def test_what_comes_of_dialling_back_is_one_word(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of what was found there."""
    probing.serve(nodes[1])
    for error, word in ((TimeoutError("10.0.0.7"), "silent"), (OSError("an SSH server"), "refused")):
        monkeypatch.setattr(nodes[1], "dial", Mock(side_effect=error))
        connection, _ = nodes[0].dial(nodes[1].endpoint, "probe", 10)
        connection.send({"type": "call", "endpoint": "10.0.0.7:22"})
        assert connection.receive()[0] == {"type": "called", "answer": word}
