"""Measuring the way to another member over the connections that training uses: round trip, clock, rate both ways, and whether it
can dial back. Every rank answers (`serve`); `launch.doctor` asks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from elastic import tcp
from elastic.node import Node
from elastic.wire import NONSENSE, Connection, Message, WireError

PINGS = 5
PIECE = bytes(64 << 10)
"""Small, or the last one takes long on a slow link."""
LONGEST = 2.0
"""Seconds for which a rank lets itself be flooded, or floods, at a time."""
DRAIN = 5.0
"""Seconds that what was sent until then may take to arrive."""
FLOODS = 8
"""Streams of floods that a rank serves at once; further ones wait."""
TURN = 20.0
"""Seconds that they wait."""
SILENCE = 30.0
"""Seconds without a word after which a probe has failed."""
ASK = 4096
"""Bytes of JSON in a message."""
OPEN, REFUSED, SILENT = ANSWERS = ("open", "refused", "silent")
"""What came of dialling back: no more is told, or a rank could be had to explore the network that it is in."""


def serve(node: Node, congestion: str = "", left: Callable[[str], None] = lambda member: None) -> None:
    """left: told the member whose probe said that it needs nothing more."""
    turns = threading.BoundedSemaphore(FLOODS)

    def handler(connection: Connection, hello: Message) -> None:
        tcp.tune(connection.sock, congestion)
        connection.sock.settimeout(SILENCE)
        once = {"call", "sink", "source"}
        while True:
            ask, _ = connection.receive(ASK, 0)
            kind = ask["type"]
            if kind == "bye":
                return left(str(hello["member"]))
            if kind == "ping":
                connection.send({"type": "pong", "time": time.time()})
                continue
            once.remove(kind)
            if kind == "call":
                connection.send({"type": "called", "answer": _call(node, str(ask["endpoint"]))})
            else:
                _serve_flood(connection, kind, float(ask["seconds"]), turns)

    node.handlers["probe"] = handler


def _call(node: Node, endpoint: str) -> str:
    """One of ANSWERS."""
    try:
        node.release(node.dial(endpoint, "probe", SILENCE)[0])
    except TimeoutError:
        return SILENT
    except OSError:
        return REFUSED
    return OPEN


def _serve_flood(connection: Connection, kind: str, seconds: float, turns: threading.Semaphore) -> None:
    if not turns.acquire(timeout=TURN):
        connection.send({"type": "busy"})
        return
    try:
        with _limited(connection):
            connection.send({"type": "go"})
            if kind == "sink":
                _swallow(connection)
                connection.send({"type": "end"})
            else:
                _pour(connection, min(seconds, LONGEST))
    finally:
        turns.release()


@contextmanager
def _limited(connection: Connection) -> Iterator[None]:
    """Ends it if what is within takes too long, whatever the peer does. Raises TimeoutError then."""
    late = threading.Event()

    def expire() -> None:
        late.set()
        with suppress(
            OSError
        ):  # it is closed. Closing is for its own thread, which might read from the next one of that number
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(LONGEST + DRAIN, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except OSError as error:
        if late.is_set():
            raise TimeoutError(f"{LONGEST:g} s of data took more than {DRAIN:g} s to arrive") from error
        raise
    finally:
        timer.cancel()


def _pour(connection: Connection, seconds: float) -> int:
    """Returns the bytes."""
    until, sent = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        sent += connection.send({"type": "more"}, PIECE)
    connection.send({"type": "end"})
    return sent


def _swallow(connection: Connection) -> int:
    """Returns the bytes."""
    got = 0
    while True:
        message, payload = connection.receive(ASK, len(PIECE))
        if message["type"] == "end":
            return got
        got += len(payload)


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
    """One of ANSWERS: whether it can dial this rank. None: it need not."""


def measure(node: Node, endpoint: str, back: str, seconds: float, congestion: str) -> Way:
    """back: where the other is to dial this rank; empty: nowhere. seconds: of each flood, LONGEST at most. Raises OSError."""
    first, _ = node.dial(endpoint, "probe", SILENCE)
    opened = [first]
    try:
        rtt, clock = _ping(first)
        called = None
        if back:
            first.send({"type": "call", "endpoint": back})
            called = ANSWERS[ANSWERS.index(first.receive(ASK, 0)[0]["answer"])]
        streams = tcp.streams_for(rtt, 0.0, tcp.send_buffer())
        opened += [node.dial(endpoint, "probe", SILENCE)[0] for _ in range(streams - 1)]
        for connection in opened:
            tcp.tune(connection.sock, congestion)
        seconds = min(seconds, LONGEST)
        up, down = (_flood(opened, kind, seconds) for kind in ("sink", "source"))
        first.send({"type": "bye"})
        return Way(rtt, clock, up, down, called)
    except NONSENSE as error:
        raise WireError("it answers a probe with what makes no sense") from error
    finally:
        for connection in opened:
            node.release(connection)


def _ping(connection: Connection) -> tuple[float, float]:
    """Round trip and clock of the quickest of some."""
    found = []
    for _ in range(PINGS):
        sent, begin = time.time(), time.monotonic()
        connection.send({"type": "ping"})
        theirs = float(connection.receive(ASK, 0)[0]["time"])
        rtt = time.monotonic() - begin
        found.append((rtt, theirs - sent - rtt / 2))
    return min(found)


def _flood(streams: list[Connection], kind: str, seconds: float) -> float:
    """Bytes/s over all streams. The kernel's counters tell the highest over a second, which a slow start does not lower, but
    of a slow link nothing: that has the rate of all that was sent. Raises OSError."""
    meter = tcp.Meter()
    meter.begin()
    with ThreadPoolExecutor(len(streams)) as pool:
        rates = [pool.submit(_stream, one, kind, seconds) for one in streams]
        while not all(rate.done() for rate in rates):
            meter.sample(lambda: [one.sock for one in streams], busy=True)
            time.sleep(tcp.SAMPLE)
    meter.end()
    total = sum(rate.result() for rate in rates)
    return (meter.up if kind == "sink" else meter.down) or total


def _stream(connection: Connection, kind: str, seconds: float) -> float:
    """Bytes/s from the first one to the last one's arrival. Raises OSError."""
    connection.send({"type": kind, "seconds": seconds})
    if connection.receive(ASK, 0)[0]["type"] != "go":
        raise ConnectionError("it is busy with other probes: try again")
    begin = time.monotonic()
    with _limited(connection):
        sent = _pour(connection, seconds) if kind == "sink" else 0
        got = _swallow(connection)
    return (sent + got) / (time.monotonic() - begin)
