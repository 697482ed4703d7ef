"""The round state machine of one member: events in, actions out. Pure: no socket, no clock, no store.

A round of a fragment goes: propose - answer - start - exchange - held - append. Safety rests on the journal alone (one
entry per seq, valid against the entries before it); everything here serves progress. `docs/protocol.md` has the rules.
"""

from __future__ import annotations

from collections.abc import Iterator

from elastic.events import (
    Action,
    Alarm,
    Answered,
    Append,
    Ask,
    Cancel,
    Due,
    Event,
    Exchange,
    Exchanged,
    ExchangeFailed,
    Halt,
    Message,
    PeerGone,
    PeerSeen,
    Read,
    Received,
    Send,
    SetAlarm,
    View,
)
from elastic.flight import Flight
from elastic.proposal import Proposal, attempt_id, check, odd_ones, parse_proposal

AHEAD = 1000
"""Messages kept until the entries that they are about are read."""


class Rounds:
    """handle(event) -> actions. One instance per member, driven by one thread."""

    def __init__(self, me: str, start_regions: int = 1, min_regions: int = 1, durable: bool = True) -> None:
        self.me = me
        self.durable = durable
        """Every result is stored before it counts as held, not only a minority's."""
        self.start_regions = start_regions
        self.min_regions = min_regions
        self.view: View | None = None
        self.peers: dict[str, frozenset[str]] = {}
        self.flights: dict[int, Flight] = {}
        self.ahead: list[tuple[str, Message]] = []
        """Messages about entries that are not folded yet."""

    def handle(self, event: Event) -> list[Action]:
        match event:
            case View():
                return list(self._folded(event))
            case Due(fragment, base):
                return list(self._due(fragment, base))
            case Answered():
                return list(self._answered(event))
            case PeerSeen(member, sees):
                self.peers[member] = sees
                return list(self._propose_all())
            case PeerGone(member):
                self.peers.pop(member, None)
                self.ahead = [(sender, message) for sender, message in self.ahead if sender != member]
                return list(self._gone(member))
            case Received(sender, message):
                return list(self._received(sender, message))
            case Exchanged(attempt, digest):
                return list(self._exchanged(attempt, digest))
            case ExchangeFailed(attempt, suspects):
                return list(self._give_up_attempt(attempt, suspects))
            case Alarm():
                return list(self._alarm(event))

    def flight(self, fragment: int) -> Flight:
        assert self.view is not None
        key = Flight(self.view.epoch, self.view.bases[fragment])
        return self.flights.setdefault(fragment, key)

    # The journal moved

    def _folded(self, view: View) -> Iterator[Action]:
        moved = self.view is None or view.seq > self.view.seq
        self.view = view
        for fragment, flight in list(self.flights.items()):
            if view.stopped or (flight.epoch, flight.base) != (view.epoch, view.bases[fragment]):
                if flight.attempt:
                    yield Cancel(flight.attempt)
                del self.flights[fragment]
            elif moved and flight.best is not None and not self._current(flight.best):
                yield from self._give_up(flight)  # held or not, its entry would not be valid any more
        waiting = [(sender, message) for sender, message in self.ahead if message["head"] <= view.seq]
        self.ahead = [(sender, message) for sender, message in self.ahead if message["head"] > view.seq]
        for sender, message in waiting:
            yield from self._received(sender, message)
        if moved:  # where the head is the one that refused the entry, trying again would spin
            for fragment, flight in self.flights.items():
                yield from self._try_append(fragment, flight)
        yield from self._propose_all()

    def _current(self, proposal: Proposal) -> bool:
        """Its members are still the run's, and so are the rules that it goes by."""
        view = self.view
        return view is not None and set(proposal.members) <= set(view.members) and view.rules <= proposal.head

    # Proposing

    def _due(self, fragment: int, base: int | None) -> Iterator[Action]:
        flight = self.flight(fragment)
        if base is None or base == flight.base:
            flight.due = True
            yield from self._propose(fragment)

    def _propose_all(self) -> Iterator[Action]:
        for fragment in list(self.flights):
            yield from self._propose(fragment)

    def wanted(self) -> int:
        """How many members a round needs."""
        return self.start_regions if self.view is None or self.view.first else self.min_regions

    def connected(self) -> tuple[str, ...]:
        """Current members that this one and they all see: whom a proposal may name."""
        assert self.view is not None
        current = set(self.view.members)
        names = [self.me] if self.me in current else []
        for peer in sorted(self.peers):
            if (
                peer in current
                and all(n == self.me or n in self.peers[peer] for n in names)
                and self.me in self.peers[peer]
            ):
                names.append(peer)
        return tuple(sorted(names))

    def _propose(self, fragment: int) -> Iterator[Action]:
        view, flight = self.view, self.flights.get(fragment)
        if view is None or view.stopped or view.paused or flight is None or not flight.due or flight.best:
            return
        connected = self.connected()
        members = tuple(member for member in connected if member not in flight.without)
        few = len(members) < self.wanted() or self._minority(members)
        if few and not self._minority(connected):
            members = connected  # better with them than not at all
        if self.me not in members or len(members) < self.wanted():
            return
        if self._minority(members) and flight.waited != view.seq:
            yield SetAlarm(Alarm("minority", fragment, str(view.seq)), "minority")
            return
        proposal = Proposal(fragment, flight.epoch, flight.base, view.seq, flight.number + 1, self.me, members)
        for member in members:
            if member != self.me:
                yield Send(member, proposal.message("propose"))
        yield from self._adopt(proposal)
        yield self._resend_later(fragment, flight)

    def _minority(self, members: tuple[str, ...]) -> bool:
        """Fewer than half of the run's."""
        return self.view is not None and 2 * len(members) < len(self.view.members)

    def _adopt(self, proposal: Proposal) -> Iterator[Action]:
        flight = self.flight(proposal.fragment)
        if flight.attempt:
            yield Cancel(flight.attempt)
        flight.best, flight.number, flight.given_up = proposal, proposal.number, False
        flight.answers, flight.started, flight.attempt = {}, (), ""
        if flight.answer is not None:
            yield from self._send_answer(proposal, flight.answer)
        elif not flight.asked:
            flight.asked = True
            yield Ask(proposal.fragment, flight.epoch, flight.base)

    # Answering

    def _answered(self, event: Answered) -> Iterator[Action]:
        flight = self.flights.get(event.fragment)
        if flight is None or (flight.epoch, flight.base) != (event.epoch, event.base):
            return
        flight.answer = {**event.answer, "member": self.me}
        if flight.best is not None:
            yield from self._send_answer(flight.best, flight.answer)

    def _send_answer(self, proposal: Proposal, answer: Message) -> Iterator[Action]:
        message = proposal.message("answer", answer=answer)
        if proposal.proposer == self.me:
            yield from self._collect(self.me, message)
        else:
            yield Send(proposal.proposer, message)

    def _collect(self, sender: str, message: Message) -> Iterator[Action]:
        proposal = parse_proposal(message)
        flight = self.flights.get(proposal.fragment)
        if flight is None or flight.best != proposal or proposal.proposer != self.me or flight.attempt:
            return
        if sender not in proposal.members:
            return
        flight.answers[sender] = {**message["answer"], "member": sender}
        if set(flight.answers) != set(proposal.members):
            return
        answers = [flight.answers[member] for member in proposal.members]
        odd = odd_ones(answers, self.me)
        if odd:
            for member in odd:
                yield from self._tell(member, {"type": "odd", "fragment": proposal.fragment, "base": proposal.base})
            yield from self._repropose(proposal.fragment, flight, without=odd)
            return
        for member in proposal.members:
            yield from self._tell(member, proposal.message("start", answers=answers))

    def _repropose(self, fragment: int, flight: Flight, without: set[str]) -> Iterator[Action]:
        for member in without:
            self.peers.pop(member, None)
        flight.best = None
        yield from self._propose(fragment)

    def _tell(self, member: str, message: Message) -> Iterator[Action]:
        if member == self.me:
            yield from self._received(self.me, message)
        else:
            yield Send(member, message)

    # Messages

    def _received(self, sender: str, message: Message) -> Iterator[Action]:
        check(message)
        if self.view is None or message.get("head", -1) > self.view.seq:
            self.ahead = [*self.ahead[-AHEAD:], (sender, message)]
            yield Read()
            return
        match message.get("type"):
            case "propose":
                yield from self._proposed(sender, parse_proposal(message))
            case "answer":
                yield from self._collect(sender, message)
            case "start":
                yield from self._start(message)
            case "held":
                yield from self._held(sender, message)
            case "odd":
                yield Halt(
                    f"this region's parameters differ from the other regions' at entry {message['base']}: "
                    "restart it, and it fetches them anew"
                )

    def _proposed(self, sender: str, proposal: Proposal) -> Iterator[Action]:
        view = self.view
        assert view is not None
        if proposal.proposer != sender or not 0 <= proposal.fragment < len(view.bases) or view.stopped:
            return
        if (proposal.epoch, proposal.base) != (view.epoch, view.bases[proposal.fragment]) or not self._current(
            proposal
        ):
            yield Send(sender, {"type": "head", "head": view.seq})
            return
        if self.me not in proposal.members:
            return
        flight = self.flight(proposal.fragment)
        if sender in flight.deaf:
            # Who stalled would propose itself again. Unheard once only: members who blame each other must not starve.
            flight.deaf.discard(sender)
            flight.number = max(flight.number, proposal.number)
            yield from self._give_up(flight)
            return
        if proposal == flight.best and flight.answer is not None:
            yield from self._send_answer(proposal, flight.answer)
        elif proposal.beats(flight.best) and proposal.number >= flight.number:
            yield from self._adopt(proposal)

    def _start(self, message: Message) -> Iterator[Action]:
        proposal, answers = parse_proposal(message), list(message["answers"])
        flight = self.flights.get(proposal.fragment)
        if flight is None or flight.best != proposal or flight.attempt or flight.answer not in answers:
            return
        if flight.given_up or not self._current(proposal):  # given up: said twice, its exchange is over here
            return
        if tuple(answer["member"] for answer in answers) != proposal.members:
            return
        flight.attempt, flight.started = attempt_id(proposal, answers), tuple(answers)
        flight.store = self.durable or self._minority(proposal.members)
        yield Exchange(flight.attempt, proposal.fragment, flight.epoch, flight.base, flight.started, flight.store)

    # Holding and committing

    def _exchanged(self, attempt: str, digest: str) -> Iterator[Action]:
        for fragment, flight in self.flights.items():
            if flight.attempt == attempt and flight.best is not None:
                flight.held.setdefault(attempt, {})[self.me] = digest
                if flight.store and self.me == flight.best.members[0]:
                    flight.stored.add(attempt)
                message = flight.held_message(self.me)
                yield from (Send(member, message) for member in flight.best.members if member != self.me)
                yield self._resend_later(fragment, flight)
                yield from self._try_append(fragment, flight, first=True)
                return

    def _held(self, sender: str, message: Message) -> Iterator[Action]:
        flight = self.flights.get(int(message["fragment"]))
        if flight is None or (flight.epoch, flight.base) != (message["epoch"], message["base"]):
            return
        flight.held.setdefault(str(message["attempt"]), {})[sender] = str(message["digest"])
        if message.get("stored") is True and sender == message["members"][0]:
            flight.stored.add(str(message["attempt"]))
        yield from self._try_append(int(message["fragment"]), flight, first=True)

    def complete(self, flight: Flight) -> bool:
        """All members of the attempt, this one included, hold its whole result."""
        held = flight.held.get(flight.attempt, {})
        return flight.best is not None and set(flight.best.members) <= set(held)

    def _try_append(self, fragment: int, flight: Flight, first: bool = False) -> Iterator[Action]:
        """The lowest member appends, and again at each new head; the others when their patience ends."""
        if not self.complete(flight):
            return
        assert flight.best is not None and self.view is not None
        held = flight.held[flight.attempt]
        if len({held[member] for member in flight.best.members}) > 1:
            yield Halt(
                f"the members hold different results of fragment {fragment}: this is a bug, nothing was committed"
            )
        elif self._minority(flight.best.members) and flight.waited != self.view.seq:
            if self._minority(self.connected()):
                yield SetAlarm(Alarm("minority", fragment, str(self.view.seq)), "minority")
            else:  # more are here by now, whose entries would make it wait for ever
                yield from self._give_up(flight)
        elif self.me == flight.best.members[0]:
            yield from self._append(fragment, flight)
        elif first:
            yield SetAlarm(Alarm("append", fragment, flight.attempt), "patience")

    def _append(self, fragment: int, flight: Flight) -> Iterator[Action]:
        assert flight.best is not None and self.view is not None
        if self.view.paused:
            return
        if self._minority(flight.best.members):
            if flight.attempt not in flight.stored:  # members joined since: the others could not get its bits
                yield from self._give_up(flight)
                return
            if flight.waited != self.view.seq:
                return
        yield Append(flight.entry(fragment, self.me))

    # Giving up

    def _gone(self, member: str) -> Iterator[Action]:
        for flight in list(self.flights.values()):
            if flight.best is not None and member in flight.best.members and not self.complete(flight):
                yield from self._give_up(flight)

    def _give_up_attempt(self, attempt: str, suspects: frozenset[str]) -> Iterator[Action]:
        for flight in list(self.flights.values()):
            if flight.attempt == attempt and not self.complete(flight):
                flight.without |= suspects - {self.me}
                flight.deaf |= suspects - {self.me}
                yield from self._give_up(flight)

    def _give_up(self, flight: Flight) -> Iterator[Action]:
        """Looks at the journal first; only then proposes anew with the snapshot it still has: soon if it is the lowest of who is
        there, else after some jitter, lest proposals cross."""
        fragment = next(f for f, x in self.flights.items() if x is flight)
        if flight.attempt:
            yield Cancel(flight.attempt)
        flight.attempt, flight.started, flight.answers, flight.due = "", (), {}, True
        flight.given_up = True
        yield Read()
        lowest = self.view is not None and self.connected()[:1] == (self.me,)
        yield SetAlarm(Alarm("again", fragment, flight.turn), "soon" if lowest else "jitter")

    def _alarm(self, alarm: Alarm) -> Iterator[Action]:
        flight = self.flights.get(alarm.fragment)
        if flight is None or self.view is None:
            return
        if alarm.name == "again" and alarm.attempt == flight.turn and flight.given_up:
            flight.best = None
            yield from self._propose(alarm.fragment)
        elif alarm.name == "append" and alarm.attempt == flight.attempt and self.complete(flight):
            yield from self._append(alarm.fragment, flight)
            yield SetAlarm(alarm, "patience")
        elif alarm.name == "minority" and alarm.attempt == str(self.view.seq):
            flight.waited = self.view.seq
            yield from self._try_append(alarm.fragment, flight, first=True)
            yield from self._propose(alarm.fragment)
        elif alarm.name == "resend" and alarm.attempt == flight.turn:
            yield from self._resend(alarm.fragment, flight)

    # What may have been lost

    def _resend_later(self, fragment: int, flight: Flight) -> SetAlarm:
        return SetAlarm(Alarm("resend", fragment, flight.turn), "resend")

    def _resend(self, fragment: int, flight: Flight) -> Iterator[Action]:
        """Says again what this member waits for an answer to: its proposal, its start, that it holds the result."""
        if flight.best is not None and not flight.given_up:
            message, members = flight.unanswered(self.me)
            yield from (Send(member, message) for member in members if member != self.me)
            yield self._resend_later(fragment, flight)
