"""Discovery: a lighthouse is started where none answers, refused where something else listens, and members meet."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from elastic.lighthouse import (
    Lighthouse,
    LighthouseError,
    Membership,
    connect,
    find_or_serve,
    host_port,
    is_local,
    reach,
)
from elastic.security import ENVIRONMENT, choose
from tests.attackers import SECRET
from tests.ports import free_port

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_started_where_nothing_answers_and_found_afterwards(stack: ExitStack) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    server = find_or_serve(address)
    assert server is not None
    stack.callback(server.shutdown)
    connect(address).heartbeat("x_1", timeout=timedelta(seconds=2))
    assert find_or_serve(address) is None
    with pytest.raises(RuntimeError):
        Lighthouse(*host_port(address))


def test_several_that_start_at_once_agree_on_one(stack: ExitStack) -> None:
    address, servers = f"http://127.0.0.1:{free_port()}", []
    threads = [threading.Thread(target=lambda: servers.append(find_or_serve(address))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for server in servers:
        if server is not None:
            stack.callback(server.shutdown)
    assert len(servers) == 4 and sum(server is not None for server in servers) == 1


@pytest.mark.parametrize("manner", ["mute", "http", "closes"])
def test_something_else_there_is_refused_in_bounded_time(stack: ExitStack, manner: str) -> None:
    other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    kept = []

    def accept() -> None:
        while True:
            try:
                sock, _ = other.accept()
            except OSError:
                return
            if manner == "http":
                sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            kept.append(sock)
            if manner != "mute":
                kept.pop().close()

    thread = threading.Thread(target=accept)
    thread.start()
    address, begin = f"http://127.0.0.1:{other.getsockname()[1]}", time.monotonic()
    try:
        with pytest.raises(LighthouseError) as caught:
            find_or_serve(address, wait=0.5)
    finally:
        other.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for sock in kept:
            sock.close()
    assert time.monotonic() - begin < 8
    assert f"elastic.lighthouse={address}" in str(caught.value) and "not a lighthouse" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_elsewhere_none_is_started() -> None:
    """TEST-NET-1: nobody answers there."""
    with pytest.raises(LighthouseError, match=r"does not answer: start one there with `python -m elastic\.lighthouse"):
        find_or_serve("http://192.0.2.1:29510", wait=0.0)


@pytest.mark.parametrize(
    "bad", ["", "http://", "127.0.0.1", "http://x:", "http://x:port", "x:70000", "https://x:-1", ":80"]
)
def test_bad_addresses(bad: str) -> None:
    with pytest.raises(ValueError, match="is not http://HOST:PORT"):
        host_port(bad)


def test_addresses() -> None:
    assert host_port("http://a.b:80/") == ("a.b", 80) == host_port("a.b:80")
    assert is_local("localhost") and is_local("127.0.0.2") and not is_local("10.0.0.1")


def end(member: Membership) -> None:
    """Its threads must not be inside a native call when the interpreter ends."""
    member.close()
    for thread in member._threads:
        thread.join(10)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], again: Callable[[], None], seconds: float = 25.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        again()
        time.sleep(0.2)
    return condition()


def test_members_of_a_run_find_each_other_and_nobody_else(stack: ExitStack) -> None:
    server = Lighthouse("127.0.0.1", 0)
    stack.callback(server.shutdown)
    address = server.address
    found: dict[str, dict[str, str]] = {}
    names = {"eu_1": "r", "us_2": "r", "foreign_3": "other"}
    members = [
        Membership(address, name, f"{name}:1", run, lambda: True, lambda them, name=name: found.update({name: them}))
        for name, run in names.items()
    ]
    for member in members:
        stack.callback(end, member)

    def ask() -> None:
        for member in members:
            member.ask()

    assert until(lambda: bool(found.get("eu_1")) and bool(found.get("us_2")) and "foreign_3" in found, ask)
    assert found["eu_1"] == {"us_2": "us_2:1"} and found["us_2"] == {"eu_1": "eu_1:1"} and found["foreign_3"] == {}


def start(bind: str, stack: ExitStack) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "elastic.lighthouse", "--bind", bind], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.stdout.close)  # type: ignore[union-attr]
    stack.callback(process.wait, 10)
    stack.callback(process.kill)
    line = process.stdout.readline()  # type: ignore[union-attr]
    return process, line.removeprefix("lighthouse ").strip()


def test_a_lighthouse_that_is_killed_and_comes_back_is_taken_up_again(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.lighthouse.HEARTBEAT_TIMEOUT", 0.5)
    process, address = start("127.0.0.1:0", stack)
    founds: list[dict[str, str]] = []
    member = Membership(address, "eu_1", "e:1", "r", lambda: True, founds.append)
    stack.callback(end, member)
    assert until(lambda: bool(founds), member.ask)
    process.kill()
    process.wait(10)
    assert until(lambda: not member.reachable, member.ask)
    founds.clear()
    again, same = start(address.removeprefix("http://"), stack)
    assert same == address
    assert until(lambda: bool(founds) and member.reachable, member.ask)
    again.terminate()
    assert again.wait(10) == 0


NAME = "lighthouse.test"


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The address that NAME stands for, which may be changed."""
    places, resolve = ["127.0.0.1"], socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        return resolve(places[0] if host == NAME else host, *more, **options)

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    return places


class Three:
    """Members who know the lighthouse by its name and prove themselves to it, and whom each found last."""

    def __init__(self, stack: ExitStack, port: int) -> None:
        self.stack, self.port = stack, port
        self.members: dict[str, Membership] = {}
        self.found: dict[str, set[str]] = {}

    def add(self, name: str) -> None:
        entrance = self.stack.enter_context(reach(f"http://{NAME}:{self.port}", choose("", "", name), name))
        assert entrance is not None
        heard = partial(self._heard, name)
        self.members[name] = Membership(entrance.address, name, f"{name}:1", "r", lambda: True, heard)
        self.stack.callback(end, self.members[name])

    def _heard(self, name: str, them: dict[str, str]) -> None:
        self.found[name] = set(them)

    def meet(self, *names: str) -> bool:
        """Whether all of these find each other, from now on."""
        self.found.clear()
        return until(lambda: all(self.found.get(name, set()) >= set(names) - {name} for name in names), self.ask)

    def ask(self) -> None:
        for member in self.members.values():
            member.ask()


def test_a_lighthouse_that_moves_is_found_by_its_name_and_two_at_once_do_no_harm(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, named: list[str]
) -> None:
    """Who has one asks there until it has not answered once; who comes asks the other one."""
    monkeypatch.setattr("elastic.lighthouse.HEARTBEAT_TIMEOUT", 2.0)
    monkeypatch.setenv(ENVIRONMENT, SECRET)
    port = free_port()
    before, _ = start(f"127.0.0.1:{port}", stack)
    three = Three(stack, port)
    three.add("eu_1")
    three.add("us_2")
    assert three.meet("eu_1", "us_2")
    start(f"127.0.0.2:{port}", stack)
    named[0] = "127.0.0.2"
    three.add("asia_3")
    assert three.meet("eu_1", "us_2")
    assert until(lambda: "asia_3" in three.found, three.ask), "with two, everybody is answered"
    before.kill()
    assert three.meet("eu_1", "us_2", "asia_3")
    assert until(lambda: all(member.reachable for member in three.members.values()), three.ask)
