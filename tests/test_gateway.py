"""A gateway of its own process: ranks that only dial out are dialled through it, by name, and nobody else notices."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from elastic.node import Identity, Node, Refused
from elastic.wire import Connection, Message
from tests.e2e.cluster import gateway as running
from tests.ports import free_port


def node(member: str, rank: int = 0) -> Node:
    made = Node("127.0.0.1")
    made.identity = Identity("run", "{}", member, rank)
    made.handlers["echo"] = echo
    return made


def echo(connection: Connection, hello: Message) -> None:
    while True:
        connection.send(*connection.receive())


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_behind_one_port_are_told_apart_and_carry_whole_frames() -> None:
    with running(free_port()) as gateway:
        inside, outside = [node("eu_1", r) for r in range(3)], node("us_2")
        endpoints = [one.register(gateway, f"eu_1.{one.identity.rank}") for one in inside if one.identity]
        assert endpoints[1] == f"{gateway}/eu_1.1"
        payload = os.urandom(3_000_000)

        def talk(rank: int) -> None:
            connection, hello = outside.dial(endpoints[rank], "echo", 20)
            assert (hello["member"], hello["rank"]) == ("eu_1", rank)
            for n in range(3):
                connection.send({"n": n}, payload)
                assert connection.receive() == ({"n": n}, payload)
            outside.release(connection)

        threads = [threading.Thread(target=talk, args=(rank,)) for rank in (0, 1, 2, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        until(lambda: all(len(one._open) == 1 for one in inside))  # an end on one side is one on the other
        for one in (*inside, outside):
            one.close()


def test_a_stranger_and_an_unknown_name_are_refused() -> None:
    with running(free_port()) as gateway:
        inside, outside = node("eu_1"), node("us_2")
        endpoint = inside.register(gateway, "eu_1.0")
        with pytest.raises(Refused, match=r"no rank eu_1\.7"):
            outside.dial(f"{gateway}/eu_1.7", "echo")
        outside.identity = Identity("another run", "{}", "us_2")
        with pytest.raises(Refused, match=r"run is another run at us_2 and run at eu_1"):
            outside.dial(endpoint, "echo")
        inside.close()
        until(lambda: refused(outside, endpoint))
        outside.close()


def refused(outside: Node, endpoint: str) -> bool:
    try:
        outside.dial(endpoint, "echo")
    except Refused as error:
        return "no rank eu_1.0" in str(error)
    except OSError:
        return False
    return False


def test_a_gateway_that_comes_back_is_registered_at_anew() -> None:
    port = free_port()
    inside, outside = node("eu_1"), node("us_2")
    with running(port) as gateway:
        endpoint = inside.register(gateway, "eu_1.0")
        outside.dial(endpoint, "echo", 5)
    with running(port):
        until(lambda: dialled(outside, endpoint))
    inside.close()
    outside.close()


def dialled(outside: Node, endpoint: str) -> bool:
    try:
        outside.dial(endpoint, "echo", 5)
    except OSError:
        return False
    return True


def test_a_bind_address_that_is_taken_is_one_sentence() -> None:
    with running(free_port()) as gateway:
        ended = subprocess.run(
            [sys.executable, "-m", "elastic.gateway", "--bind", gateway], capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and gateway in ended.stderr
