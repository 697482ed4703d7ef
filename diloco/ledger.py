"""Who trains on which samples: leases on ranges of the endless, permuted sample order. Pure.

Every source of samples has an order of its own: `data`, which is common to all, and those that one region holds alone. Indices
below a source's cursor have been handed out. Always, over all sources: handed out = applied + dropped + rejected + skipped +
leased + returned (`pool`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Lease:
    """Samples [start, stop) of one member; those below `applied` are in a committed round."""

    id: int
    start: int
    stop: int
    applied: int
    done: int = 0
    """seq of the round that applied the last of it; 0: some are left."""
    source: str = ""
    """Empty: `data`; or REGION/NAME, what one region holds alone."""

    @property
    def left(self) -> int:
        return self.stop - self.applied


@dataclass(frozen=True)
class Returned:
    """Samples [start, stop) that `region` gave back unused; they go first to the region that had them."""

    region: str
    start: int
    stop: int
    source: str = ""


@dataclass(frozen=True)
class Ledger:
    cursor: int = 0
    """Of `data`."""
    own: Mapping[str, int] = field(default_factory=dict)
    """Source that one region holds alone -> its cursor."""
    next_id: int = 0
    applied: int = 0
    dropped: int = 0
    """Samples of committed rounds whose work `outer.merge=mix` threw away."""
    rejected: int = 0
    """Samples of contributions that had no weight in their round, because of their norm."""
    skipped: int = 0
    """Samples that a `rewind` with skip_data passed over."""
    pool: tuple[Returned, ...] = ()

    @property
    def handed(self) -> int:
        """Samples that were handed out."""
        return self.cursor + sum(self.own.values())

    def grant(self, region: str, samples: int, source: str = "") -> tuple[Ledger, tuple[Lease, ...]]:
        """Leases on `samples` samples of a source: the region's own returned ranges in order, then others', then fresh ones."""
        ledger, leases = self, []
        queue = sorted((r for r in self.pool if r.source == source), key=lambda r: (r.region != region, r.start))
        while samples > 0:
            if queue:
                back = queue.pop(0)
                taken, start = min(samples, back.stop - back.start), back.start
                rest = replace(back, start=start + taken)
                pool = tuple(r for r in ledger.pool if r != back) + ((rest,) if rest.start < rest.stop else ())
                ledger = replace(ledger, pool=pool)
            else:
                taken, start = samples, ledger._cursor_of(source)
                ledger = ledger._moved(source, start + taken)
            leases.append(Lease(ledger.next_id, start, start + taken, start, source=source))
            ledger = replace(ledger, next_id=ledger.next_id + 1)
            samples -= taken
        return ledger, tuple(leases)

    def _cursor_of(self, source: str) -> int:
        return self.own.get(source, 0) if source else self.cursor

    def _moved(self, source: str, cursor: int) -> Ledger:
        return replace(self, own={**self.own, source: cursor}) if source else replace(self, cursor=cursor)

    def give_back(self, region: str, leases: Iterable[Lease]) -> Ledger:
        """What is left of `leases` returns to the pool."""
        back = tuple(Returned(region, lease.applied, lease.stop, lease.source) for lease in leases if lease.left)
        return replace(self, pool=self.pool + back)

    @property
    def handled(self) -> int:
        """Samples that will not be trained on again."""
        return self.applied + self.dropped + self.rejected + self.skipped

    def apply(
        self, leases: tuple[Lease, ...], used: dict[int, int], seq: int, dropped: int = 0, rejected: bool = False
    ) -> tuple[Ledger, tuple[Lease, ...], int]:
        """Marks samples as applied by the round at `seq`, once. used: lease id -> index below which the contribution used
        its samples; dropped: how many of them count as dropped instead, if there are so many; rejected: all of them count
        as that. Returns the ledger, the leases, those that are used up among them, and how many samples were new."""
        done = tuple(_used(lease, used.get(lease.id, 0), seq) for lease in leases)
        count = sum(new.applied - old.applied for new, old in zip(done, leases, strict=True))
        if rejected:
            return replace(self, rejected=self.rejected + count), done, count
        lost = min(dropped, count)
        return replace(self, applied=self.applied + count - lost, dropped=self.dropped + lost), done, count


def _used(lease: Lease, upto: int, seq: int) -> Lease:
    if upto <= lease.applied:
        return lease
    return replace(lease, applied=upto, done=seq if upto == lease.stop else 0)


def still_wanted(leases: tuple[Lease, ...], oldest: int) -> tuple[Lease, ...]:
    """Without the used-up leases that no answer can name any more. oldest: the least base of all fragments. An answer names
    leases that had samples left when its snapshot was taken, and is valid while its fragment's base is older than that."""
    return tuple(lease for lease in leases if lease.left or lease.done > oldest)


class LeaseReader:
    """A member's own place in its leases of one source: which samples come next, and how far each lease is used. Not shared."""

    def __init__(self) -> None:
        self.used: dict[int, int] = {}
        self._leases: tuple[Lease, ...] = ()

    def update(self, leases: tuple[Lease, ...]) -> None:
        """Takes over what the fold grants; the place in leases already begun is kept."""
        self._leases = leases
        self.used = {x.id: max(x.applied, self.used.get(x.id, x.start)) for x in leases}

    def available(self) -> int:
        return sum(x.stop - self.used[x.id] for x in self._leases)

    def take(self, count: int) -> list[int]:
        """The next `count` sample indices. Raises ValueError if the leases hold fewer: wait for a round."""
        if count > self.available():
            raise ValueError(f"{count} samples asked of leases that hold {self.available()}")
        indices: list[int] = []
        for lease in self._leases:
            begin = self.used[lease.id]
            end = min(lease.stop, begin + count - len(indices))
            indices.extend(range(begin, end))
            self.used[lease.id] = end
        return indices

    @property
    def pending(self) -> int:
        """Samples that were taken and are in no committed round yet."""
        return sum(self.used[x.id] - x.applied for x in self._leases)

    def forget(self, claimed: Iterable[Iterable[int]] = ()) -> None:
        """The work on samples that are in no committed round is gone: they are taken again, but those that contributions
        in flight hold. claimed: what the answers said of these."""
        held = dict.fromkeys(self.used, 0)
        for lease, upto in map(tuple, claimed):
            held[lease] = max(held.get(lease, 0), upto)
        self.used = {x.id: max(x.applied, held[x.id]) for x in self._leases}

    def claims(self) -> list[list[int]]:
        """[[lease id, used up to]]: what an answer says of the samples behind it."""
        return [[x.id, self.used[x.id]] for x in self._leases if self.used[x.id] > x.applied]

    def ranges(self) -> list[list[int]]:
        """[[start, stop)] of the samples that were taken and are in no committed round yet."""
        return [[x.applied, self.used[x.id]] for x in self._leases if self.used[x.id] > x.applied]

    def resume(self, ranges: Iterable[Iterable[int]]) -> bool:
        """Marks what `ranges` said before a restart as taken. False, and nothing is marked, if these samples are not the
        first of the leases."""
        used, missing = {lease.id: lease.start for lease in self._leases}, 0
        for start, stop in sorted(map(tuple, ranges)):
            missing += stop - start
            for lease in self._leases:
                if start <= used[lease.id] < stop:
                    missing -= min(stop, lease.stop) - used[lease.id]
                    used[lease.id] = min(stop, lease.stop)
        if missing == 0:
            self.used = used
        return missing == 0
