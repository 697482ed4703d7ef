"""Who sits on the way between two members can read, but what he repeats or changes ends the connection."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest

from elastic.wire import Message, encode
from tests.attackers import Of, Target, Wire, node, said, until


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
