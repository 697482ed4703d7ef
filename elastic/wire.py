"""Framed messages over a socket: a JSON header and a binary payload, with lengths that are bounded before allocation. A frame is
protected by TLS or a tag (`elastic.seal`), or else by a checksum. Nothing that arrives is evaluated."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import zlib
from typing import Any

from elastic.seal import TAG, Seal
from elastic.tls import Tls, TlsError

Message = dict[str, Any]

MAGIC = b"DLC1"
HEAD = struct.Struct(">4sIQI")
"""magic, bytes of JSON, bytes of payload, crc32 of both: 0 where TLS or a tag protects them."""
MAX_JSON = 4 << 20
MAX_PAYLOAD = 4 << 20
"""Bulk data travels in chunks of 1 MiB of fp32 at most."""
PIECE = 128 << 10
"""Bytes that are encrypted, or read from the socket to be decrypted, at a time."""


class WireError(OSError):
    """The bytes are not a frame of ours; the connection is of no further use."""


NONSENSE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
"""What handling a well-formed frame that makes no sense raises."""


class Connection:
    """A socket that carries whole frames, encrypted if there is a TLS session on it, tagged if there is a seal. Any thread may
    send; one thread receives."""

    def __init__(self, sock: socket.socket, tls: Tls | None = None, seal: Seal | None = None) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        """The plain socket, whose options and counters are the connection's; what it carries is not for others."""
        self._tls, self._seal = tls, seal
        self._bare = tls is None and seal is None
        self._cipher = memoryview(bytearray(PIECE if tls else 0))
        self._sending = threading.Lock()

    def send(self, message: Message, payload: memoryview | bytes = b"") -> int:
        """Blocks while the peer does not read. Returns the bytes sent. Raises OSError when the connection is gone or its
        time-out passes."""
        frame = encode(message, payload, self._bare)
        with self._sending:
            if self._seal:
                frame += self._seal.tag(frame, payload)
            self._send(frame)
            if len(payload):
                self._send(payload)
        return len(frame) + len(payload)

    def send_bytes(self, data: memoryview | bytes) -> None:
        """Of a stream that is not one of frames; where there is a seal, each piece is one, so that it is tagged."""
        if self._seal:
            self.send({}, data)
            return
        with self._sending:
            self._send(data)

    def receive_bytes(self, buffer: memoryview) -> memoryview:
        """The next ones of such a stream, in the buffer or in memory of their own; none: its end."""
        return memoryview(self.receive(2, PIECE)[1]) if self._seal else buffer[: self.receive_into(buffer)]

    def _send(self, data: memoryview | bytes) -> None:
        if self._tls is None:
            self.sock.sendall(data)
            return
        view = memoryview(data)
        for at in range(0, len(view), PIECE):
            self.sock.sendall(self._tls.seal(view[at : at + PIECE]))

    def receive(self, max_json: int = MAX_JSON, max_payload: int = MAX_PAYLOAD) -> tuple[Message, bytearray]:
        """The next frame. Raises WireError on anything else, ConnectionError at the end of the stream."""
        head = self._exactly(HEAD.size)
        json_size, payload_size, checksum = decode_head(head, max_json, max_payload)
        data, tag = self._exactly(json_size), self._exactly(TAG if self._seal else 0)
        payload = self._exactly(payload_size)
        if self._seal and not self._seal.fits(tag, head, data, payload):
            raise WireError("a frame is not what the peer sent next")
        return decode(data, payload, checksum if self._bare else None), payload

    def receive_into(self, view: memoryview, flags: int = 0) -> int:
        """The next bytes; 0: the end of the stream. flags: of recv(), without TLS; with it, only the session knows
        how many come. Raises WireError if they cannot be decrypted."""
        if self._tls is None:
            return self.sock.recv_into(view, 0, flags)
        try:
            while not (n := self._tls.open_into(view)):
                if not (got := self.sock.recv_into(self._cipher)):
                    return 0
                self._tls.feed(self._cipher[:got])
            return n
        except EOFError:
            return 0
        except TlsError as error:
            raise WireError(str(error)) from error

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            n = self.receive_into(view[got:], socket.MSG_WAITALL)  # else Python wakes for every packet or two
            if n == 0:
                raise ConnectionResetError("the peer closed the connection")
            got += n
        return data

    def close(self) -> None:
        """Also wakes a thread that is blocked in receive()."""
        with contextlib.suppress(OSError):  # not connected any more
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def encode(message: Message, payload: memoryview | bytes = b"", checked: bool = True) -> bytes:
    """A frame's head and JSON; the payload follows. checked: there is nothing better than a checksum."""
    data = json.dumps(message, separators=(",", ":")).encode()
    return HEAD.pack(MAGIC, len(data), len(payload), zlib.crc32(payload, zlib.crc32(data)) if checked else 0) + data


def decode_head(data: bytes | bytearray, max_json: int, max_payload: int) -> tuple[int, int, int]:
    """Bytes of JSON, bytes of payload, checksum. Raises WireError, before anything is allocated."""
    magic, json_size, payload_size, checksum = HEAD.unpack(data)
    if magic != MAGIC or json_size > max_json or payload_size > max_payload:
        raise WireError("not a frame of this protocol")
    return json_size, payload_size, checksum


def decode(data: bytes | bytearray, payload: bytes | bytearray, checksum: int | None) -> Message:
    """checksum: None: not needed. Raises WireError."""
    if checksum is not None and zlib.crc32(payload, zlib.crc32(data)) != checksum:
        raise WireError("a frame's checksum does not match")
    return decode_json(data)


def decode_json(data: bytes | bytearray) -> Message:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError("a frame's header is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a frame's header is not a JSON object")
    return message
