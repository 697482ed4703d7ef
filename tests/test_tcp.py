"""What is asked of TCP, on real sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from elastic import tcp


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        client = socket.create_connection(server.getsockname(), 5)
        accepted, _ = server.accept()
    with client, accepted:
        yield client, accepted


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def push(a: socket.socket, b: socket.socket, nbytes: int) -> None:
    for _ in range(nbytes >> 16):
        a.sendall(bytes(1 << 16))
        left = 1 << 16
        while left:
            left -= len(b.recv(left))


def test_the_kernel_tells_what_was_delivered() -> None:
    with pair() as (a, b):
        push(a, b, 8 << 20)

        def told() -> bool:
            sender, receiver = tcp.info(a), tcp.info(b)
            assert sender is not None and receiver is not None and 0 <= sender.rtt < 1
            return all(8 << 20 <= n <= (8 << 20) + 2 for n in (sender.sent, receiver.received))  # and SYN and FIN

        assert until(told)
    assert tcp.info(a) is None  # gone


@pytest.mark.parametrize("congestion", ["", "bbr", "cubic", "no such thing"])
def test_tuning_takes_what_the_kernel_has(congestion: str) -> None:
    with pair() as (a, b):
        tcp.tune(a, congestion)
        assert a.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert a.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == tcp.UNSENT
        push(a, b, 1 << 20)


def test_a_paced_stream_is_as_slow_as_asked_for() -> None:
    with pair() as (a, b):
        tcp.pace(a, 2e6)
        begin = time.monotonic()
        push(a, b, 1 << 20)
        assert time.monotonic() - begin > 0.3  # less would be three times too fast
    tcp.pace(a, 2e6)  # closed: it does not matter


@pytest.mark.parametrize(
    ("rtt", "rate", "streams"),
    [
        (0.0001, 0.0, 1),  # a local network
        (0.1, 0.0, 4),  # far away, and nothing known
        (0.1, 25e6, 4),
        (0.1, 125e6, 6),  # 12.5 MB on their way, 2 MB a stream
        (0.3, 1.25e9, 32),  # bounded
    ],
)
def test_streams_follow_round_trip_and_rate(rtt: float, rate: float, streams: int) -> None:
    assert tcp.streams_for(rtt, rate, 4 << 20) == streams


def test_the_meter_takes_the_fastest_two_seconds_and_forgets_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counters, sock = [0.0], [0, 0], socket.socket()
    monkeypatch.setattr(tcp.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tcp, "info", lambda _: tcp.Info(0.1, counters[0], counters[1]))
    meter = tcp.Meter()

    def flow(seconds: float, up: float, down: float, busy: bool = True) -> None:
        for _ in range(round(seconds / 0.1)):
            clock[0] += 0.1
            counters[0] += int(up * 0.1)
            counters[1] += int(down * 0.1)
            meter.sample(lambda: [sock], busy)

    def exchange(*flows: tuple[Any, ...]) -> tuple[float, float]:
        clock[0] += 1.0
        meter.begin()
        for one in flows:
            flow(*one)
        meter.end()
        return meter.up, meter.down

    assert exchange((3, 20e6, 30e6), (9, 1e6, 1e6)) == pytest.approx((20e6, 30e6), rel=0.02)  # the end was waiting
    assert exchange((5, 10e6, 30e6)) == pytest.approx((18e6, 30e6), rel=0.02)
    assert exchange((5, 10e6, 30e6)) == pytest.approx((16.2e6, 30e6), rel=0.02)
    assert exchange((0.2, 90e6, 90e6)) == pytest.approx((16.2e6, 30e6), rel=0.02)  # too short to tell
    # A short one, whose first bytes are acknowledged after a round trip.
    assert exchange((0.2, 0, 0), (0.6, 50e6, 90e6)) == pytest.approx((50e6, 90e6), rel=0.02)
    assert exchange((5, 1e3, 1e3)) == pytest.approx((50e6, 90e6), rel=0.02)  # too little to tell
    settled = []
    for rate in (60e6, 55e6, 90e6, 95e6):
        exchange((5, rate, rate))
        settled.append(meter.settled)
    assert settled == [False, True, False, True], "not while it still rises"
    exchange((2, 90e6, 90e6), (4, 10e6, 10e6, False))
    assert meter.settled, "its fastest part was the link's own rate"
    exchange((1, 90e6, 90e6), (4, 10e6, 10e6, False))
    assert not meter.settled, "others were waited for"
    sock.close()
