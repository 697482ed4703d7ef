"""Frames: what is sent arrives, and whatever else arrives ends in WireError or ConnectionError, soon and in little memory."""

from __future__ import annotations

import json
import random
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from elastic import wire
from elastic.wire import HEAD, MAGIC, Connection, Message, WireError

quick = hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
messages = st.dictionaries(st.text(), values, max_size=5)


@contextmanager
def pair() -> Iterator[tuple[Connection, Connection]]:
    server = socket.create_server(("127.0.0.1", 0))
    with closing(server):
        client = socket.create_connection(server.getsockname(), 5)
        accepted, _ = server.accept()
    a, b = Connection(client), Connection(accepted)
    a.sock.settimeout(5)
    b.sock.settimeout(5)
    try:
        yield a, b
    finally:
        a.close()
        b.close()


def frame(message: Message, payload: bytes = b"") -> bytes:
    with pair() as (a, b):
        a.send(message, payload)
        a.close()
        data = b""
        while piece := b.sock.recv(1 << 16):
            data += piece
        return data


def received(data: bytes) -> list[tuple[Message, bytes]]:
    """Every frame that a receiver takes from `data` and the end of the stream. Its error must be one of the two."""
    frames = []
    with pair() as (a, b):
        writer = threading.Thread(target=_write, args=(a, data))
        writer.start()
        try:
            while True:
                message, payload = b.receive()
                frames.append((message, bytes(payload)))
        except (WireError, ConnectionError):
            return frames
        finally:
            b.close()
            writer.join()


def _write(connection: Connection, data: bytes) -> None:
    try:
        connection.sock.sendall(data)
        connection.sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the receiver has seen enough


@quick
@given(st.lists(st.tuples(messages, st.binary(max_size=3000)), min_size=1, max_size=4))
def test_round_trip(frames: list[tuple[Message, bytes]]) -> None:
    with pair() as (a, b):
        for message, payload in frames:
            a.send(message, payload)
        for message, payload in frames:
            assert b.receive() == (message, payload)
        a.send({}, memoryview(b"abc")[1:])
        assert b.receive() == ({}, b"bc")
        a.close()
        with pytest.raises(ConnectionError):
            b.receive()


def test_large_payloads_and_many_senders_do_not_mix() -> None:
    payloads = [bytes([n]) * (200_000 + n) for n in range(8)]
    with pair() as (a, b):
        sent: list[int] = []
        threads = [
            threading.Thread(target=lambda n=n, p=p: sent.append(a.send({"n": n}, p))) for n, p in enumerate(payloads)
        ]
        for thread in threads:
            thread.start()
        got = [b.receive() for _ in payloads]
        for thread in threads:
            thread.join()
    assert sorted(message["n"] for message, _ in got) == list(range(8))
    assert all(bytes(payload) == payloads[message["n"]] for message, payload in got)
    assert sum(sent) == sum(map(len, payloads)) + 8 * (HEAD.size + len(b'{"n":0}'))


@quick
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    assert received(data) == []


@quick
@given(messages, st.binary(max_size=100), st.data())
def test_a_truncated_frame_is_the_end_of_the_stream(message: Message, payload: bytes, data: st.DataObject) -> None:
    whole = frame(message, payload)
    assert received(whole) == [(message, payload)]
    assert received(whole[: data.draw(st.integers(0, len(whole) - 1))]) == []


class Bytes:
    """The receiving half of a socket on which `data` and then the end of the stream arrive."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def setsockopt(self, *_: object) -> None: ...

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        piece = self.data[self.at : self.at + len(view)]
        view[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)


def decoded(data: bytes) -> list[tuple[Message, bytes]]:
    """`received` without a socket: for very many of them."""
    connection, frames = Connection(Bytes(data)), []  # type: ignore[arg-type]
    try:
        while True:
            message, payload = connection.receive()
            frames.append((message, bytes(payload)))
    except (WireError, ConnectionError):
        return frames


def test_no_changed_frame_passes() -> None:
    """Bits flipped, bytes cut out, put in or overwritten, anywhere in a stream of two frames: at most the untouched
    first one arrives, in bounded memory."""
    rng = random.Random(7)
    first, second = ({"type": "part", "first": 4}, b"0123456789" * 3), ({"type": "end"}, b"")
    stream, border = frame(*first) + frame(*second), len(frame(*first))
    tracemalloc.start()
    for _ in range(100_000):
        data, at = bytearray(stream), rng.randrange(len(stream))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        else:
            data[at : at + 4] = rng.randbytes(4)
        if not data.startswith(stream):
            got = decoded(bytes(data))
            assert got in ([], [first]), (at, kind)
            assert at >= border or kind == 2 or got == [] or data[:border] == stream[:border], (at, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < wire.MAX_JSON + wire.MAX_PAYLOAD + (4 << 20)


@pytest.mark.parametrize(
    "json_bytes", [b"", b"[1]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000]
)
def test_a_header_that_is_no_object_is_refused(json_bytes: bytes) -> None:
    checksum = wire.zlib.crc32(json_bytes)
    with pair() as (a, b):
        threading.Thread(
            target=_write, args=(a, HEAD.pack(MAGIC, len(json_bytes), 0, checksum) + json_bytes), daemon=True
        ).start()
        with pytest.raises(WireError):
            b.receive()


@pytest.mark.parametrize(
    ("json_size", "payload_size"),
    [(wire.MAX_JSON + 1, 0), (2, wire.MAX_PAYLOAD + 1), (2, 10 << 30), (2**32 - 1, 2**64 - 1)],
)
def test_lengths_are_bounded_before_anything_is_allocated(json_size: int, payload_size: int) -> None:
    with pair() as (a, b):
        a.sock.sendall(HEAD.pack(MAGIC, json_size, payload_size, 0) + b"{}")
        tracemalloc.start()
        try:
            with pytest.raises(WireError):
                b.receive()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_close_wakes_a_receiver() -> None:
    with pair() as (a, b):
        b.sock.settimeout(None)
        errors: list[BaseException] = []

        def receive() -> None:
            try:
                b.receive()
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        b.close()
        thread.join(5)
        assert not thread.is_alive() and len(errors) == 1
        a.close()
        b.close()  # a second time does no harm


def test_messages_are_plain_json() -> None:
    assert json.loads(frame({"x": [1, "é"]})[HEAD.size :]) == {"x": [1, "é"]}
