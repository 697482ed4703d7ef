"""What a member knows of one fragment's round while it is under way. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic.events import Message
from elastic.proposal import Proposal


@dataclass
class Flight:
    """A fragment's round from the first sign of it until the journal decides."""

    epoch: int
    base: int
    due: bool = False
    asked: bool = False
    answer: Message | None = None
    best: Proposal | None = None
    number: int = 0
    answers: dict[str, Message] = field(default_factory=dict)
    started: tuple[Message, ...] = ()
    attempt: str = ""
    held: dict[str, dict[str, str]] = field(default_factory=dict)
    """attempt -> member -> digest of the result that it holds."""
    store: bool = False
    """The lowest member stores the result of `attempt` before it holds it."""
    stored: set[str] = field(default_factory=set)
    """Attempts whose results are stored."""
    waited: int = -1
    """Head for which the minority wait is over."""
    given_up: bool = False
    """`best` came to nothing, and no other proposal was heard of since."""
    without: set[str] = field(default_factory=set)
    """Members whose exchange stalled although they are connected: this round is proposed without them."""
    deaf: set[str] = field(default_factory=set)
    """Those of them whose next proposal is not heard."""

    @property
    def turn(self) -> str:
        """Names the newest proposal that this member has seen for this round."""
        return f"{self.epoch}.{self.base}.{self.number}"

    def entry(self, fragment: int, me: str) -> Message:
        """The journal entry of the attempt, whose result `me` holds."""
        assert self.best is not None
        answers = [{k: v for k, v in a.items() if k not in ("theta", "momentum")} for a in self.started]
        return {
            "kind": "round",
            "fragment": fragment,
            "epoch": self.epoch,
            "base": self.base,
            "head": self.best.head,
            "attempt": self.attempt,
            "answers": answers,
            "digest": self.held[self.attempt][me],
            "theta": self.started[0]["theta"],
            "momentum": self.started[0]["momentum"],
        }

    def held_message(self, me: str) -> Message:
        """Tells the other members of the attempt that `me` holds its result, and whether it is stored."""
        assert self.best is not None
        digest, stored = self.held[self.attempt][me], self.attempt in self.stored
        return self.best.message("held", attempt=self.attempt, digest=digest, stored=stored)

    def unanswered(self, me: str) -> tuple[Message, list[str]]:
        """What `me` has said last in this round, and those of whom it waits for a sign that they heard it."""
        assert self.best is not None
        members, held = list(self.best.members), self.held.get(self.attempt, {})
        if me in held:
            return self.held_message(me), [member for member in members if member not in held]
        if self.best.proposer != me:
            return {}, []
        if self.attempt:
            return self.best.message("start", answers=list(self.started)), members
        return self.best.message("propose"), [member for member in members if member not in self.answers]
