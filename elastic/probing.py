"""Measuring the way to another member over the connections that training uses: round trip, clock, rate both ways, and whether it
can dial back. Every rank answers (`serve`); `launch.doctor` asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from elastic import tcp
from elastic.node import Node
from elastic.wire import Connection, Message

PINGS = 5
PIECE = bytes(256 << 10)
LONGEST = 2.0
"""Seconds for which a rank lets itself be flooded, or floods, at a time."""
FLOODS = 8
"""Streams of floods that a rank serves at once; further ones wait."""
SILENCE = 30.0
"""Seconds without a word after which a probe has failed."""


def serve(node: Node, congestion: str = "", left: Callable[[str], None] = lambda member: None) -> None:
    """left: told the member whose probe said that it needs nothing more."""
    turns = threading.BoundedSemaphore(FLOODS)

    def handler(connection: Connection, hello: Message) -> None:
        tcp.tune(connection.sock, congestion)
        connection.sock.settimeout(SILENCE)
        while True:
            ask, _ = connection.receive()
            kind = ask["type"]
            if kind == "ping":
                connection.send({"type": "pong", "time": time.time()})
            elif kind == "call":
                connection.send({"type": "called", "error": _call(node, str(ask["endpoint"]))})
            elif kind == "bye":
                return left(str(hello["member"]))
            else:
                with turns:
                    connection.send({"type": "go"})
                    if kind == "sink":
                        _swallow(connection)
                        connection.send({"type": "end"})
                    else:
                        _pour(connection, min(float(ask["seconds"]), LONGEST))

    node.handlers["probe"] = handler


def _call(node: Node, endpoint: str) -> str:
    """Why that cannot be dialled from here; empty if it can."""
    try:
        node.release(node.dial(endpoint, "probe", SILENCE)[0])
    except OSError as error:
        return str(error) or type(error).__name__
    return ""


def _pour(connection: Connection, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        connection.send({"type": "more"}, PIECE)
    connection.send({"type": "end"})


def _swallow(connection: Connection) -> None:
    while connection.receive()[0]["type"] != "end":
        pass


@dataclass(frozen=True)
class Way:
    """To one other rank."""

    rtt: float
    """s, the smallest."""
    clock: float
    """Seconds that its clock is ahead of this one, known to half a round trip."""
    up: float
    down: float
    """Bytes/s."""
    back: str | None
    """Why it cannot dial this rank; empty if it can, None if it need not."""


def measure(node: Node, endpoint: str, back: str, seconds: float, congestion: str) -> Way:
    """back: where the other is to dial this rank; empty: nowhere. seconds: of each flood, LONGEST at most. Raises OSError."""
    first, _ = node.dial(endpoint, "probe", SILENCE)
    opened = [first]
    try:
        rtt, clock = _ping(first)
        called = None
        if back:
            first.send({"type": "call", "endpoint": back})
            called = str(first.receive()[0]["error"])
        streams = tcp.streams_for(rtt, 0.0, tcp.send_buffer())
        opened += [node.dial(endpoint, "probe", SILENCE)[0] for _ in range(streams - 1)]
        for connection in opened:
            tcp.tune(connection.sock, congestion)
        seconds = min(seconds, LONGEST)
        up, down = (_flood(opened, kind, seconds) for kind in ("sink", "source"))
        first.send({"type": "bye"})
        return Way(rtt, clock, up, down, called)
    finally:
        for connection in opened:
            node.release(connection)


def _ping(connection: Connection) -> tuple[float, float]:
    """Round trip and clock of the quickest of some."""
    found = []
    for _ in range(PINGS):
        sent, begin = time.time(), time.monotonic()
        connection.send({"type": "ping"})
        theirs = float(connection.receive()[0]["time"])
        rtt = time.monotonic() - begin
        found.append((rtt, theirs - sent - rtt / 2))
    return min(found)


def _flood(streams: list[Connection], kind: str, seconds: float) -> float:
    """Bytes/s that the kernel saw arrive over all streams, the highest over a second. Raises OSError."""
    meter, failed = tcp.Meter(), list[OSError]()
    threads = [threading.Thread(target=partial(_stream, one, kind, seconds, failed), daemon=True) for one in streams]
    meter.begin()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        meter.sample(lambda: [one.sock for one in streams])
        time.sleep(tcp.SAMPLE)
    meter.end()
    if failed:
        raise failed[0]
    return meter.up if kind == "sink" else meter.down


def _stream(connection: Connection, kind: str, seconds: float, failed: list[OSError]) -> None:
    try:
        connection.send({"type": kind, "seconds": seconds})
        connection.receive()
        if kind == "sink":
            _pour(connection, seconds)
        _swallow(connection)
    except OSError as error:
        failed.append(error)
