"""What the exchange asks of TCP beyond a byte stream: options for long fat links, and what the kernel knows of them."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

SO_MAX_PACING_RATE, UNLIMITED = 47, (1 << 64) - 1  # <asm-generic/socket.h>
UNSENT = 128 << 10
"""Bytes that wait in a socket for the congestion window. More would only queue what a faster stream could take, and leave
one stream with megabytes to send when the others are done."""
KEEPALIVE = (60, 15, 4)
"""Seconds of idleness before a probe, between probes, probes: also keeps address translators from forgetting us between
two rounds."""
UNACKNOWLEDGED = 120
"""Seconds that sent data may stay without an acknowledgement, or a full receiver full."""
MIN_STREAMS, MAX_STREAMS = 4, 32
SAMPLE = 0.05
"""Seconds between two looks at the counters."""
WINDOW = 2.0
"""Seconds over which a rate is taken: so many that a queue that empties on the way, and what is acknowledged in one jump after a
loss, do not make it look much higher."""
SHORTEST = 0.3
"""Of an exchange that ends before that, this at least."""
LEAST = 1 << 19
"""Bytes below which what was measured is latency, not a rate."""
FADE = 0.9
"""What is left of an older rate when a newer measurement is lower."""
FULL = 0.75
"""Share of that time with something to send: then the rate is the link's, not that of what there was."""
GROWN = 1.15
"""Times what was known before: a rate that rises by more, as while streams find their windows, has not shown its limit yet."""


def tune(sock: socket.socket, congestion: str) -> None:
    """For a stream of bulk data. congestion: an algorithm of the kernel's; empty: its default. One that this kernel does
    not have, or does not allow us, is passed over."""
    keep_alive(sock)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    if congestion and hasattr(socket, "TCP_CONGESTION"):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())


def keep_alive(sock: socket.socket) -> None:
    """Ends a connection to a machine that is gone: while idle by probes, while sending by what stays unacknowledged."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNACKNOWLEDGED)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE, strict=True):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


FIELDS = struct.Struct("=120xQQ12xI")
"""bytes_acked, bytes_received and min_rtt in struct tcp_info of <linux/tcp.h>. The counters of segments say too little of
bytes where segments are large and travel several at a time."""


@dataclass(frozen=True)
class Info:
    """Linux's TCP_INFO of one socket, the part that is used here."""

    rtt: float
    """The smallest seen, s."""
    sent: int
    """Bytes that the peer's kernel has, up to the first one that is missing."""
    received: int
    """The same of what came here."""


def info(sock: socket.socket) -> Info | None:
    """None where the kernel does not tell, or the socket is gone."""
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except (OSError, AttributeError):
        return None
    if len(data) < FIELDS.size:
        return None
    sent, received, rtt = FIELDS.unpack_from(data)
    return Info(rtt / 1e6, sent, received)


def pace(sock: socket.socket, rate: float) -> None:
    """The stream sends no faster than this, bytes/s; 0: as fast as it can."""
    with contextlib.suppress(OSError):  # it is closed
        sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", round(rate) or UNLIMITED))


def send_buffer() -> int:
    """Bytes that the kernel lets a socket hold that grows its buffer by itself: a bound of a stream's window."""
    try:
        return int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return 4 << 20


def streams_for(rtt: float, rate: float, buffer: int) -> int:
    """Parallel streams for a link. rtt: s; rate: bytes/s, 0 if not known; buffer: bytes that one stream may have on its
    way. Half of a buffer is overhead; and several even out losses and slow starts where there is a distance."""
    least = MIN_STREAMS if rtt > 0.002 else 1
    return min(max(least, math.ceil(rtt * rate / (buffer / 2))), MAX_STREAMS)


class Meter:
    """The rates that this rank's links have carried, from the kernel's counters of delivered bytes: the highest over a
    window, since waiting for others is not slowness. Any thread; attempts may overlap."""

    def __init__(self) -> None:
        self.up = self.down = 0.0
        """bytes/s; 0: not known yet."""
        self.settled = False
        """The last exchange had more to send than the link took, and sent no faster than the ones before: `up` is what the link
        can carry."""
        self._before = self._full = 0.0
        self._last: weakref.WeakKeyDictionary[socket.socket, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._totals = (0, 0)
        self._samples: deque[tuple[float, int, int, bool]] = deque()
        self._peaks = (0.0, 0.0)
        self._rtt = 0.0
        """The longest of the links' round trips."""
        self._active = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """An attempt begins. Each ends."""
        with self._lock:
            self._active += 1
            if self._active == 1:
                self._samples.clear()
                self._peaks, self._before, self._full, self._rtt = (0.0, 0.0), self.up, 0.0, 0.0

    def sample(self, sockets: Callable[[], Iterable[socket.socket]], busy: bool) -> None:
        """Call it every `SAMPLE` seconds or so while data flows. busy: there is more to send than the sockets have taken."""
        with self._lock:
            now = time.monotonic()
            if self._samples and now - self._samples[-1][0] < SAMPLE:
                return
            self._totals = self._count(sockets())
            self._samples.append((now, *self._totals, busy))
            while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW:
                self._samples.popleft()
            if now - self._samples[0][0] >= WINDOW:
                self._take_rates(now - self._samples[0][0])

    def _count(self, sockets: Iterable[socket.socket]) -> tuple[int, int]:
        sent, received = self._totals
        for sock in sockets:
            if (seen := info(sock)) is not None:
                self._rtt = max(self._rtt, seen.rtt)
                before = self._last.get(sock, (0, 0))
                sent, received = sent + max(seen.sent - before[0], 0), received + max(seen.received - before[1], 0)
                self._last[sock] = (seen.sent, seen.received)
        return sent, received

    def _take_rates(self, seconds: float) -> None:
        (_, sent0, received0, _), (_, sent, received, _) = self._samples[0], self._samples[-1]
        up, down = (sent - sent0) / seconds, (received - received0) / seconds
        if up > self._peaks[0]:
            share = sum(busy for *_, busy in self._samples) / len(self._samples)
            self._full = share * (self._samples[-1][0] - self._samples[0][0]) / seconds
        self._peaks = (max(self._peaks[0], up), max(self._peaks[1], down))

    def end(self) -> None:
        """Takes what was seen since the first `begin` into the rates."""
        with self._lock:
            self._active -= 1
            if self._samples and not any(self._peaks):
                # The first bytes are acknowledged a round trip after the exchange began.
                seconds = self._samples[-1][0] - self._samples[0][0] - self._rtt
                if seconds >= SHORTEST:
                    self._take_rates(seconds)
            self.up, self.down = (
                max(peak, FADE * old) if peak * SHORTEST >= LEAST else old
                for peak, old in zip(self._peaks, (self.up, self.down), strict=True)
            )
            self.settled = self.up <= GROWN * self._before and self._full >= FULL
