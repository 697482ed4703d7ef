"""A rank's listening port and its outgoing connections. Every connection begins with a hello that both sides check."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastic.tcp import keep_alive
from elastic.wire import NONSENSE, Connection, Message, WireError

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
        """Connections dropped because their hello was not of this run, or a frame was none or made no sense."""
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
        if not endpoint:
            raise ConnectionError("a rank that can only dial out was to be dialled")
        connection, name = _connect(endpoint)
        try:
            connection.send(self.identity.hello(purpose, **more, **({"to": name} if name else {})))
            hello = connection.receive_hello()
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

    def register(self, gateway: str, name: str) -> str:
        """Stays registered at a gateway (host:port) from now on. Returns the endpoint under which others reach this rank.
        Raises OSError if the gateway does not answer now."""
        connection = _register(gateway, name)
        self._open.add(connection)
        threading.Thread(
            target=self._answer_calls, args=(connection, gateway, name), name="gateway", daemon=True
        ).start()
        return f"{gateway}/{name}"

    def _answer_calls(self, connection: Connection, gateway: str, name: str) -> None:
        while not self._closed:
            try:
                while True:
                    message, _ = connection.receive()
                    call = str(message["call"])
                    threading.Thread(target=self._answer, args=(gateway, call), name="node-peer", daemon=True).start()
            except (OSError, KeyError) as error:
                self.release(connection)
                if not self._closed:
                    print(f"gateway {gateway}: {error}; registering anew", flush=True)
            registered = False
            while not self._closed and not registered:
                try:
                    connection, registered = _register(gateway, name), True
                    self._open.add(connection)
                except OSError:
                    time.sleep(1.0)

    def _answer(self, gateway: str, call: str) -> None:
        """Who calls is served like one that dialled this rank."""
        with contextlib.suppress(OSError):  # the gateway, or the caller, is gone
            connection, _ = _connect(gateway)
            connection.send({"type": "answer", "call": call})
            self.attend(connection, partial(self._serve, connection))

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
                connection = Connection(self._server.accept()[0])
                serve = partial(self._serve, connection)
                threading.Thread(target=self.attend, args=(connection, serve), name="node-peer", daemon=True).start()
            except (
                OSError,
                RuntimeError,
            ):  # closed; or too many files or threads, or a peer that was gone again: it passes
                time.sleep(0.05)

    def attend(self, connection: Connection, serve: Callable[[], None]) -> None:
        """Runs `serve`, which lives as long as the connection, and releases it. What came that is no frame, or makes no
        sense, is counted."""
        self._open.add(connection)
        try:
            serve()
        except WireError:
            self.refusals += 1
        except OSError:
            pass  # the peer is gone; who depends on it learns of it from `serve`
        except NONSENSE:
            self.refusals += 1
        finally:
            self.release(connection)

    def _serve(self, connection: Connection) -> None:
        connection.sock.settimeout(HANDSHAKE_TIMEOUT)
        hello = connection.receive_hello()
        if not self._closed and (handler := self._greet(connection, hello)):
            connection.sock.settimeout(None)
            handler(connection, hello)

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


def _connect(endpoint: str) -> tuple[Connection, str]:
    """A connection to `host:port` or `host:port/name`, and the name that the hello has to give to the gateway there."""
    address, _, name = endpoint.partition("/")
    host, _, port = address.rpartition(":")
    return Connection(socket.create_connection((host, int(port)), HANDSHAKE_TIMEOUT)), name


def _register(gateway: str, name: str) -> Connection:
    connection, _ = _connect(gateway)
    try:
        connection.send({"type": "register", "name": name})
        if connection.receive_hello().get("type") != "registered":
            raise ConnectionError(f"{gateway} is no gateway")
        connection.sock.settimeout(None)
        keep_alive(connection.sock)
        return connection
    except BaseException:
        connection.close()
        raise
