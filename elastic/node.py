"""A rank's listening port and its outgoing connections. Every connection begins with a hello that both sides check."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic.wire import Connection, Message, WireError

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for a dialled peer to answer the hello."""


class Refused(ConnectionError):
    """The peer, or this side, refused the other's hello: the two do not belong to the same run."""


@dataclass(frozen=True)
class Identity:
    """Who this rank is, and of which run."""

    run: str
    fingerprint: str
    """Canonical JSON of what must be alike: protocol, model, fragments, codec, data."""
    member: str
    rank: int = 0

    def hello(self, purpose: str, **more: Any) -> Message:
        return {"type": "hello", "purpose": purpose, **self.__dict__, **more}

    def mismatch(self, hello: Message) -> str | None:
        """Why the sender of `hello` is not of this run, naming both values, or None."""
        for key in ("run", "fingerprint"):
            if hello.get(key) != getattr(self, key):
                theirs, mine = str(hello.get(key))[:500], getattr(self, key)[:500]
                return f"{key} is {theirs} at {str(hello.get('member'))[:100]} and {mine} at {self.member}"
        return None if isinstance(hello.get("member"), str) and isinstance(hello.get("rank"), int) else "no member"


Handler = Callable[[Connection, Message], None]


class Node:
    """Accepts connections on one port and hands each, by the purpose its hello names, to a handler in a thread of its
    own. A handler returns when the connection has served; the node closes it."""

    def __init__(self, host: str, port: int = 0) -> None:
        self.identity: Identity | None = None
        self.handlers: dict[str, Handler] = {}
        self.refusals = 0
        """Connections dropped because their hello or a message was not of this run."""
        self.refusal = ""
        """Why the last hello was refused."""
        self._open: set[Connection] = set()
        self._closed = False
        self._server = socket.create_server((host, port), backlog=128)
        self.endpoint = f"{host}:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, name="node", daemon=True).start()

    def dial(
        self, endpoint: str, purpose: str, timeout: float | None = None, **more: Any
    ) -> tuple[Connection, Message]:
        """A connection whose hello was accepted, and the peer's own hello. `timeout` (s) is for each later send and
        receive. Raises OSError, Refused among them."""
        assert self.identity is not None
        host, _, port = endpoint.rpartition(":")
        connection = Connection(socket.create_connection((host, int(port)), HANDSHAKE_TIMEOUT))
        try:
            connection.send(self.identity.hello(purpose, **more))
            hello, _ = connection.receive()
            if hello.get("type") != "hello":
                raise Refused(str(hello.get("reason", "no hello"))[:1200])
            if reason := self.identity.mismatch(hello):
                raise Refused(reason)
        except BaseException:
            connection.close()
            raise
        connection.sock.settimeout(timeout)
        self._open.add(connection)
        if self._closed:
            self.release(connection)
            raise ConnectionAbortedError("this node is closed")
        return connection, hello

    def release(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.close()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in list(self._open):
            self.release(connection)

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._server.accept()
                connection = Connection(sock)
            except OSError:
                time.sleep(0.05)  # closed; or the peer was gone again, or too many files are open: that passes
                continue
            threading.Thread(target=self._serve, args=(connection,), name="node-peer", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        self._open.add(connection)
        try:
            connection.sock.settimeout(HANDSHAKE_TIMEOUT)
            hello, _ = connection.receive()
            if self._closed:
                return
            if handler := self._greet(connection, hello):
                connection.sock.settimeout(None)
                handler(connection, hello)
        except (WireError, OSError):
            pass  # the peer is gone, or was never one of ours; who depends on it learns of it from its handler
        except (KeyError, TypeError, ValueError):
            self.refusals += 1  # a well-formed frame that makes no sense here
        finally:
            self.release(connection)

    def _greet(self, connection: Connection, hello: Message) -> Handler | None:
        handler = self.handlers.get(str(hello.get("purpose")))
        if self.identity is None or handler is None:
            connection.send({"type": "refused", "reason": "not ready"})
        elif reason := self.identity.mismatch(hello):
            self.refusals += 1
            if reason != self.refusal:
                print(f"refused a connection: {reason}", flush=True)
            self.refusal = reason
            connection.send({"type": "refused", "reason": reason})
        else:
            connection.send(self.identity.hello("reply"))
            return handler
        return None
