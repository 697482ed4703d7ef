"""Data streams between a rank and the ranks of other regions: several TCP connections per pair that outlive attempts, used
both ways, so that one side alone has to be able to dial."""

from __future__ import annotations

import queue
import secrets
import socket
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from elastic import tcp
from elastic.node import Node
from elastic.wire import NONSENSE, Connection, Message

Rank = tuple[str, int]
"""(member, rank): one end of a link."""
Frame = tuple[Message, memoryview | bytes]
EARLY = 4 << 20
"""Bytes of an attempt that a rank may send before its peer has said that it takes part, too: less than a round trip's worth
need not wait. Twice as much of unknown attempts is kept per link, the newest."""
MAX_HEADER = 4 << 10
"""Bytes of JSON in a frame of an exchange."""
FRAME = 2 * MAX_HEADER
"""Bytes that a kept frame counts for besides its payload."""
ARRIVAL = 5.0
"""Seconds that a further stream may come before the first one of its link."""
FAREWELL = 3.0
"""Seconds that a link lives on after its peer was given up, for the peer to hear so."""


@dataclass(frozen=True)
class Parcel:
    """Something to send once a stream is free. build: the frame, or None if it is not wanted any more; sent: told the
    bytes that it took, 0 for None."""

    build: Callable[[], Frame | None]
    sent: Callable[[int], None]


class Link:
    """The streams to one rank of another region. Parcels leave in order, each on the first stream that is free."""

    def __init__(self, peer: Rank, ident: str, on_frame: OnFrame, on_end: OnEnd) -> None:
        self.peer, self.ident = peer, ident
        self.streams: list[Connection] = []
        self.heard = time.monotonic()
        """When the last frame came."""
        self.rate = 0.0
        """Bytes/s that came over it in the last exchange; 0: not known."""
        self.rtt = 0.0
        """Seconds, as the kernel saw it when the link was dialled."""
        self.newest = 0.0
        """When the newest attempt began of those that frames came for."""
        self.broken = ""
        self._pace = 0.0
        """Bytes/s at most; 0: no limit."""
        self.wanted = 1
        """Streams that were dialled, or are being."""
        self.unsent = 0
        """Parcels that wait, or are on their way into a socket."""
        self.early: OrderedDict[str, list[tuple[Message, bytearray]]] = OrderedDict()
        """attempt -> what came for it before it began here."""
        self._early_bytes = self._lent = 0
        self._on_frame, self._on_end = on_frame, on_end
        self._parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def put(self, parcel: Parcel) -> None:
        with self._lock:
            self.unsent += 1
        self._parcels.put(parcel)

    def add(self, connection: Connection) -> None:
        """Sends and receives on one more stream until it, or the link, breaks."""
        with self._lock:
            if not self.broken:
                self.streams.append(connection)
        if self._pace:
            self.pace(self._pace)
        if self.broken:
            connection.close()
            return
        threading.Thread(target=self._send, args=(connection,), name="link-send", daemon=True).start()
        self._receive(connection)

    def pace(self, rate: float) -> None:
        """All streams together are to send no faster than this, bytes/s; 0: as fast as they can."""
        with self._lock:
            self._pace = rate
            for stream in self.streams:
                tcp.pace(stream.sock, rate / len(self.streams))

    def round_trip(self) -> float:
        """Seconds, the smallest that the kernel has seen; 0: not known."""
        seen = [tcp.info(stream.sock) for stream in self.streams]
        return max((one.rtt for one in seen if one is not None), default=0.0)

    def close(self, reason: str) -> None:
        """Ends all streams; who waits for this link hears the reason."""
        with self._lock:
            if self.broken:
                return
            self.broken = reason
        for stream in self.streams:
            stream.close()
        self.early.clear()
        with suppress(queue.Empty):
            while True:  # what they hold is not needed any more
                self._parcels.get_nowait()
        for _ in self.streams:
            self._parcels.put(None)
        self._on_end(self, reason)

    def lend(self, nbytes: int) -> int:
        """How many of so many bytes may be sent before the peer has said that it takes part: all attempts on this link together
        `EARLY`, since it has to keep them."""
        with self._lock:
            lent = max(min(nbytes, EARLY - self._lent), 0)
            self._lent += lent
            return lent

    def pay_back(self, nbytes: int) -> None:
        with self._lock:
            self._lent -= nbytes

    def keep_early(self, attempt: str, message: Message, payload: bytearray) -> None:
        """A frame of an attempt that has not begun here. Of one that has failed there, only that is kept."""
        if message["type"] == "failed":
            self.take_early(attempt)
        self.early.setdefault(attempt, []).append((message, payload))
        self._early_bytes += len(payload) + FRAME
        while self._early_bytes > 2 * EARLY:
            self.take_early(next(iter(self.early)))

    def take_early(self, attempt: str) -> list[tuple[Message, bytearray]]:
        frames = self.early.pop(attempt, [])
        self._early_bytes -= sum(len(payload) + FRAME for _, payload in frames)
        return frames

    def _send(self, connection: Connection) -> None:
        try:
            while (parcel := self._parcels.get()) is not None:
                frame = parcel.build()
                parcel.sent(0 if frame is None else connection.send(*frame))
                with self._lock:
                    self.unsent -= 1
        except OSError as error:
            self.close(str(error))

    def _receive(self, connection: Connection) -> None:
        try:
            while True:
                message, payload = connection.receive(MAX_HEADER)
                self.heard = time.monotonic()
                self._on_frame(self, message, payload)
        except (OSError, *NONSENSE) as error:
            self.close(str(error) if isinstance(error, OSError) else f"a frame that makes no sense: {error!r}")
            raise  # the node counts what it has to


