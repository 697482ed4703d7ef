"""A member's place in the leases of all its sources: which samples come next, and how far each lease is used. Pure.

The sources take turns by their shares (`diloco.mixture`), counted from the member's start: so each has its share of the samples
of a start to within 1.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction

from diloco.ledger import Lease, LeaseReader
from diloco.mixture import Mixture

SOURCE = 1 << 48
"""A sample's id is its index in its source, plus SOURCE times the number of the source, which is 0 for `data`: an int64."""

Ranges = Mapping[str, list[list[int]]]


class Reader:
    """Not shared."""

    def __init__(self, shares: Mapping[str, Fraction]) -> None:
        """shares: source -> its share, `data` ("") first."""
        self.names = list(shares)
        self.mixture = Mixture(list(shares.values()))
        self.places = [LeaseReader() for _ in shares]
        self.turn = 0
        """Samples that were taken since the start."""

    def update(self, leases: tuple[Lease, ...]) -> None:
        """Takes over what the fold grants; the place in leases already begun is kept."""
        for name, place in zip(self.names, self.places, strict=True):
            place.update(tuple(lease for lease in leases if lease.source == name))

    def available(self) -> int:
        """Samples that can be taken until a source has none whose turn it is."""
        left, done = [place.available() for place in self.places], self.mixture.counts(self.turn)
        low, high = 0, sum(left)
        while low < high:
            middle = (low + high + 1) // 2
            counts = zip(self.mixture.counts(self.turn + middle), done, left, strict=True)
            fits = all(count - before <= here for count, before, here in counts)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def take(self, count: int) -> list[int]:
        """The ids of the next `count` samples. Raises ValueError if the leases hold fewer: wait for a round."""
        if count > self.available():
            raise ValueError(f"{count} samples asked of leases that hold {self.available()}")
        turns = [self.mixture.locate(i)[0] for i in range(self.turn, self.turn + count)]
        taken = [iter(place.take(turns.count(k))) for k, place in enumerate(self.places)]
        self.turn += count
        return [k * SOURCE + next(taken[k]) for k in turns]

    @property
    def pending(self) -> int:
        """Samples that were taken and are in no committed round yet."""
        return sum(place.pending for place in self.places)

    @property
    def pending_data(self) -> int:
        """Those of them that are of `data`."""
        return self.places[0].pending

    def forget(self, claimed: Iterable[Iterable[int]] = ()) -> None:
        """As LeaseReader's."""
        claims = [list(claim) for claim in claimed]
        for place in self.places:
            place.forget(claims)

    def claims(self) -> list[list[int]]:
        """[[lease id, used up to]]: what an answer says of the samples behind it."""
        return [claim for place in self.places for claim in place.claims()]

    def ranges(self) -> Ranges:
        """Source -> [[start, stop)] of the samples that were taken and are in no committed round yet."""
        return {name: place.ranges() for name, place in zip(self.names, self.places, strict=True)}

    def resume(self, ranges: Ranges) -> bool:
        """Marks what `ranges` said before a restart as taken. False, and nothing is marked, if these samples are not the
        first of the leases of their sources."""
        before = [place.used for place in self.places]
        mine = dict(zip(self.names, self.places, strict=True))
        if all(name in mine and mine[name].resume(there) for name, there in ranges.items() if there):
            return True
        for place, used in zip(self.places, before, strict=True):
            place.used = used
        return False
