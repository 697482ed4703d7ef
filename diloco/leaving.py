"""How a region leaves: asked to by a signal, at any time since its start; and what it says to the others."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diloco.control import Control, Order
from diloco.errors import ConfigError
from diloco.fold import JournalError
from diloco.journal import Journal

if TYPE_CHECKING:
    from diloco.trainer import Trainer


class Signals:
    """SIGTERM, and Ctrl-C once the region is a member: it leaves before the next inner step. A further Ctrl-C exits at once; a
    further SIGTERM changes nothing, for Slurm sends it to every process of a job, and torchrun passes its own on. Rank 0
    decides: where others hear it first, or alone, they go on until it ends. They are heard by a thread of its own: Python runs
    handlers in the main thread, which may be inside a call that does not end."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.trainer: Trainer | None = None
        self._asked = self._joined = False
        heard, self._pipe = socket.socketpair()
        self._pipe.setblocking(False)
        signal.set_wakeup_fd(self._pipe.fileno())  # the interpreter writes the numbers there at once
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
        signal.signal(signal.SIGTERM, _heard_elsewhere)

    @contextmanager
    def excused(self) -> Iterator[None]:
        """A rank that was asked to leave, too, does not fail because rank 0 is gone before the region was a member; and one
        that found a wrong setting leaves the word to rank 0: torchrun's SIGTERM ends it while it waits to say it too."""
        try:
            yield
        except ConfigError:
            if self.rank != 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                if self._asked:
                    signal.raise_signal(signal.SIGTERM)
            raise
        except RuntimeError as error:
            if not self._asked or self._joined or self.rank == 0:
                raise
            print(f"rank {self.rank}: asked to leave, ends with its region ({str(error).splitlines()[0]})", flush=True)

    def joined(self) -> None:
        self._joined = True
        signal.signal(signal.SIGINT, _heard_elsewhere)

    def _listen(self, heard: socket.socket) -> None:
        while number := heard.recv(1):
            if signal.getsignal(number[0]) is _heard_elsewhere:
                self._handle(number[0])
            elif number[0] == signal.SIGTERM:  # it came just before its handler was taken away
                os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int) -> None:
        self._asked = True
        if self.rank != 0:
            return
        control, reason = self._control(), f"asked to leave ({signal.Signals(number).name})"
        if control is None:
            _say(f"{reason} before this region was a member")
            os._exit(0)  # not an error: torchrun would start it again. Not sys.exit: see diloco.train.leave
        if control.leaving:
            if number == signal.SIGINT:
                os._exit(128 + number)  # nothing may delay it
            return
        control.leaving = reason
        _say(f"{control.member}: {reason}, does so after this step; Ctrl-C exits at once")

    def _control(self) -> Control | None:
        links = getattr(self.trainer, "links", None)  # not there before it is connected
        return None if links is None else links.control


def _heard_elsewhere(number: int, frame: object) -> None:
    """A handler that does nothing."""


def _say(line: str) -> None:
    """Not print, whose lock the main thread may hold for ever."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def depart(trainer: Trainer) -> None:
    """Says goodbye to the peers: nobody waits for what this region has still to upload. A second time changes nothing."""
    links = getattr(trainer, "links", None)  # not there before it is connected
    if links is not None and links.membership is not None:
        assert links.coordinator is not None  # it comes before it
        links.membership.close()
        links.coordinator.close()


def record_leave(trainer: Trainer) -> None:
    """Says so in the journal, unless the run has stopped, or it has been said."""
    links = getattr(trainer, "links", None)
    if links is None or links.membership is None:
        return
    assert links.journal is not None
    try:
        journal = Journal(links.store)  # of its own: the coordinator's thread may still be waiting for the store
        journal.state = links.journal.state
        _say_leave(journal, links.member)
    except (OSError, JournalError) as error:  # the others know from the goodbye; the entry only returns leases sooner
        print(f"{links.member}: its `leave` is not in the journal: {error}", flush=True)


def farewell(trainer: Trainer, order: Order) -> None:
    """Rank 0's last line: why the region ends, and after how much."""
    links = getattr(trainer, "links", None)
    if links is not None and links.coordinator is not None:
        print(
            f"{links.member}: {order.end} · {trainer.state.rounds} rounds · {trainer.state.tokens:,} tokens", flush=True
        )
    elif not order.clean and trainer.region.rank == 0:
        print(f"{trainer.cfg.region.name}: {order.end}", flush=True)  # it did not get as far as joining


def _say_leave(journal: Journal, member: str) -> None:
    for _ in range(10):  # somebody else's entry may be first
        journal.read()
        if journal.state is None or journal.state.stopped is not None or member not in journal.state.members:
            return
        if journal.append({"kind": "leave", "member": member}):
            return
