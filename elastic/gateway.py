"""`python -m elastic.gateway --bind 0.0.0.0:29600`: one public port for ranks that have no public address.

Ranks dial out to it and register a name (`elastic.gateway=HOST:PORT`). Who dials `HOST:PORT/NAME` is put through: the
gateway calls that rank on its registration, the rank dials out once more, and the gateway copies bytes between the two.
Nothing else in the code knows; a region needs no open port at all.
"""

from __future__ import annotations

import argparse
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from elastic.lighthouse import host_port
from elastic.node import HANDSHAKE_TIMEOUT
from elastic.tcp import keep_alive
from elastic.wire import Connection, Message

PIECE = 1 << 18
"""Bytes copied at a time."""


class Gateway:
    """Listens on `host`:`port`; 0: any free one."""

    def __init__(self, host: str, port: int) -> None:
        self._ranks: dict[str, Connection] = {}
        self._calls: dict[str, tuple[threading.Event, list[Connection]]] = {}
        self._lock = threading.Lock()
        self._server = socket.create_server((host, port), backlog=256)
        self.endpoint = f"{host}:{self._server.getsockname()[1]}"

    def serve(self) -> None:
        """Until `close`."""
        while self._server.fileno() >= 0:
            try:
                connection = Connection(self._server.accept()[0])
                keep_alive(connection.sock)
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):
                time.sleep(0.05)  # closed; or there are too many files or threads: that passes

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _greet(self, connection: Connection) -> None:
        try:
            connection.sock.settimeout(HANDSHAKE_TIMEOUT)
            hello = connection.receive_hello()
            connection.sock.settimeout(None)
            if hello.get("type") == "register":
                self._register(connection, str(hello["name"]))
            elif hello.get("type") == "answer":
                self._answer(connection, str(hello["call"]))
                return  # the caller's thread has it now
            else:
                self._put_through(connection, hello)
        except (OSError, KeyError):
            pass  # whoever it was notices
        connection.close()

    def _register(self, connection: Connection, name: str) -> None:
        """Holds a rank's registration until it hangs up."""
        with self._lock:
            self._ranks[name] = connection
        try:
            connection.send({"type": "registered"})
            connection.receive()  # it says nothing more: this ends with the connection
        finally:
            with self._lock:
                if self._ranks.get(name) is connection:
                    del self._ranks[name]

    def _answer(self, connection: Connection, call: str) -> None:
        with self._lock:
            called, answers = self._calls[call]
        answers.append(connection)
        called.set()

    def _put_through(self, caller: Connection, hello: Message) -> None:
        name = str(hello.get("to"))
        with self._lock:
            rank = self._ranks.get(name)
        if rank is None:
            caller.send({"type": "refused", "reason": f"no rank {name[:100]} is registered at this gateway"})
            return
        call, called, answers = secrets.token_hex(8), threading.Event(), list[Connection]()
        with self._lock:
            self._calls[call] = (called, answers)
        try:
            rank.send({"type": "call", "call": call})
            if not called.wait(HANDSHAKE_TIMEOUT):
                raise TimeoutError
        finally:
            with self._lock:
                del self._calls[call]
        answers[0].send(hello)
        back = threading.Thread(target=copy, args=(answers[0].sock, caller.sock), daemon=True)
        back.start()
        copy(caller.sock, answers[0].sock)
        back.join()
        answers[0].close()


def copy(source: socket.socket, target: socket.socket) -> None:
    """Bytes as they come, to the end of the stream; then both sides learn of the end."""
    buffer = memoryview(bytearray(PIECE))
    with suppress(OSError):
        while n := source.recv_into(buffer):
            target.sendall(buffer[:n])
    for sock in (source, target):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elastic.gateway", description=__doc__)
    parser.add_argument("--bind", default="0.0.0.0:29600", help="HOST:PORT")
    bind = parser.parse_args(argv).bind
    try:
        gateway = Gateway(*host_port(bind))
    except (OSError, ValueError) as error:
        print(f"--bind {bind} cannot be used ({error}): name a free HOST:PORT of this machine", file=sys.stderr)
        return 2
    print(f"gateway {gateway.endpoint}", flush=True)
    with suppress(KeyboardInterrupt):
        gateway.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
