"""Rank 0's control thread: feeds the round state machine and carries out what it decides.

It owns the control connections to the other regions' rank 0, the timers, the hand on the journal (`JournalThread`) and the one
on this region's own ranks (`Ranks`). The main loop talks to it through `post` and `take`; no inner step ever waits for it.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from elastic import rounds
from elastic.journaling import JournalThread, Ledger, Standing
from elastic.node import NOT_READY, Node, Refused
from elastic.order import Order, Outcome, Party
from elastic.plan import WHOLE, ownership
from elastic.ranks import Ranks
from elastic.timing import Timing
from elastic.wire import NONSENSE, Connection, Message, WireError

TICK = 0.25
REMEMBERED = 50
"""Attempts whose outcomes are kept for who reports on them."""
POLL = 2.0
"""Seconds between two looks at the journal while nobody points at a new entry."""


@dataclass
class Peer:
    connection: Connection
    dialler: str


@dataclass
class Commands:
    """What the coordinator wants of the main loop. Taken as a whole, entries first."""

    entries: list[bytes] = field(default_factory=list)
    asks: list[rounds.Ask] = field(default_factory=list)
    halt: str | None = None


class Coordinator(threading.Thread):
    """Start it once the region is connected; `post` events to it, `take` its commands."""

    def __init__(
        self,
        node: Node,
        ranks: Ranks,
        ledger: Ledger,
        machine: rounds.Rounds,
        timing: Timing,
        combine: Callable[[bytes], str],
    ) -> None:
        super().__init__(name="coordinator", daemon=True)
        self.node, self.ranks, self.machine = node, ranks, machine
        self.timing, self.combine = timing, combine
        self.standing = ledger.standing()
        self.journal = JournalThread(ledger, self)
        self.seek: Callable[[], None] = lambda: None
        """Asks the lighthouse who is there."""
        self.watch: Callable[[], None] = lambda: None
        """Called between two events; keeps this thread as long as the main loop hangs."""
        self.outcomes: dict[str, list[Outcome]] = {}
        """attempt -> how it went at each rank of this region, in rank order."""
        self.rates = {"up": 0, "down": 0}
        """Bytes/s that this region's links have been seen to carry, all ranks together; 0: not known."""
        self.peers: dict[str, Peer] = {}
        self._shares: tuple[int, ...] = ()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._alarms: list[tuple[float, int, rounds.Alarm]] = []
        self._counter = 0
        self._commands = Commands()
        self._ready = threading.Condition()
        self._dialling: set[str] = set()
        self._refused: dict[str, str] = {}
        self._closing = False
        self._poll_at = self._alive_at = 0.0
        node.handlers["control"] = self._serve
        ranks.on_outcome = self._outcome

    # The main loop's side

    def post(self, event: rounds.Event) -> None:
        self._inbox.put(event)

    def take(self, timeout: float = 0.0) -> Commands:
        """The commands since the last call; waits up to `timeout` seconds for some."""
        with self._ready:
            self._ready.wait_for(lambda: self._commands != Commands(), timeout)
            commands, self._commands = self._commands, Commands()
            return commands

    def connected(self) -> list[str]:
        return sorted(self.peers)

    def lonely(self) -> bool:
        """Too few regions are connected for a round."""
        return len(self.peers) + 1 < self.machine.wanted()

    def meet(self, found: dict[str, str]) -> None:
        """Dials members ({member: endpoint of rank 0, empty if it has none}) that are not connected yet. Any thread."""
        for member, endpoint in found.items():
            known = {*self.peers, *self._dialling, self.machine.me}
            if endpoint and member not in known:
                self._dialling.add(member)
                threading.Thread(target=self._dial, args=(member, endpoint), daemon=True).start()

    def close(self) -> None:
        """Ends the thread, and parts from the peers, which need not wait for a time-out then."""
        self._closing = True
        self._inbox.put(lambda: None)  # it need not wait for something to do
        self.journal.close()
        self.join(timeout=5)
        self.node.handlers.pop("control", None)  # the process may have uploads to wait for
        self.part()
        self.journal.join(timeout=5)

    def part(self) -> None:
        """Says goodbye to the peers."""
        for peer in list(self.peers.values()):
            self._send(peer.connection, {"type": "bye"})
            self.node.release(peer.connection)

    # The thread

    def run(self) -> None:
        try:
            self._feed(self.standing.view)  # what the region has read already, should the store be away just now
            self.journal.start()
            while not self._closing:
                self._step()
        except Exception as error:  # a bug or a broken journal: the main loop must end, not wait for ever
            self.broken(error)
            raise

    def _step(self) -> None:
        self.watch()
        now = time.monotonic()
        due = self._alarms[0][0] - now if self._alarms else TICK
        with suppress(queue.Empty):
            self._dispatch(self._inbox.get(timeout=max(0.0, min(due, TICK))))
        while self._alarms and self._alarms[0][0] <= time.monotonic():
            self._feed(heapq.heappop(self._alarms)[2])
        self._keep_alive()
        if time.monotonic() >= self._poll_at:
            self._look()

    def _dispatch(self, item: Any) -> None:
        if callable(item):
            item()
        elif isinstance(item, Outcome):
            self._finished(item)
        elif isinstance(item, rounds.Answered):
            self._feed(replace(item, answer={**item.answer, **self.rates}))
        else:
            self._feed(item)

    def _feed(self, event: rounds.Event) -> None:
        actions = deque(self.machine.handle(event))
        while actions:
            follow = self._perform(actions.popleft())
            if follow is not None:
                actions.extend(self.machine.handle(follow))

    def _perform(self, action: rounds.Action) -> rounds.Event | None:
        match action:
            case rounds.Send(member, message):
                if peer := self.peers.get(member):
                    self._send(peer.connection, message)
            case rounds.Ask():
                self._command(asks=[action])
            case rounds.Exchange():
                return self._exchange(action)
            case rounds.Cancel(attempt):
                self.ranks.cancel(attempt)
            case rounds.Append(fields):
                self.journal.ask_append(fields)
            case rounds.Read():
                self._look()
            case rounds.SetAlarm(alarm, kind):
                self._set_alarm(alarm, kind)
            case rounds.Halt(reason):
                self._command(halt=reason)
        return None

    def _set_alarm(self, alarm: rounds.Alarm, kind: str) -> None:
        if any(pending == alarm for _, _, pending in self._alarms):
            return  # one of each: alarms that set themselves anew must not multiply
        self._counter += 1
        heapq.heappush(self._alarms, (time.monotonic() + self.timing.delay(kind), self._counter, alarm))

    def _command(self, **what: Any) -> None:
        with self._ready:
            for name, value in what.items():
                old = getattr(self._commands, name)
                setattr(self._commands, name, old + value if isinstance(value, list) else old or value)
            self._ready.notify_all()

    # The journal: `was_read`, `no_answer` and `broken` are called by its thread

    def _look(self) -> None:
        self._poll_at = time.monotonic() + POLL
        self.journal.ask_read()

    def was_read(self, entries: list[bytes], standing: Standing, won: bool) -> None:
        self._inbox.put(partial(self._took, entries, standing, won))

    def no_answer(self, fields: Message) -> None:
        alarm = rounds.Alarm("append", fields["fragment"], fields["attempt"])
        self._inbox.put(partial(self._set_alarm, alarm, "retry"))

    def broken(self, error: Exception) -> None:
        self._command(halt=f"{type(error).__name__}: {error}")

    def _took(self, entries: list[bytes], standing: Standing, won: bool) -> None:
        if entries:
            self._command(entries=entries)
        self.standing = standing
        if won:
            self._broadcast({"type": "head", "head": standing.view.seq})
        self.meet(dict(standing.endpoints))
        self._feed(standing.view)

    # Exchanges in this region

    def _exchange(self, action: rounds.Exchange) -> rounds.Event | None:
        endpoints = self.standing.data
        if any(a["member"] not in endpoints for a in action.answers):
            return rounds.ExchangeFailed(action.attempt, frozenset())  # a member ended since this was decided
        weights = self.standing.weights(action.fragment, action.answers)
        parties = tuple(
            Party(a["member"], endpoints[a["member"]], weight, a.get("norm", 0.0) or 0.0)
            for a, weight in zip(action.answers, weights, strict=True)
        )
        me = [party.member for party in parties].index(self.machine.me)
        shares = self._ownership(action.answers)
        key = (action.epoch, action.fragment, action.base)
        self.ranks.start(Order(action.attempt, key, parties, shares, me, action.store))
        return None

    def _ownership(self, answers: Sequence[Message]) -> tuple[int, ...]:
        """What each member reduces, by the rates in the answers: the same for all who have them."""
        rates = [float(min(a.get("up", 0), a.get("down", 0))) for a in answers]
        shares = ownership(rates)
        if shares != self._shares and len(shares) > 2:
            told = (
                f"{a['member']} {100 * share / WHOLE:.0f} % ({f'{rate * 8e-6:.0f} Mbit/s' if rate else 'rate not known yet'})"
                for a, share, rate in zip(answers, shares, rates, strict=True)
            )
            print(f"round: blocks are reduced by {', '.join(told)}", flush=True)
        self._shares = shares
        return shares

    def _outcome(self, rank: int, outcome: Outcome) -> None:
        self._inbox.put(outcome)

    def _finished(self, outcome: Outcome) -> None:
        """A rank is done; the region is when all are. One failure fails the attempt for the region."""
        if outcome.digests is None:
            if outcome.reason != "cancelled":
                print(f"round: {outcome.reason}; given up, a new attempt follows", flush=True)
            self._feed(rounds.ExchangeFailed(outcome.attempt, outcome.suspects))
        elif (done := self.ranks.complete(outcome.attempt)) is not None:
            self.outcomes[outcome.attempt] = done
            for old in list(self.outcomes)[:-REMEMBERED]:
                del self.outcomes[old]
            self.rates = {"up": int(sum(o.up for o in done)), "down": int(sum(o.down for o in done))}
            digest = self.combine(b"".join(o.digests or b"" for o in done))
            self._feed(rounds.Exchanged(outcome.attempt, digest))

    # Peers

    def _serve(self, connection: Connection, hello: Message) -> None:
        self._talk(hello["member"], connection, dialler=hello["member"])

    def _dial(self, member: str, endpoint: str) -> None:
        try:
            connection, hello = self.node.dial(endpoint, "control")
        except Refused as error:
            if str(error) != NOT_READY and self._refused.get(member) != str(error):
                print(f"peer {member} at {endpoint}: {error}", flush=True)
            self._refused[member] = str(error)
            return
        except OSError:
            return  # not there (any more): the lighthouse, or its own dialling, will tell
        finally:
            self._dialling.discard(member)
        self._talk(hello["member"], connection, dialler=self.machine.me)
        self.node.release(connection)

    def _talk(self, member: str, connection: Connection, dialler: str) -> None:
        """Receives on one control connection until it breaks."""
        connection.sock.settimeout(self.timing.peer_timeout)
        self._inbox.put(lambda: self._arrived(member, connection, dialler))
        reason = "it said goodbye"
        try:
            while (message := connection.receive()[0]).get("type") != "bye":
                self._inbox.put(lambda m=message: self._heard(member, connection, m))
        except (WireError, OSError) as error:
            reason = f"silent for {self.timing.peer_timeout:g} s" if isinstance(error, TimeoutError) else str(error)
        finally:
            self._inbox.put(lambda: self._lost(member, connection, reason))

    def _arrived(self, member: str, connection: Connection, dialler: str) -> None:
        """When two members dialled each other at once, both keep the connection that the lower one dialled; what was
        said on the other may be lost, so its end counts as the peer's."""
        old = self.peers.get(member)
        if old is not None and old.dialler <= dialler:
            connection.close()
            return
        self.peers[member] = Peer(connection, dialler)
        if old is not None:
            old.connection.close()
            self._feed(rounds.PeerGone(member))
        self.seek()
        self._tell_view()

    def _lost(self, member: str, connection: Connection, reason: str) -> None:
        peer = self.peers.get(member)
        if peer is None or peer.connection is not connection:
            return
        print(f"peer {member}: gone, {reason}", flush=True)
        del self.peers[member]
        self.seek()
        self._tell_view()
        self._feed(rounds.PeerGone(member))

    def _heard(self, member: str, connection: Connection, message: Message) -> None:
        peer = self.peers.get(member)
        if peer is None or peer.connection is not connection:
            return  # said on a connection whose end is known already
        try:
            if message.get("type") == "sees":
                self._feed(rounds.PeerSeen(member, frozenset(map(str, message["members"]))))
            else:
                self._feed(rounds.Received(member, message))
        except NONSENSE as error:
            print(f"peer {member}: malformed message dropped, and the connection with it: {error!r}", flush=True)
            connection.close()

    def _tell_view(self) -> None:
        self._broadcast({"type": "sees", "members": sorted(self.peers)})

    def _keep_alive(self) -> None:
        """A sign of life every second: the list of peers."""
        if time.monotonic() - self._alive_at > 1.0:
            self._alive_at = time.monotonic()
            self._tell_view()

    def _broadcast(self, message: Message) -> None:
        for peer in list(self.peers.values()):
            self._send(peer.connection, message)

    def _send(self, connection: Connection, message: Message) -> None:
        try:
            connection.send(message)
        except OSError:
            connection.close()  # its receiving thread reports the loss
