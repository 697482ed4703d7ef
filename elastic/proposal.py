"""A proposal of a round, the answers to it, and what messages about them must look like. Pure."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from typing import Any

from elastic.events import Message


@dataclass(frozen=True)
class Proposal:
    fragment: int
    epoch: int
    base: int
    head: int
    number: int
    proposer: str
    members: tuple[str, ...]

    def beats(self, other: Proposal | None) -> bool:
        """The highest number wins, then the lowest proposer."""
        return other is None or (-self.number, self.proposer) < (-other.number, other.proposer)

    def message(self, kind: str, **more: Any) -> Message:
        return {"type": kind, **self.__dict__, "members": list(self.members), **more}


def parse_proposal(message: Message) -> Proposal:
    """Raises KeyError, TypeError or ValueError on a malformed message."""
    numbers = {k: _integer(message[k]) for k in ("fragment", "epoch", "base", "head", "number")}
    return Proposal(**numbers, proposer=str(message["proposer"]), members=tuple(map(str, message["members"])))


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _count(value: Any) -> None:
    """Of 63 bits: it is multiplied, added and made a float."""
    if not 0 <= _integer(value) < 1 << 63:
        raise ValueError("a count is negative or of more than 63 bits")


def _norm(value: Any) -> None:
    """None: not finite, and its sender knows."""
    if value is not None and (type(value) not in (int, float) or not 0 <= value <= sys.float_info.max):
        raise ValueError("a norm is not a finite number, 0 or more")


def check(message: Message) -> None:
    """Raises KeyError, TypeError or ValueError on what no member sends. What passes is safe to keep and to handle."""
    kind = message["type"]
    _integer(message.get("head", -1))
    if kind in ("propose", "answer", "start", "held"):
        members = parse_proposal(message).members
        if not members or list(members) != sorted(set(members)):
            raise ValueError("a proposal's members are not a sorted set of some")
    for answer in message["answers"] if kind == "start" else [message["answer"]] if kind == "answer" else ():
        pairs = [number for lease, upto in answer["leases"] for number in (lease, upto)]
        for number in (answer["tokens"], *(answer.get(key, 0) for key in ("steps", "up", "down")), *pairs):
            _count(number)
        _norm(answer.get("norm", 0.0))
        if not all(isinstance(answer[key], str) for key in ("member", "theta", "momentum")):
            raise TypeError("an answer's member and digests are not strings")


def attempt_id(proposal: Proposal, answers: list[Message]) -> str:
    """The hash of the proposal and the list of answers: who computes the same id exchanges the same thing."""
    data = json.dumps([proposal.message("start"), answers], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(data.encode()).hexdigest()[:32]


def odd_ones(answers: list[Message], me: str) -> set[str]:
    """Members whose θ or momentum digest differs from the majority's; a tie goes to the side of `me`."""
    sides = {answer["member"]: (answer["theta"], answer["momentum"]) for answer in answers}
    votes = list(sides.values())
    majority = max(set(votes), key=lambda side: (votes.count(side), side == sides[me]))
    return {member for member, side in sides.items() if side != majority}
