"""A faulting HTTP proxy in front of a real S3 server, so that a store can be slow, away, refusing or lying on purpose.

It forwards heads as they are, the Host that SigV4 has signed among them, and bodies as they come; clients use it as their
endpoint (path style). Every request is asked of the rules in order; the first that fits and is not used up has its way.
Serves in a thread of its own; rules may be added and removed at any time, and hold for requests under way where that makes
sense: a hang ends when its rule is removed.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import pytest

from tests.s3_server import Server, new_server

CHUNK = 64 << 10
CODES = {403: "InvalidAccessKeyId", 500: "InternalError", 503: "SlowDown", 507: "InsufficientStorage"}
"""Status -> S3's code for it; any other one is InternalError."""

Fault = Literal["status", "hang", "slow", "cut", "reset", "truncate", "shorten", "flip", "lose"]


@dataclass(eq=False)
class Rule:
    """What happens to requests of this method ('' is any) whose path and query have `match` somewhere.

    status    is answered with that status and S3's code for it; the server hears nothing
    hang      is read, and not answered while the rule is there
    slow      `rate` bytes a second, either way
    cut       the connection is reset after `at` bytes of the request's body, on both sides
    reset     the connection is reset after `at` bytes of the answer's body
    truncate  the connection ends, as if in order, after `at` bytes of the answer's body
    shorten   the answer is of `at` bytes and says so itself
    flip      bit `bit` of byte `at` of the answer's body is the other one (at: modulo its length)
    lose      the server does it, and its answer is lost: the connection is reset
    """

    do: Fault
    method: str = ""
    match: str = ""
    times: int | None = None
    """It is used up after so many requests; None: never."""
    spare: int = 0
    """So many requests that fit go through first."""
    status: int = 503
    at: int = 0
    bit: int = 0
    rate: float = 1e6
    hits: int = 0
    passed: int = 0

    def fits(self, method: str, target: str) -> bool:
        return self.method in ("", method) and re.search(self.match, target) is not None

    def takes(self) -> bool:
        """Whether this request, which fits, is one that it is for."""
        if self.passed < self.spare:
            self.passed += 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True


