"""A listening port: one thread attends to all who have not proved yet that they belong here, and hands over who has.

A stranger costs a file descriptor and some KiB, for `HANDSHAKE_TIMEOUT` at most, however slowly he talks; there are at most
`STRANGERS` of them. One more sends off the oldest from the address that has the most: a flood pushes itself out.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from elastic.handshake import HANDSHAKE_TIMEOUT, Line, Refused, Steps, receive_hello
from elastic.security import Security
from elastic.wire import NONSENSE, Connection, Message, WireError

STRANGERS = 256
"""Fewer than the 1,024 files that a process may have open by default."""
SWEEP = 0.25
"""Seconds between two looks for who has had his time."""
LINGER = 1.0
"""Seconds that who was refused has to read why, and to close."""
SENTENCES = 100
"""Refusals that are printed, each once: strangers must not fill a disk."""

Arrived = Callable[[Connection, Message], None]


@dataclass(eq=False)
class Stranger:
    sock: socket.socket
    address: str
    deadline: float
    line: Line
    steps: Steps[Message]
    wanted: int = 0


class Door:
    """Listens on `host`:`port`; 0: any free one. Who has said hello is handed to `arrived` in a thread of its own, which
    answers and closes."""

    def __init__(self, host: str, port: int, security: Security, arrived: Arrived) -> None:
        self.security, self.arrived = security, arrived
        self.refusals = 0
        """Who was turned away, or sent no frame of ours."""
        self.refusal = ""
        """Why the last one was refused."""
        self.strangers: dict[Stranger, None] = {}
        """The oldest first."""
        self._said: set[str] = set()
        self._closed = False
        self._server = socket.create_server((host, port), backlog=512)
        self._server.setblocking(False)
        self.port = int(self._server.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._attend, name="door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def refuse(self, reason: str) -> None:
        """Counts one that was turned away and says so, each reason once."""
        self.refusals += 1
        self.refusal = reason
        if reason not in self._said and len(self._said) < SENTENCES:
            self._said.add(reason)
            print(f"refused a connection: {reason}", flush=True)

    def _attend(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(SWEEP):
                if key.data is None:
                    self._accept()
                else:
                    self._advance(key.data)
            now = time.monotonic()
            for late in [one for one in self.strangers if one.deadline < now]:
                self._interrupt(late, TimeoutError())
        for one in list(self.strangers):
            self._dismiss(one)
        self._selector.close()
        self._server.close()

    def _accept(self) -> None:
        try:
            sock, address = self._server.accept()
        except OSError:
            if not self._closed:
                time.sleep(0.05)  # too many files, or a peer that was gone again: it passes
            return
        if len(self.strangers) >= STRANGERS:
            self._make_room()
        sock.setblocking(False)
        line = Line(self.security)
        steps = receive_hello(line)
        one = Stranger(sock, address[0], time.monotonic() + HANDSHAKE_TIMEOUT, line, steps)
        self.strangers[one] = None
        self._selector.register(sock, selectors.EVENT_READ, one)
        self._step(one, lambda: next(steps))

    def _make_room(self) -> None:
        crowd = Counter(one.address for one in self.strangers).most_common(1)[0][0]
        self._dismiss(next(one for one in self.strangers if one.address == crowd))

    def _advance(self, one: Stranger) -> None:
        if one not in self.strangers:
            return  # sent off while this was waiting
        try:
            data = one.sock.recv(one.wanted)
        except BlockingIOError:
            return
        except OSError as error:
            self._interrupt(one, error)
            return
        if data:
            self._step(one, lambda: one.steps.send(data))
        else:
            self._interrupt(one, ConnectionResetError())

    def _interrupt(self, one: Stranger, error: OSError) -> None:
        self._step(one, lambda: one.steps.throw(error))

    def _step(self, one: Stranger, step: Callable[[], tuple[bytes, int]]) -> None:
        """Takes the steps up to the next one that has to wait."""
        try:
            out, one.wanted = step()
            while not one.wanted:
                self._send(one, out)
                out, one.wanted = one.steps.send(b"")
            self._send(one, out)
            if one.line.over and one.deadline > time.monotonic() + LINGER:
                one.deadline = time.monotonic() + LINGER
                one.sock.shutdown(socket.SHUT_WR)
        except StopIteration as end:
            self._welcome(one, end.value)
        except Refused as error:
            self._dismiss(one)
            self.refuse(f"{one.address}: {error}")
        except WireError:
            self._dismiss(one)
            self.refusals += 1
        except OSError:  # gone, or too slow; perhaps before it was told
            self._dismiss(one)
            if one.line.refused:
                self.refuse(f"{one.address}: {one.line.refused}")
        except NONSENSE as error:
            self._dismiss(one)
            self.refuse(f"{one.address}: {error}")

    def _send(self, one: Stranger, data: bytes) -> None:
        """What is said to a stranger fits into an empty socket buffer; who has filled his is dropped."""
        if data and one.sock.send(data) < len(data):
            raise BlockingIOError("it does not read")

    def _welcome(self, one: Stranger, hello: Message) -> None:
        self._forget(one)
        try:
            one.sock.setblocking(True)
            connection = one.line.connection(one.sock)
            threading.Thread(target=self.arrived, args=(connection, hello), name="node-peer", daemon=True).start()
        except (OSError, RuntimeError):  # gone already, or too many threads: that passes
            one.sock.close()

    def _dismiss(self, one: Stranger) -> None:
        self._forget(one)
        one.steps.close()
        one.sock.close()

    def _forget(self, one: Stranger) -> None:
        if one in self.strangers:
            del self.strangers[one]
            self._selector.unregister(one.sock)
