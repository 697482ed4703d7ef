"""A TCP stream through a connection that both ends have proved themselves on: how a lighthouse, which asks nobody who he is
and lets anybody kill a member, is reached from other hosts while it listens on loopback alone."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from contextlib import suppress

from elastic.door import Door
from elastic.handshake import HANDSHAKE_TIMEOUT, Refused, dial, refusal
from elastic.security import Security
from elastic.tcp import keep_alive
from elastic.wire import PIECE, Connection, Message

PURPOSE = "lighthouse"
WELCOME: Message = {"type": "hello"}


class Exit:
    """The lighthouse's end: listens on `host`:`port` (0: any free one) and joins who has proved himself to `target`, a port of
    this machine's loopback."""

    def __init__(self, host: str, port: int, security: Security, target: int) -> None:
        self.target = target
        self._door = Door(host, port, security, self._arrived)
        self.port = self._door.port

    def close(self) -> None:
        self._door.close()

    def _arrived(self, connection: Connection, hello: Message) -> None:
        with contextlib.closing(connection), suppress(OSError):
            if hello.get("purpose") != PURPOSE:
                connection.send(refusal("here is a lighthouse"))
                return
            keep_alive(connection.sock)
            with socket.create_connection(("127.0.0.1", self.target), HANDSHAKE_TIMEOUT) as sock:
                sock.settimeout(None)
                connection.send(WELCOME)
                join(connection, Connection(sock))


class Entrance:
    """A region's end: each connection to `address` on this process's loopback is one to the lighthouse, whose name is
    resolved anew for each."""

    def __init__(self, host: str, port: int, security: Security, member: str) -> None:
        self._target, self._security, self._member = f"{host}:{port}", security, member
        self.refused = ""
        """Why the other end did, if it was reached and refused us or was refused."""
        self._open: set[Connection] = set()
        self._closed = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, name="entrance", daemon=True).start()

    def __enter__(self) -> Entrance:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in list(self._open):
            connection.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near = Connection(self._server.accept()[0])
                threading.Thread(target=self._through, args=(near,), name="entrance", daemon=True).start()
            except (OSError, RuntimeError):  # closed; or too many files or threads: that passes
                time.sleep(0.05)

    def _through(self, near: Connection) -> None:
        self._open.add(near)
        try:
            far = self.knock()
            self._open.add(far)
            try:
                join(far, near)
            finally:
                self._open.discard(far)
        except OSError as error:
            if str(error) != self.refused and isinstance(error, Refused):
                print(f"lighthouse {self._target}: {error}", flush=True)
                self.refused = str(error)
        finally:
            self._open.discard(near)
            near.close()

    def knock(self) -> Connection:
        """A connection to the other end. Raises OSError, Refused among them."""
        hello = {"type": "hello", "purpose": PURPOSE, "member": self._member}
        far, _ = dial(self._target, hello, self._security, HANDSHAKE_TIMEOUT)
        keep_alive(far.sock)
        return far


def join(one: Connection, other: Connection) -> None:
    """Copies bytes both ways until either stream ends, then closes both."""
    back = threading.Thread(target=_copy, args=(other, one), daemon=True)
    back.start()
    _copy(one, other)
    back.join()
    one.close()
    other.close()


def _copy(source: Connection, target: Connection) -> None:
    buffer = memoryview(bytearray(PIECE))
    with suppress(OSError):
        while data := source.receive_bytes(buffer):
            target.send_bytes(data)
    for connection in (source, target):
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
