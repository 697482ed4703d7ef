"""One rank's part of an exchange: reduce-scatter of encoded contributions to block owners, all-gather of the result.

An owner decodes the members' contributions, averages them in member order and encodes the result once; everyone, the
owner included, uses those bytes, so all members end with the same bits. A rank talks to the ranks of the other regions
whose slices overlap its own, in parallel, chunk by chunk: while some chunks are encoded, others are on their way, reduced, or
on their way back.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from elastic.attempt import Attempt, Cancelled
from elastic.links import Link, Links, Rank
from elastic.node import Node
from elastic.order import Arithmetic, Contribution, Key, Order, Outcome
from elastic.plan import NotFinite
from elastic.wire import NONSENSE, Message

PACE = 1.15
"""Times the highest rate seen is how fast a rank sends: so that a link that has become faster is noticed."""
LONG = 4
"""Round trips that an exchange takes at least to be paced: of a shorter one the rate that is seen is mostly latency, and a
pace of little more than that would make the next one slower still."""
NORM_SLACK = 1.5
"""The bytes of a contribution may have so many times the norm that was announced: rounding to int4 adds up to a third."""
TINY = 1e-30
"""A norm below which rounding may do more than that."""
REMEMBERED = 1000
"""Ended attempts whose late frames are recognized."""


class Exchanger:
    """A rank's exchanges: contributions offered, attempts under way, results held until their round is decided.
    stall: seconds of silence that end an attempt as long as no rate is known."""

    def __init__(
        self, node: Node, arithmetic: Arithmetic, rank: int, stall: float, streams: int = 0, congestion: str = ""
    ) -> None:
        self.node, self.arithmetic, self.rank, self.stall = node, arithmetic, rank, stall
        self.links = Links(node, self._frame, self._link_ended, streams, congestion)
        self.on_outcome: Callable[[Outcome], None] = lambda outcome: None
        self.keep: Callable[[str, int, int, Tensor], None] | None = None
        """(attempt, first block, last block, result): stores the lowest member's slice before it counts as held, if its
        order says so, and a committed round can always be had. May raise OSError; it is tried again then."""
        self._lock = threading.Lock()
        self._offers: dict[Key, Contribution] = {}
        self._attempts: dict[str, Attempt] = {}
        self._results: dict[str, tuple[Key, Tensor]] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        """Attempts that have ended here; what still arrives for them is dropped."""

    def offer(self, key: Key, contribution: Contribution) -> None:
        """This rank's contribution to `key`; attempts reuse it until the round is decided."""
        with self._lock:
            self._offers[key] = contribution

    def start(self, order: Order) -> None:
        """Runs the attempt in the background; `on_outcome` hears of its end."""
        with self._lock:
            if order.attempt in self._attempts or order.attempt in self._closed:
                return
            if (offer := self._offers.get(order.key)) is None:
                self._close(order.attempt)
        if offer is None:  # the round was decided while the order was on its way
            return self.on_outcome(Outcome(order.attempt, None, reason="cancelled"))
        try:
            attempt = Attempt(order, self.rank, self.arithmetic, offer, self.stall)
        except (*NONSENSE, MemoryError, OSError) as error:
            print(f"round: an exchange cannot begin: {error!r}", flush=True)
            return self.on_outcome(Outcome(order.attempt, None, reason=f"it cannot begin: {error!r}"))
        with self._lock:
            self._attempts[order.attempt] = attempt
            early = [(link, frame) for link in self.links.all() for frame in link.take_early(order.attempt)]
        for link, frame in early:
            self._early(attempt, link, *frame)
        threading.Thread(target=self._run, args=(attempt,), name="exchange", daemon=True).start()

    def cancel(self, attempt_id: str) -> None:
        """Ends the attempt if it is under way. A result that is held stays held."""
        with self._lock:
            self._close(attempt_id)
            attempt = self._attempts.get(attempt_id)
        if attempt is not None:
            attempt.fail(frozenset(), "cancelled")

    def drop(self, attempt_id: str) -> None:
        """Another rank of this region failed: the region does not hold the result, so it will not be committed."""
        with self._lock:
            self._results.pop(attempt_id, None)

    def result(self, attempt_id: str) -> Tensor | None:
        """This rank's slice of the encoded result (uint8), if held."""
        with self._lock:
            held = self._results.get(attempt_id)
        return None if held is None else held[1]

    def decided(self, key: Key) -> None:
        """The round that `key` was for is in the journal: its contribution and results are of no further use."""
        with self._lock:
            self._offers.pop(key, None)
            self._results = {a: held for a, held in self._results.items() if held[0] != key}

    def forget(self) -> None:
        """Nothing that was offered or held belongs to the run any more: it was rewound."""
        with self._lock:
            self._offers.clear()
            self._results.clear()

    # An attempt, in a thread of its own

    def _run(self, attempt: Attempt) -> None:
        self.links.meter.begin()
        try:
            outcome = self._exchange(attempt)
        except Cancelled:
            assert attempt.failed is not None
            outcome = attempt.failed
            self._let_go(attempt, outcome.suspects)
        except Exception as error:  # a bug: the round must not wait for ever
            attempt.fail(frozenset(), f"the exchange broke: {error!r}")
            self._end(attempt, Outcome(attempt.order.attempt, None, reason=f"the exchange broke: {error!r}"))
            raise
        self._end(attempt, outcome)

    def _let_go(self, attempt: Attempt, suspects: frozenset[str]) -> None:
        """No later attempt uses the links of who was given up. All that hear of it do so, and the suspect with all of them: a
        link that only one end has let go of would hold up the next attempt."""
        me = attempt.order.parties[attempt.order.me].member
        for peer, side in attempt.sides.items():
            if side.link is not None and suspects & {me, peer[0]}:
                self.links.give_up(side.link)
                self._link_ended(side.link, "given up")

    def _exchange(self, attempt: Attempt) -> Outcome:
        """Raises Cancelled."""
        order = attempt.order
        self._transfer(attempt)
        seconds = time.monotonic() - attempt.begun
        for side in attempt.sides.values():
            if side.link is not None and side.received:
                side.link.rate = side.received / seconds  # by it, the peer's silence is judged the next time
        slices = (attempt.first, attempt.last, attempt.result)
        digests = self.arithmetic.digests(order.key[1], *slices, len(order.parties))
        if order.store and order.me == 0 and attempt.first < attempt.last:
            self._keep(attempt)
        return Outcome(order.attempt, digests, seconds=seconds)

    def _end(self, attempt: Attempt, outcome: Outcome) -> None:
        order, meter = attempt.order, self.links.meter
        meter.end()
        outcome.sent, outcome.received = attempt.sent, attempt.received
        outcome.up, outcome.down = meter.up, meter.down
        with self._lock:
            if outcome.digests is not None and order.key in self._offers:
                self._results[order.attempt] = (order.key, attempt.result)
            self._attempts.pop(order.attempt)
            self._close(order.attempt)
        attempt.close()
        self.on_outcome(outcome)

    def _transfer(self, attempt: Attempt) -> None:
        """Sends, reduces, gathers: returns when the whole result is there and everything is sent. Raises Cancelled."""
        self._open(attempt)
        order, tick = attempt.order, self.links.sample
        weights = [party.weight for party in order.parties]
        for _ in range(len(attempt.due)):
            first, parts = attempt.next_whole(tick)
            try:
                data, squares = self.arithmetic.reduce(order.key[1], first, attempt.end[first], parts, weights)
            except NotFinite as error:
                self._refuse(attempt, error.index)
                raise Cancelled from error
            self._compare_norms(attempt, squares)
            attempt.cut(first, attempt.end[first]).copy_(data)
            attempt.pass_on(first)
        attempt.wait(lambda: not attempt.missing, tick)
        attempt.wait(lambda: not attempt.unsent, tick)

    def _refuse(self, attempt: Attempt, index: int) -> None:
        """A member that sends what is not finite, by a fault or on purpose, is left out of the next attempt."""
        name = attempt.order.parties[index].member if index >= 0 else ""
        attempt.fail(frozenset([name] if name else []), f"the contribution of {name or 'all together'} is not finite")

    def _compare_norms(self, attempt: Attempt, squares: Sequence[float]) -> None:
        """Weights go by the norms that members announce, so who sends more than it announced is left out of the next attempt.
        An owner sees its own blocks only. Raises Cancelled."""
        order = attempt.order
        for k, (party, square) in enumerate(zip(order.parties, squares, strict=True)):
            if k == order.me or party.norm is None:
                continue
            attempt.squares[k] += square
            norm = math.sqrt(attempt.squares[k])
            if norm > NORM_SLACK * party.norm + TINY:
                sent = f"announced a norm of {party.norm:.3g} and sends one of at least {norm:.3g}"
                attempt.fail(frozenset([party.member]), f"{party.member} {sent}")
                raise Cancelled

    def _open(self, attempt: Attempt) -> None:
        """Gets the links that the attempt needs, side by side; it talks on each as soon as it stands."""
        order = attempt.order
        reachable = bool(order.parties[order.me].endpoints[self.rank])

        def get(peer: Rank, endpoint: str) -> None:
            try:
                link = self.links.get(peer, endpoint, reachable, self.stall)
                self._pace(attempt, peer, link)
                attempt.open(peer, link)
            except (OSError, ValueError) as error:  # ValueError: an endpoint that is none
                attempt.fail(frozenset([peer[0]]), f"no connection to {peer[0]}: {error}")

        for peer, side in attempt.sides.items():
            endpoint = order.parties[side.member].endpoints[peer[1]]
            threading.Thread(target=get, args=(peer, endpoint), name="exchange-open", daemon=True).start()

    def _pace(self, attempt: Attempt, peer: Rank, link: Link) -> None:
        """The link gets its part of what this rank's uplink can carry, once that is known: unpaced, a dozen streams that all look
        for more overfill a queue of one round trip, and a tenth of what they send is lost and sent again."""
        total = sum(side.outgoing for side in attempt.sides.values())
        mine, meter = attempt.sides[peer].outgoing, self.links.meter
        paced = meter.settled and total > LONG * link.round_trip() * meter.up
        link.pace(PACE * meter.up * mine / total if paced else 0.0)

    def _keep(self, attempt: Attempt) -> None:
        while self.keep is not None:
            try:
                return self.keep(attempt.order.attempt, attempt.first, attempt.last, attempt.result)
            except OSError as error:
                print(f"round: its bits cannot be stored: {error}; trying again", flush=True)
                attempt.pause(1.0)

    def _close(self, attempt: str) -> None:
        self._closed[attempt] = None
        while len(self._closed) > REMEMBERED:
            self._closed.popitem(last=False)

    # The links' side

    def _frame(self, link: Link, message: Message, payload: bytearray) -> None:
        attempt_id = str(message["attempt"])
        if message["type"] == "failed" and self._accused(message):
            self.links.retire(link)  # the peer has given it up
        with self._lock:
            attempt = self._attempts.get(attempt_id)
            if attempt is None:
                if attempt_id not in self._closed:
                    link.keep_early(attempt_id, message, payload)
                return
        attempt.handle(link.peer, message, payload)

    def _accused(self, message: Message) -> bool:
        return self.node.identity is not None and self.node.identity.member in message["suspects"]

    def _early(self, attempt: Attempt, link: Link, message: Message, payload: bytearray) -> None:
        try:
            attempt.handle(link.peer, message, payload)
        except (OSError, *NONSENSE) as error:
            self.node.refusals += 1
            link.close(f"a frame that makes no sense: {error!r}")

    def _link_ended(self, link: Link, reason: str) -> None:
        with self._lock:
            concerned = [a for a in self._attempts.values() if link.peer in a.sides and a.sides[link.peer].link is link]
        for attempt in concerned:
            attempt.fail(frozenset([link.peer[0]]), f"the exchange with {link.peer[0]} broke: {reason}")
