"""The coordinator's hand on the journal: a thread of its own, because a store may take seconds to answer, and signs of life and
the messages of rounds must not wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from elastic.events import View
from elastic.wire import Message

Answers = Sequence[Message]


@dataclass(frozen=True)
class Standing:
    """What the coordinator has to know of the state after an entry."""

    view: View
    endpoints: Mapping[str, str]
    """Where the members' rank 0 is; empty if it cannot be dialled."""
    data: Mapping[str, tuple[str, ...]]
    """The same of their ranks' exchanges."""
    weights: Callable[[int, Answers], list[float]]
    """Of these answers to a round of a fragment."""


class Ledger(Protocol):
    """The journal, as the coordinator needs it. All of it may raise OSError, and is called by one thread only."""

    def read(self) -> list[bytes]:
        """The new entries, each once."""
        ...

    def append(self, fields: Message) -> bool:
        """False: another entry was first, or it is not valid (any more)."""
        ...

    def standing(self) -> Standing:
        """After the last entry that was read. Does not ask the store."""
        ...

    def closing(self) -> Message | None:
        """The entry that ends the run, if it is due. Does not ask the store."""
        ...


class Hears(Protocol):
    """Called on the journal's thread."""

    def was_read(self, entries: list[bytes], standing: Standing, won: bool) -> None:
        """won: the last of them is this member's own."""
        ...

    def no_answer(self, fields: Message) -> None:
        """An append to which the store gave no answer: it is there or not, which only reading tells."""
        ...

    def broken(self, error: Exception) -> None:
        """A bug, or a journal that no correct member can have written."""
        ...


class JournalThread(threading.Thread):
    """Does one thing at a time, in the order that was asked for; what is asked for already is not asked for twice."""

    def __init__(self, ledger: Ledger, hears: Hears) -> None:
        super().__init__(name="journal", daemon=True)
        self.ledger, self.hears = ledger, hears
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._reading = False
        self._appending: set[str] = set()

    def ask_read(self) -> None:
        if not self._reading:
            self._reading = True
            self._jobs.put(self._read)

    def ask_append(self, fields: Message) -> None:
        """A round's entry, and then what is new."""
        if fields["attempt"] not in self._appending:
            self._appending.add(fields["attempt"])
            self._jobs.put(partial(self._append, fields))

    def close(self) -> None:
        """After what is under way, nothing more is done."""
        self._jobs.put(None)

    def run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job()
        except Exception as error:
            self.hears.broken(error)
            raise

    def _append(self, fields: Message) -> None:
        self._appending.discard(fields["attempt"])
        try:
            won = self.ledger.append(fields)
        except OSError as error:  # the store is away: training goes on, the commit is tried again
            print(f"journal: {error}; trying again", flush=True)
            return self.hears.no_answer(fields)
        self._read(won)

    def _read(self, won: bool = False) -> None:
        self._reading = False  # who asks from now on may mean an entry that this look misses
        entries: list[bytes] = []
        try:
            entries += self.ledger.read()
            if (closing := self.ledger.closing()) is not None:
                self.ledger.append(closing)
                entries += self.ledger.read()
        except OSError as error:
            print(f"journal: {error}; trying again", flush=True)
            if not entries:
                return  # what was read is read once: it is passed on, whatever fails next
        self.hears.was_read(entries, self.ledger.standing(), won)
