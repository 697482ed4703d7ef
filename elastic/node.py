"""A rank's listening port and its outgoing connections. Every connection begins with a hello that both sides check."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastic.door import Door
from elastic.handshake import HANDSHAKE_TIMEOUT, Line, Refused, dial, drive, receive_hello, refusal
from elastic.security import OPEN, Security
from elastic.tcp import keep_alive
from elastic.wire import NONSENSE, Connection, Message, WireError


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
NOT_READY = "not ready"
"""The refusal of a rank that does not take part yet, or not any more."""


class Node:
    """Accepts connections on one port and hands each, by the purpose its hello names, to a handler in a thread of its
    own. A handler returns when the connection has served; the node closes it."""

    def __init__(self, host: str, port: int = 0, security: Security = OPEN) -> None:
        self.identity: Identity | None = None
        self.handlers: dict[str, Handler] = {}
        self.security = security
        self._open: set[Connection] = set()
        self._closed = False
        self._door = Door(host, port, security, self._arrived)
        self.endpoint = f"{host}:{self._door.port}"

    @property
    def refusals(self) -> int:
        """Connections dropped because they proved nothing, their hello was not of this run, or a frame was none or made no
        sense."""
        return self._door.refusals

    @refusals.setter
    def refusals(self, count: int) -> None:
        self._door.refusals = count

    @property
    def refusal(self) -> str:
        """Why the last one was refused."""
        return self._door.refusal

    def dial(
        self, endpoint: str, purpose: str, timeout: float | None = None, **more: Any
    ) -> tuple[Connection, Message]:
        """A connection whose hello was accepted, and the peer's own hello. `timeout` (s) is for each later send and
        receive. Raises OSError, Refused among them."""
        assert self.identity is not None
        if not endpoint:
            raise ConnectionError("a rank that can only dial out was to be dialled")
        hello = self.identity.hello(purpose, **more)
        connection, answer = dial(endpoint, hello, self.security, HANDSHAKE_TIMEOUT)
        if reason := self.identity.mismatch(answer):
            connection.close()
            raise Refused(reason)
        connection.sock.settimeout(timeout)
        self._open.add(connection)
        if self._closed:
            self.release(connection)
            raise ConnectionAbortedError("this node is closed")
        return connection, answer

    def register(self, gateway: str, name: str) -> str:
        """Stays registered at a gateway (host:port) from now on; `name` begins with the member id. Returns the endpoint under
        which others reach this rank. Raises OSError if the gateway does not answer now."""
        connection = self._register(gateway, name)
        threading.Thread(
            target=self._answer_calls, args=(connection, gateway, name), name="gateway", daemon=True
        ).start()
        return f"{gateway}/{name}"

    def _register(self, gateway: str, name: str) -> Connection:
        connection = self._ask_gateway(gateway, "register", name=name)
        keep_alive(connection.sock)
        self._open.add(connection)
        return connection

    def _ask_gateway(self, gateway: str, purpose: str, **more: str) -> Connection:
        """Who has proved to be of the run need not tell a gateway which it is."""
        assert self.identity is not None
        hello = {"type": "hello", "purpose": purpose, "member": self.identity.member, **more}
        return dial(gateway, hello, self.security, HANDSHAKE_TIMEOUT)[0]

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
                    connection, registered = self._register(gateway, name), True
                except OSError:
                    time.sleep(1.0)

    def _answer(self, gateway: str, call: str) -> None:
        """Who calls is served like one that dialled this rank: from here on the gateway only copies."""
        with contextlib.suppress(OSError):  # the gateway, or the caller, is gone
            connection = self._ask_gateway(gateway, "answer", call=call)
            self._open.add(connection)
            line = Line(self.security)
            try:
                steps = receive_hello(line)
                hello = drive(connection.sock, steps, time.monotonic() + HANDSHAKE_TIMEOUT)
                connection.sock.settimeout(None)
            except OSError as error:
                if isinstance(error, Refused):
                    self._door.refuse(f"{gateway}: {error}")
                return connection.close()
            finally:
                self._open.discard(connection)
            self._arrived(line.connection(connection.sock), hello)

    def release(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.close()

    def close(self) -> None:
        self._closed = True
        self._door.close()
        for connection in list(self._open):
            self.release(connection)

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

    def _arrived(self, connection: Connection, hello: Message) -> None:
        self.attend(connection, partial(self._serve, connection, hello))

    def _serve(self, connection: Connection, hello: Message) -> None:
        connection.sock.settimeout(HANDSHAKE_TIMEOUT)
        if not self._closed and (handler := self._greet(connection, hello)):
            connection.sock.settimeout(None)
            handler(connection, hello)

    def _greet(self, connection: Connection, hello: Message) -> Handler | None:
        handler = self.handlers.get(str(hello.get("purpose")))
        if self.identity is None or handler is None:
            connection.send(refusal(NOT_READY))
        elif reason := self.identity.mismatch(hello):
            self._door.refuse(reason)
            connection.send(refusal(reason))
        else:
            connection.send(self.identity.hello("reply"))
            return handler
        return None