@dataclass
class Head:
    """Of a request or an answer: the first line and the headers as they came, and what they say of the body."""

    raw: bytes
    first: list[str]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", 0))

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()


Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """`with Proxy(port_of_the_server) as proxy`: clients' endpoint is `proxy.url`."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str]] = []
        """(method, path and query) of all of them, in order, whatever became of them."""
        self._underway: list[tuple[str, str]] = []
        """Those of them that have no whole answer yet."""
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            self.rules.append(rule)
        return rule

    def remove(self, rule: Rule) -> None:
        with self._lock:
            self.rules = [other for other in self.rules if other is not rule]

    @contextmanager
    def fault(self, rule: Rule) -> Iterator[Rule]:
        """The rule holds inside."""
        try:
            yield self.add(rule)
        finally:
            self.remove(rule)

    def count(self, method: str = "", match: str = "") -> int:
        """Requests that have come."""
        fits = Rule("status", method, match).fits
        return sum(fits(*request) for request in list(self.requests))

    def underway(self, method: str = "", match: str = "") -> int:
        """Requests that have come, if only into the sockets, and have no whole answer yet."""
        return asyncio.run_coroutine_threadsafe(self._look(Rule("status", method, match)), self._loop).result()

    async def _look(self, rule: Rule) -> int:
        for _ in range(10):  # turns of the loop: what waits in the sockets is read
            await asyncio.sleep(0)
        return sum(rule.fits(*request) for request in self._underway)

    def _rule_for(self, method: str, target: str) -> Rule | None:
        with self._lock:
            self.requests.append((method, target))
            return next((rule for rule in self.rules if rule.fits(method, target) and rule.takes()), None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                while (head := await _read_head(reader)) is not None:
                    request = head.first[0], head.first[1]
                    rule = self._rule_for(*request)
                    self._underway.append(request)
                    try:
                        if not await self._exchange(head, (reader, writer), rule):
                            break
                    finally:
                        self._underway.remove(request)
        except asyncio.CancelledError:
            pass  # the proxy closes
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, head: Head, client: Pair, rule: Rule | None) -> bool:
        """One request and its answer. False: the client's connection is not to be used any more."""
        if head.headers.get("expect", "").lower() == "100-continue":
            client[1].write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if rule is not None and rule.do in ("status", "hang"):
            return await self._refuse(head, client, rule)
        try:
            server = await asyncio.open_connection("127.0.0.1", self.server_port)
        except OSError:
            _reset(client[1])  # what a client of a dead server sees, more or less
            return False
        try:
            server[1].write(head.raw)
            if rule is not None and rule.do == "cut":
                await _copy(client[0], server[1], min(rule.at, head.length), None)
                _reset(client[1]), _reset(server[1])
                return False
            await _forward_body(head, client[0], server[1], rule)
            return await self._answer(head.first[0], server[0], client[1], rule)
        finally:
            server[1].close()

    async def _refuse(self, head: Head, client: Pair, rule: Rule) -> bool:
        async for _ in _body(head, client[0]):
            pass
        if rule.do == "hang":
            while rule in self.rules and not client[0].at_eof():
                await asyncio.sleep(0.05)
            return False
        text = f"<?xml version='1.0'?><Error><Code>{CODES.get(rule.status, 'InternalError')}</Code>"
        body = b"" if head.first[0] == "HEAD" else f"{text}<Message>injected</Message></Error>".encode()
        client[1].write(f"HTTP/1.1 {rule.status} Injected\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await client[1].drain()
        return True

    async def _answer(
        self, method: str, server: asyncio.StreamReader, client: asyncio.StreamWriter, rule: Rule | None
    ) -> bool:
        head = await _read_head(server)
        while head is not None and head.first[1] == "100":
            head = await _read_head(server)
        do = "" if rule is None else rule.do
        if head is None or do == "lose":
            if head is not None and method != "HEAD":
                async for _ in _body(head, server):
                    pass
            _reset(client)
            return False
        if method == "HEAD" or head.first[1] in ("204", "304"):
            client.write(head.raw)
            await client.drain()
            return True
        return await self._answer_body(head, server, client, rule)

    async def _answer_body(
        self, head: Head, server: asyncio.StreamReader, client: asyncio.StreamWriter, rule: Rule | None
    ) -> bool:
        if rule is None or rule.do == "slow" or head.chunked:
            client.write(head.raw)
            await _forward_body(head, server, client, rule)
            return True
        if rule.do == "shorten":
            said, kept = f"{head.length}", min(rule.at, head.length)
            client.write(re.sub(rb"(?i)(content-length: *)" + said.encode(), rb"\g<1>%d" % kept, head.raw))
            await _copy(server, client, kept, None)
            return True
        client.write(head.raw)
        if rule.do == "flip":
            body = bytearray(await server.readexactly(head.length))
            if body:
                body[rule.at % len(body)] ^= 1 << rule.bit
            client.write(body)
            await client.drain()
            return True
        await _copy(server, client, min(rule.at, head.length), None)
        if rule.do == "reset":
            _reset(client)
        return False


async def _read_head(reader: asyncio.StreamReader) -> Head | None:
    """None where the connection has ended."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
    named = (line.partition(":") for line in lines)
    return Head(raw, first.split(" ", 2), {name.lower(): value.strip() for name, _, value in named})


async def _body(head: Head, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """As it is on the wire, chunks' framing included."""
    if not head.chunked:
        left = head.length
        while left:
            data = await reader.readexactly(min(CHUNK, left))
            left -= len(data)
            yield data
        return
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        yield line + await reader.readexactly(size + 2 if size else 0)
        if size == 0:
            break
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        yield line  # trailers
    yield line


async def _forward_body(
    head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rule: Rule | None
) -> None:
    rate = rule.rate if rule is not None and rule.do == "slow" else None
    async for data in _body(head, reader):
        await _send(writer, data, rate)
    await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int, rate: float | None) -> None:
    while count:
        data = await reader.readexactly(min(CHUNK, count))
        count -= len(data)
        await _send(writer, data, rate)


async def _send(writer: asyncio.StreamWriter, data: bytes, rate: float | None) -> None:
    begin = time.monotonic()
    writer.write(data)
    await writer.drain()
    if rate is not None:
        await asyncio.sleep(max(0.0, len(data) / rate - (time.monotonic() - begin)))


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST, not FIN."""
    sock = writer.get_extra_info("socket")
    with suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a module's own, which may be killed and started again."""
    found = new_server(tmp_path_factory.mktemp("weed"))
    try:
        found.start()
        yield found
    finally:
        found.kill()


@pytest.fixture(scope="module")
def proxy(weed: Server) -> Iterator[Proxy]:
    """In front of `weed`."""
    with Proxy(weed.port) as running:
        yield running
