"""What an exchange is about: who takes part, with what, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from torch import Tensor

from elastic.events import Message

Key = tuple[int, int, int]
"""(epoch, fragment, base): what a contribution was made for."""


class Contribution(Protocol):
    """A rank's contribution to a round."""

    def read(self, first: int, last: int) -> Tensor:
        """The encoded bytes (uint8) of the blocks [first, last): encoded when first asked for, by any thread, the same
        ever after. Raises FloatingPointError on what must not leave the region."""
        ...

    def shared(self) -> tuple[Message, list[Tensor]]:
        """What another process of this rank makes the same contribution of: JSON, and tensors that it has in common with
        this one, the encoded bytes among them."""
        ...

    def filled(self) -> None:
        """The other process has encoded all of it."""
        ...


class Arithmetic(Protocol):
    """What the exchange needs to know of fragments and codecs."""

    @property
    def gathers(self) -> bool:
        """Contributions are not reduced: the result is all of them."""
        ...

    def blocks(self, fragment: int) -> int: ...
    def size(self, fragment: int, first: int, last: int) -> int:
        """Encoded bytes of the blocks [first, last)."""
        ...

    def result_size(self, fragment: int, first: int, last: int, members: int) -> int:
        """The same of a result."""
        ...

    def reduce(
        self, fragment: int, first: int, last: int, parts: Sequence[Tensor], weights: Sequence[float]
    ) -> tuple[Tensor, list[float]]:
        """The result for these blocks from the members' parts (uint8), in the order given, and the sum of the squares of the
        numbers in each part. Raises NotFinite."""
        ...

    def digests(self, fragment: int, first: int, last: int, data: Tensor, members: int) -> bytes:
        """32 bytes a block of a result."""
        ...


@dataclass(frozen=True)
class Party:
    """A member of an attempt: its weight, and the endpoints of its ranks."""

    member: str
    endpoints: tuple[str, ...]
    weight: float
    norm: float | None = None
    """Of its contribution, as it announced it; None: whatever it sends is taken."""


@dataclass(frozen=True)
class Order:
    """What to exchange; the same for all members of the attempt but for `me` and `store`."""

    attempt: str
    key: Key
    parties: tuple[Party, ...]
    shares: tuple[int, ...]
    """Of the blocks that each member reduces: `elastic.plan.ownership`."""
    me: int
    store: bool = True
    """The lowest member stores the result before it counts as held."""

    def message(self) -> Message:
        parties = [[p.member, list(p.endpoints), p.weight, p.norm] for p in self.parties]
        fields = {
            "key": list(self.key),
            "parties": parties,
            "shares": list(self.shares),
            "me": self.me,
            "store": self.store,
        }
        return {"type": "start", "attempt": self.attempt, **fields}


def parse_order(message: Message) -> Order:
    epoch, fragment, base = message["key"]
    parties = tuple(Party(m, tuple(e), float(w), norm) for m, e, w, norm in message["parties"])
    key, shares = (epoch, fragment, base), tuple(message["shares"])
    return Order(message["attempt"], key, parties, shares, message["me"], message["store"])


@dataclass
class Outcome:
    """How an attempt ended at this rank. digests: of the result's blocks in this rank's slice, None if it failed."""

    attempt: str
    digests: bytes | None
    suspects: frozenset[str] = frozenset()
    reason: str = ""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    """From the start to the whole result."""
    up: float = 0.0
    down: float = 0.0
    """The rates, bytes/s, that this rank's links have been seen to carry; 0: not known."""

    def message(self) -> Message:
        """Without the digests, which are long."""
        return {**asdict(replace(self, digests=None)), "suspects": sorted(self.suspects)}


def parse_outcome(message: Message, digests: bytes | None) -> Outcome:
    return Outcome(**{**message, "suspects": frozenset(message["suspects"]), "digests": digests})
