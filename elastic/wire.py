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
MAX_PAYLOAD = 4 << 20
"""Bulk data travels in chunks of 1 MiB of fp32 at most."""
MAX_HELLO = 64 << 10
"""Bytes of JSON that a stranger may send; he has no payload to send."""


class WireError(OSError):
    """The bytes are not a frame of ours; the connection is of no further use."""


NONSENSE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
"""What handling a well-formed frame that makes no sense raises."""


class Connection:
    """A socket that carries whole frames. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._sending = threading.Lock()

    def send(self, message: Message, payload: memoryview | bytes = b"") -> int:
        """Blocks while the peer does not read. Returns the bytes sent. Raises OSError when the connection is gone or its
        time-out passes."""
        frame = encode(message, payload)
        with self._sending:
            self.sock.sendall(frame)
            if len(payload):
                self.sock.sendall(payload)
        return len(frame) + len(payload)

    def receive(self, max_json: int = MAX_JSON, max_payload: int = MAX_PAYLOAD) -> tuple[Message, bytearray]:
        """The next frame. Raises WireError on anything else, ConnectionError at the end of the stream."""
        magic, json_size, payload_size, checksum = HEAD.unpack(self._exactly(HEAD.size))
        if magic != MAGIC or json_size > max_json or payload_size > max_payload:
            raise WireError("not a frame of this protocol")
        data, payload = self._exactly(json_size), self._exactly(payload_size)
        if zlib.crc32(payload, zlib.crc32(data)) != checksum:
            raise WireError("a frame's checksum does not match")
        return decode_json(data), payload

    def receive_hello(self) -> Message:
        """The first frame of a connection, from somebody who has proved nothing yet."""
        return self.receive(MAX_HELLO, 0)[0]

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            n = self.sock.recv_into(view[got:], 0, socket.MSG_WAITALL)  # else Python wakes for every packet or two
            if n == 0:
                raise ConnectionResetError("the peer closed the connection")
            got += n
        return data

    def close(self) -> None:
        """Also wakes a thread that is blocked in receive()."""
        with contextlib.suppress(OSError):  # not connected any more
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def encode(message: Message, payload: memoryview | bytes = b"") -> bytes:
    """A frame's head and JSON; the payload follows."""
    data = json.dumps(message, separators=(",", ":")).encode()
    return HEAD.pack(MAGIC, len(data), len(payload), zlib.crc32(payload, zlib.crc32(data))) + data


def decode_json(data: bytes | bytearray) -> Message:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError("a frame's header is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a frame's header is not a JSON object")
    return message