OnFrame = Callable[[Link, Message, bytearray], None]
OnEnd = Callable[[Link, str], None]


class Links:
    """A rank's links, by peer. The side that can be dialled is dialled; if both can, the lower member dials."""

    def __init__(self, node: Node, on_frame: OnFrame, on_end: OnEnd, streams: int = 0, congestion: str = "") -> None:
        self.node, self.streams, self.congestion = node, streams, congestion
        self.meter = tcp.Meter()
        self._on_frame, self._on_end = on_frame, on_end
        self._links: dict[Rank, Link] = {}
        self._changed = threading.Condition()
        self._dialling: defaultdict[Rank, threading.Lock] = defaultdict(threading.Lock)
        node.handlers["data"] = self._serve

    def all(self) -> list[Link]:
        with self._changed:
            return list(self._links.values())

    def sample(self) -> None:
        """A look at what the links carry, for their rates."""
        self.meter.sample(self._sockets, any(link.unsent for link in self.all()))

    def _sockets(self) -> Iterable[socket.socket]:
        return [stream.sock for link in self.all() for stream in link.streams]

    def get(self, peer: Rank, endpoint: str, reachable: bool, timeout: float) -> Link:
        """The link to `peer`, opened if need be. endpoint: empty if the peer cannot be dialled; reachable: it can dial us.
        Raises OSError if it does not come to be in `timeout` s."""
        assert self.node.identity is not None
        if not endpoint and not reachable:
            raise ConnectionError(f"neither {self.node.identity.member} nor {peer[0]} can be dialled")
        if endpoint and (not reachable or self.node.identity.member < peer[0]):
            if not self._dialling[peer].acquire(timeout=timeout):
                raise TimeoutError(f"{peer[0]} at {endpoint} does not answer")
            try:
                link = self._links.get(peer) or self._dial(peer, endpoint)
                self._widen(link, endpoint)
                return link
            finally:
                self._dialling[peer].release()
        with self._changed:
            if not self._changed.wait_for(lambda: peer in self._links, timeout):
                raise TimeoutError(f"{peer[0]} did not connect in {timeout:.0f} s")
            return self._links[peer]

    def retire(self, link: Link) -> None:
        """No attempt gets this link any more: the next one opens another."""
        with self._changed:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]

    def give_up(self, link: Link) -> None:
        """What is in its pipe is of no use any more, and another path may be open. It ends only when the peer, if it is alive,
        has heard why: of a connection that just breaks it would think that this rank is the one that is gone, and say so to
        all others."""
        self.retire(link)
        timer = threading.Timer(FAREWELL, link.close, ("given up",))
        timer.daemon = True
        timer.start()

    def _dial(self, peer: Rank, endpoint: str) -> Link:
        link = Link(peer, secrets.token_hex(8), self._on_frame, self._ended)
        connection = self._connect(link, endpoint, further=False)
        if (seen := tcp.info(connection.sock)) is not None:
            link.rtt = seen.rtt
        self._register(link)
        self._start(link, connection)
        return link

    def _connect(self, link: Link, endpoint: str, further: bool) -> Connection:
        connection, hello = self.node.dial(endpoint, "data", link=link.ident, further=further)
        if (hello["member"], hello["rank"]) != link.peer:
            self.node.release(connection)
            raise ConnectionError(f"{endpoint} is {hello['member']} rank {hello['rank']}, not {link.peer[0]}")
        tcp.tune(connection.sock, self.congestion)
        return connection

    def _start(self, link: Link, connection: Connection) -> None:
        attend = partial(self.node.attend, connection, partial(link.add, connection))
        threading.Thread(target=attend, name="link-receive", daemon=True).start()

    def _widen(self, link: Link, endpoint: str) -> None:
        """More streams, in the background, as the round trip and the rates seen so far ask for."""
        wanted = self.streams or tcp.streams_for(link.rtt, self.meter.up, tcp.send_buffer())
        missing, link.wanted = wanted - link.wanted, max(wanted, link.wanted)
        for _ in range(missing):
            threading.Thread(target=self._add_stream, args=(link, endpoint), name="link-dial", daemon=True).start()

    def _add_stream(self, link: Link, endpoint: str) -> None:
        try:
            self._start(link, self._connect(link, endpoint, further=True))
        except OSError:  # the streams that stand carry everything; if the peer is gone, they tell
            link.wanted -= 1

    def _register(self, link: Link) -> None:
        with self._changed:
            old = self._links.get(link.peer)
            self._links[link.peer] = link
            self._changed.notify_all()
        if old is not None:
            old.close("the peer opened a new one")

    def _serve(self, connection: Connection, hello: Message) -> None:
        """A stream that a peer dialled: of a new link, or one more of a link that stands."""
        peer, ident = (hello["member"], hello["rank"]), str(hello["link"])
        tcp.tune(connection.sock, self.congestion)

        def known() -> bool:
            return peer in self._links and self._links[peer].ident == ident

        with self._changed:
            if hello["further"] and not self._changed.wait_for(known, ARRIVAL):
                return  # of a link that is gone
            link = self._links[peer] if known() else None
        if link is None:
            link = Link(peer, ident, self._on_frame, self._ended)
            self._register(link)
        link.add(connection)

    def _ended(self, link: Link, reason: str) -> None:
        self.retire(link)
        self._on_end(link, reason)
