"""What goes into the round state machine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


# Events


@dataclass(frozen=True)
class View:
    """What the journal says, folded up to `seq`. The machine needs no more of it."""

    seq: int
    epoch: int
    bases: tuple[int, ...]
    members: tuple[str, ...]
    stopped: bool = False
    first: bool = True
    """The next round waits for start_regions."""
    rules: int = 0
    """The newest entry that changed what the weights of a round depend on: older proposals are void."""
    paused: bool = False
    """No round may be committed until an entry says otherwise."""


@dataclass(frozen=True)
class Due:
    """This member reached its boundary for `fragment`."""

    fragment: int
    base: int | None = None
    """The fragment's last round as the main loop knows it; the event is void if there was another since."""


@dataclass(frozen=True)
class Answered:
    """The main loop took the snapshot that an `Ask` asked for. answer: tokens, steps, norm, digests, leases ..."""

    fragment: int
    epoch: int
    base: int
    answer: Message


@dataclass(frozen=True)
class PeerSeen:
    """A control connection to `member` stands, and says which members `member` is connected to itself."""

    member: str
    sees: frozenset[str]


@dataclass(frozen=True)
class PeerGone:
    """The last control connection to `member` broke, or it said goodbye."""

    member: str


@dataclass(frozen=True)
class Received:
    sender: str
    message: Message


@dataclass(frozen=True)
class Exchanged:
    """All ranks of this region hold the whole result of `attempt`."""

    attempt: str
    digest: str


@dataclass(frozen=True)
class ExchangeFailed:
    attempt: str
    suspects: frozenset[str]


@dataclass(frozen=True)
class Alarm:
    """A timer that `SetAlarm` asked for."""

    name: str
    fragment: int
    attempt: str


Event = View | Due | Answered | PeerSeen | PeerGone | Received | Exchanged | ExchangeFailed | Alarm


# Actions


@dataclass(frozen=True)
class Send:
    member: str
    message: Message


@dataclass(frozen=True)
class Ask:
    """The main loop shall snapshot `fragment` at its next boundary and report `Answered`."""

    fragment: int
    epoch: int
    base: int


@dataclass(frozen=True)
class Exchange:
    attempt: str
    fragment: int
    epoch: int
    base: int
    answers: tuple[Message, ...]
    """In member order."""
    store: bool = True
    """The lowest member stores the result before it reports `Exchanged`."""


@dataclass(frozen=True)
class Cancel:
    attempt: str


@dataclass(frozen=True)
class Append:
    """Try to create this journal entry at the next seq; read the journal afterwards, whatever came of it."""

    fields: Message


@dataclass(frozen=True)
class Read:
    """Read the journal and report a `View`, also if nothing is new."""


@dataclass(frozen=True)
class SetAlarm:
    alarm: Alarm
    kind: str
    """jitter: a short random time; patience: longer than the lowest member needs to append; minority: longer than
    detection plus an exchange; resend: longer than an answer takes."""


@dataclass(frozen=True)
class Halt:
    """This member cannot go on; `reason` is one sentence."""

    reason: str


Action = Send | Ask | Exchange | Cancel | Append | Read | SetAlarm | Halt
