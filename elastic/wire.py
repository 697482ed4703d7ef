"""Framed messages over a socket: a JSON header and a binary payload, with lengths that are bounded before allocation and
a checksum. Nothing that arrives is evaluated."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import zlib
from typing import Any

Message = dict[str, Any]

MAGIC = b"DLC1"
HEAD = struct.Struct(">4sIQI")
"""magic, bytes of JSON, bytes of payload, crc32 of both."""
MAX_JSON = 4 << 20
MAX_PAYLOAD = 64 << 20


class WireError(OSError):
    """The bytes are not a frame of ours; the connection is of no further use."""


class Connection:
    """A socket that carries whole frames. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.sent = 0
        """Bytes sent, frames included."""
        self._sending = threading.Lock()

    def send(self, message: Message, payload: memoryview | bytes = b"") -> None:
        """Blocks while the peer does not read. Raises OSError when the connection is gone or its time-out passes."""
        data = json.dumps(message, separators=(",", ":")).encode()
        checksum = zlib.crc32(payload, zlib.crc32(data))
        with self._sending:
            self.sock.sendall(HEAD.pack(MAGIC, len(data), len(payload), checksum) + data)
            if len(payload):
                self.sock.sendall(payload)
            self.sent += HEAD.size + len(data) + len(payload)

    def receive(self) -> tuple[Message, bytearray]:
        """The next frame. Raises WireError on anything else, ConnectionError at the end of the stream."""
        magic, json_size, payload_size, checksum = HEAD.unpack(self._exactly(HEAD.size))
        if magic != MAGIC or json_size > MAX_JSON or payload_size > MAX_PAYLOAD:
            raise WireError("not a frame of this protocol")
        data, payload = self._exactly(json_size), self._exactly(payload_size)
        if zlib.crc32(payload, zlib.crc32(data)) != checksum:
            raise WireError("a frame's checksum does not match")
        return decode_json(data), payload

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            n = self.sock.recv_into(view[got:])
            if n == 0:
                raise ConnectionResetError("the peer closed the connection")
            got += n
        return data

    def close(self) -> None:
        """Also wakes a thread that is blocked in receive()."""
        with contextlib.suppress(OSError):  # not connected any more
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def decode_json(data: bytes | bytearray) -> Message:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError("a frame's header is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a frame's header is not a JSON object")
    return message
