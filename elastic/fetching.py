"""A transfer of blocks from all members that have them at once."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from elastic.plan import rank_blocks
from elastic.ranges import Range, Schedule, Source, split
from elastic.recovery import NOTHING, STALL, Donor, Lines, Unavailable, answer, ask
from elastic.wire import NONSENSE, Connection

LEAST_ASKS, MOST_ASKS = 2, 64
AHEAD = 0.5
"""Seconds of answers that are asked for ahead, at the rate at which they come: a long round trip costs nothing then, and
there is little to wait for when a donor turns slow."""
TIDY = 0.05
"""Seconds that each connection gets to become free for the next transfer."""
BEHIND = 0.1
"""Seconds until a donor that has not merged the wanted round yet is asked again."""


class Forged(OSError):
    """A donor sent blocks that are not what they should be."""


@dataclass(frozen=True)
class Want:
    """Blocks [first, last) of a fragment of `blocks`, all as after round `base`."""

    fragment: int
    blocks: int
    first: int
    last: int
    base: int


@dataclass
class Pipeline:
    """What one connection was asked for and has not answered, in order; and how fast it answers."""

    asked: deque[Range] = field(default_factory=deque)
    _came: deque[float] = field(default_factory=lambda: deque(maxlen=8))

    def depth(self) -> int:
        """How many asks should be under way."""
        if len(self._came) < 2:
            return LEAST_ASKS
        each = (self._came[-1] - self._came[0]) / (len(self._came) - 1)
        return min(max(LEAST_ASKS, math.ceil(AHEAD / max(each, 1e-6))), MOST_ASKS)

    def answered(self) -> Range:
        self._came.append(time.monotonic())
        return self.asked.popleft()


class Transfer:
    """`wants` of a plane, from all `donors` at once, in ranges of at most `size` blocks.

    check: whether a range's bytes are what they should be, in any thread; place: puts them where they belong, one at a time
    and each range once. A donor that dies, stalls or sends something else is out, and what it owed is asked of the others;
    what has come stays. If a donor has a newer round in a fragment, no more of that is asked for.
    """

    def __init__(
        self,
        lines: Lines,
        donors: Sequence[Donor],
        plane: str,
        wants: Sequence[Want],
        size: int,
        check: Callable[[Range, bytearray], bool],
        place: Callable[[Range, bytearray], None],
        stall: float = STALL,
        patience: float = STALL,
    ) -> None:
        """Seconds: of silence after which a donor is given up, and that one may stay behind."""
        self.lines, self.donors, self.plane, self.stall = lines, donors, plane, stall
        self.check, self.place, self.patience = check, place, patience
        self.served: Counter[str] = Counter()
        """Member -> bytes that came from it, whether they were needed or not."""
        self.forgers: set[str] = set()
        self.reasons: dict[str, str] = {}
        """Member -> why it was given up."""
        self._bases = {want.fragment: want.base for want in wants}
        self._schedule = Schedule(_ranges(donors, wants, size))
        self._changed = threading.Condition()

    def run(self) -> list[Range]:
        """Returns what has not come because newer rounds did, in order. Raises Unavailable if donors ran out before."""
        connections: dict[Source, Connection] = {}
        threads = [
            threading.Thread(target=self._work, args=(source, connections), name="fetch", daemon=True)
            for source in self._schedule.alive
        ]
        for thread in threads:
            thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._schedule.over)
            missing, moved = self._schedule.missing, set(self._schedule.left)
        if missing:  # there will be more to ask for
            for thread in threads:
                thread.join(TIDY)
        for connection in list(connections.values()):  # what was asked twice is not waited for
            self.lines.node.release(connection)
        if not moved.issuperset(missing):
            reasons = "; ".join(self.reasons.values()) or "there is no other member"
            raise Unavailable(f"no member has all of {self.plane}: {reasons}")
        return missing

    def _work(self, source: Source, connections: dict[Source, Connection]) -> None:
        member, rank = source
        donor = next(donor for donor in self.donors if donor.member == member)
        try:
            connection = connections[source] = self.lines.take(donor, rank, self.stall)
            try:
                self._ask(source, connection)
            except BaseException:
                self.lines.node.release(connection)
                raise
            finally:
                del connections[source]
            self.lines.give(donor, rank, connection)
        except (OSError, *NONSENSE) as error:
            self._lose(source, error)

    def _ask(self, source: Source, connection: Connection) -> None:
        """Until there is nothing left to ask for."""
        pipeline, behind_since = Pipeline(), math.inf
        while self._fill(source, connection, pipeline):
            base, data = answer(connection)
            one = pipeline.answered()
            if data is not None:
                behind_since = math.inf
                self._take(source, one, data)
                continue
            behind_since = min(behind_since, time.monotonic())
            if base == NOTHING or time.monotonic() - behind_since > self.patience:
                raise Unavailable(f"{source[0]} does not have fragment {one.fragment}")
            self._refused(source, one, base)

    def _fill(self, source: Source, connection: Connection, pipeline: Pipeline) -> bool:
        """Keeps as many asks under way as should be; waits while there is none. False: there will be none."""
        while len(pipeline.asked) < pipeline.depth():
            with self._changed:
                one = self._schedule.claim(source, time.monotonic())
                if one is None and (pipeline.asked or self._schedule.over):
                    break
                if one is None:
                    self._changed.wait(0.1)  # somebody may turn out to be slow
                    continue
            pipeline.asked.append(one)
            ask(connection, self.plane, *one, base=self._bases[one.fragment])
        return bool(pipeline.asked)

    def _take(self, source: Source, one: Range, data: bytearray) -> None:
        if not self.check(one, data):
            raise Forged(f"{source[0]} sent blocks of fragment {one.fragment} that do not have their digests")
        with self._changed:
            self.served[source[0]] += len(data)
            if self._schedule.done(one):
                self.place(one, data)
            self._changed.notify_all()

    def _refused(self, source: Source, one: Range, base: int) -> None:
        """The donor has another base: a newer one, or it will soon have the one that is wanted."""
        with self._changed:
            if base > self._bases[one.fragment]:
                self._schedule.give_up(one.fragment)
            self._schedule.give_back(source, one)
            self._changed.notify_all()
        if base < self._bases[one.fragment]:
            time.sleep(BEHIND)

    def _lose(self, source: Source, error: Exception) -> None:
        with self._changed:
            if self._schedule.over:
                return  # its connection was closed because it is not needed any more
            self.reasons.setdefault(source[0], str(error))
            gone = {source}
            if isinstance(error, Forged):
                self.forgers.add(source[0])
                gone = {other for other in self._schedule.alive if other[0] == source[0]}
            for other in gone:
                self._schedule.lose(other)
            self._changed.notify_all()
        if isinstance(error, Forged):
            print(f"fetching: {error}: asking others", flush=True)


def _ranges(donors: Sequence[Donor], wants: Sequence[Want], size: int) -> dict[Range, frozenset[Source]]:
    worlds = [len(donor.endpoints) for donor in donors]
    return {
        one: frozenset(_source(donor, want.blocks, one) for donor in donors)
        for want in wants
        for one in split(want.fragment, want.blocks, want.first, want.last, worlds, size)
    }


def _source(donor: Donor, blocks: int, one: Range) -> Source:
    world = len(donor.endpoints)
    return donor.member, next(r for r in range(world) if one.last <= rank_blocks(blocks, r, world)[1])
