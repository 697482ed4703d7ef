"""Whether the main loop still comes back. Its threads go on when it hangs (a collective that never ends, a device or a file
system that does not answer): heartbeats and control connections would say for ever that the region is well, and the others
would wait for its contribution."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic.coordinator import Coordinator

STEP, SNAPSHOT, ENTRIES = "an inner step", "a snapshot", "merging"
PATIENCE = 120.0
"""Seconds for what the loop has not done before, such as its first step, and for entries: a merge may evaluate and save."""
TIMES = 4
"""So many times longer than usual may anything take."""
FADE = 0.9
"""What remains of the longest time at each later one: a first step that compiles is forgotten after some dozens."""


class Pulse:
    """When the main loop left for what, and how long that takes as a rule. timeout: the least that it may take."""

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout, self.clock = timeout, clock
        self._doing, self._since = "the start", clock()
        self._usual: dict[str, float] = {}
        self._turn = threading.Condition()

    def back(self) -> None:
        """The loop asks for an order."""
        now = self.clock()
        with self._turn:
            took = min(now - self._since, self.limit(self._doing))  # after a hang the next one is to be noticed, too
            self._usual[self._doing] = max(took, FADE * self._usual.get(self._doing, 0.0))
            self._doing, self._since = "", now
            self._turn.notify_all()

    def out(self, doing: str) -> None:
        """It has its order. doing: the kind of work, in words."""
        with self._turn:
            self._doing, self._since = doing, self.clock()

    def limit(self, doing: str) -> float:
        """Seconds that this kind of work may take."""
        usual = self._usual.get(doing)
        least = PATIENCE if doing == ENTRIES or (doing and usual is None) else self.timeout
        return max(least, TIMES * (usual or 0.0))

    def late(self) -> str:
        """What the loop does not come back from, and for how long it has not; empty while all is well."""
        with self._turn:
            seconds, limit = self.clock() - self._since, self.limit(self._doing)
        return f"{self._doing or 'waiting'} for {seconds:.1f} s, {limit:.1f} s at most" if seconds > limit else ""

    def wait(self) -> None:
        """Until the loop is back."""
        with self._turn:
            since = self._since
            self._turn.wait_for(lambda: self._since != since)


def step_aside(coordinator: Coordinator, pulse: Pulse) -> None:
    """On the coordinator's thread: if the main loop hangs, says goodbye to the other regions, lets no new connection come to
    be and does nothing until it is back. For them the region has left; it connects again and contributes all its work."""
    if not (late := pulse.late()):
        return
    me, handlers = coordinator.machine.me, coordinator.node.handlers
    print(f"{me}: its main loop hangs ({late}): the other regions go on without it", flush=True)
    serve = handlers.pop("control")
    coordinator.part()
    pulse.wait()
    handlers["control"] = serve
    print(f"{me}: its main loop is back, and so is the region", flush=True)
