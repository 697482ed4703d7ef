"""`python -m elastic.gateway --bind 0.0.0.0:29600 --tls DIR`: one public port for ranks that have no public address.

Ranks dial out to it and register a name (`elastic.gateway=HOST:PORT`). Who dials `HOST:PORT/NAME` is put through: the
gateway calls that rank on its registration, the rank dials out once more, and the gateway copies bytes between the two.
Nothing else in the code knows; a region needs no open port at all.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable, Sequence

from elastic.door import Door
from elastic.handshake import HANDSHAKE_TIMEOUT, refusal
from elastic.security import OPEN, Security
from elastic.service import serve
from elastic.tcp import keep_alive
from elastic.tunnel import WELCOME, join
from elastic.wire import NONSENSE, Connection, Message


class Gateway:
    """Listens on `host`:`port`; 0: any free one. It trusts certificates or the run secret, and sees nothing of what callers
    and ranks then say under TLS."""

    def __init__(self, host: str, port: int, security: Security = OPEN) -> None:
        self._ranks: dict[str, Connection] = {}
        self._calls: dict[str, tuple[threading.Event, list[Connection]]] = {}
        self._lock = threading.Lock()
        self._door = Door(host, port, security, self._arrived)
        self.endpoint = f"{host}:{self._door.port}"

    def close(self) -> None:
        self._door.close()

    def _arrived(self, connection: Connection, hello: Message) -> None:
        try:
            keep_alive(connection.sock)
            if hello.get("purpose") == "register":
                self._register(connection, str(hello["name"]), str(hello.get("member")))
            elif hello.get("purpose") == "answer":
                self._answer(connection, str(hello["call"]))
                return  # the caller's thread has it now
            else:
                self._put_through(connection, hello)
        except (OSError, *NONSENSE):
            pass  # whoever it was notices
        connection.close()

    def _register(self, connection: Connection, name: str, member: str) -> None:
        """Holds a rank's registration until it hangs up."""
        if not name.startswith(f"{member}."):  # a member has proved who it is, as far as that is proved here
            connection.send(refusal(f"{member[:100]} may not be called {name[:100]}"))
            return
        with self._lock:
            self._ranks[name] = connection
        try:
            connection.send(WELCOME)
            connection.receive()  # it says nothing more: this ends with the connection
        finally:
            with self._lock:
                if self._ranks.get(name) is connection:
                    del self._ranks[name]

    def _answer(self, connection: Connection, call: str) -> None:
        with self._lock:
            called, answers = self._calls[call]
        connection.send(WELCOME)
        answers.append(connection)
        called.set()

    def _put_through(self, caller: Connection, hello: Message) -> None:
        name = str(hello.get("to"))
        with self._lock:
            rank = self._ranks.get(name)
        if rank is None:
            caller.send(refusal(f"no rank {name[:100]} is registered at this gateway"))
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
        caller.send(WELCOME)
        join(Connection(caller.sock), Connection(answers[0].sock))


def main(argv: Sequence[str] | None = None) -> int:
    def open_at(host: str, port: int, security: Security) -> tuple[str, Callable[[], None]]:
        gateway = Gateway(host, port, security)
        return gateway.endpoint, gateway.close

    return serve("gateway", __doc__, "0.0.0.0:29600", open_at, argv)


if __name__ == "__main__":
    sys.exit(main())
