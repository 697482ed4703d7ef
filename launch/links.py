"""The links of the WAN lab as arithmetic: when a packet arrives, or that it does not. No sockets, no clock.

A packet waits for the sender's uplink, travels half a round trip, and waits for the receiver's downlink. Links serialise in
virtual time, departure = max(now, free) + size / rate, so that a forwarder that is woken late does not make a link slower.
Rates count the bytes of IP packets, headers included.
"""

from __future__ import annotations

import ipaddress
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diloco.errors import ConfigError

HUB = "hub"
"""The endpoint in the host's own namespace: lighthouse, store and launcher. Its links have no limits and no delay."""
MIN_QUEUE = 0.1


@dataclass(frozen=True)
class Kind:
    """What a value may be: units that a text may have, bounds of the number, and how to say so."""

    fix: str
    units: Mapping[str, float] = field(default_factory=dict)
    low: float = 0.0
    high: float = math.inf
    above: bool = False
    """`low` itself is out of bounds, too."""

    def check(self, key: str, shown: object, number: object) -> None:
        """Raises ConfigError with `shown` as the value, unless `number` is a number in the bounds."""
        fits = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not fits or not self.low <= number <= self.high or (self.above and number == self.low):  # type: ignore[operator]
            raise ConfigError(f"wan.{key}={shown} cannot be: set it to {self.fix}")


RATE = Kind("a rate above 0, such as 200mbit", {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}, above=True)
TIME = Kind("a time of at most 60s, such as 80ms", {"us": 1e-6, "ms": 1e-3, "s": 1.0}, high=60.0)
SHARE = Kind("a share of the packets from 0% to 99%, such as 0.1%", {"%": 0.01}, high=0.99)
SIZE = Kind("a time such as 100ms, a size such as 256kb, or auto", {"b": 1, "kb": 1e3, "mb": 1e6})
MTU = Kind("bytes from 576 to 65520, such as 1500", low=576, high=65520)
SEED = Kind("a whole number, 0 or more")

DEFAULTS = {"up": RATE, "down": RATE, "rtt": TIME, "jitter": TIME, "loss": SHARE, "mtu": MTU, "seed": SEED}
REGION = {"up": RATE, "down": RATE}
PAIR = {"rtt": TIME, "jitter": TIME, "loss": SHARE}


@dataclass(frozen=True)
class WanConfig:
    """The links between regions. Rates in bits per second of IP packets, times in seconds, loss as a share. Raises
    ConfigError on numbers out of bounds."""

    up: float = 200e6
    down: float = 200e6
    regions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """{region: {up, down}} where a region differs."""
    rtt: float = 0.08
    jitter: float = 0.0
    """A round trip takes rtt ± jitter, uniformly; packets stay in order."""
    loss: float = 0.0
    """Each way, independent per packet, after the uplink."""
    pairs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """{"eu-us": {rtt, jitter, loss}} where a pair differs, either order."""
    queue: float = 0.0
    """Each up- and downlink drops a packet that would wait longer than this; 0: the longest RTT of the region, at least
    100 ms, so that one TCP stream can fill the link."""
    queue_bytes: float = 0.0
    """The same as a size; 0: `queue` counts."""
    mtu: int = 1500
    seed: int = 0
    """Of loss and jitter."""
    subnet: str = ""
    """A /24 for the lab, such as 10.77.0.0; empty: one that this machine has no route to."""

    def __post_init__(self) -> None:
        for key, kind in {**DEFAULTS, "queue": TIME, "queue_bytes": SIZE}.items():
            kind.check(key, getattr(self, key), getattr(self, key))
        for group, kinds in (("regions", REGION), ("pairs", PAIR)):
            for name, values in getattr(self, group).items():
                for key, value in values.items():
                    if key not in kinds:
                        raise ConfigError(f"wan.{group}.{name} has the unknown key {key}: it takes {', '.join(kinds)}")
                    kinds[key].check(f"{group}.{name}.{key}", value, value)

        try:
            ipaddress.IPv4Network(f"{self.subnet or '10.77.0.0'}/24")
        except ValueError as error:
            raise ConfigError(
                f"wan.subnet={self.subnet} is not a /24: set it to one such as 10.77.0.0, or leave it out"
            ) from error

    def rate(self, region: str, direction: str) -> float:
        """Bits per second, direction: up or down."""
        return self.regions.get(region, {}).get(direction, getattr(self, direction))

    def pair(self, a: str, b: str) -> dict[str, float]:
        """rtt, jitter and loss between two endpoints."""
        if HUB in (a, b):
            return dict.fromkeys(PAIR, 0.0)
        given = self.pairs.get(f"{a}-{b}", self.pairs.get(f"{b}-{a}", {}))
        return {key: given.get(key, getattr(self, key)) for key in PAIR}

    @property
    def loses(self) -> bool:
        """Packets are lost at random, anywhere."""
        return self.loss > 0 or any(pair.get("loss") for pair in self.pairs.values())

    def limit(self, region: str, names: Sequence[str], rate: float) -> float:
        """Seconds that a packet may wait for one of the region's links, at this rate."""
        if self.queue_bytes:
            return self.queue_bytes * 8 / rate
        longest = max((self.pair(region, name)["rtt"] for name in names if name != region), default=0.0)
        return self.queue or max(MIN_QUEUE, longest)


class Link:
    """A serialising link with a bounded drop-tail queue."""

    __slots__ = ("free", "limit", "per_byte", "rate")

    def __init__(self, rate: float, limit: float) -> None:
        self.free = 0.0
        self.set(rate, limit)

    def set(self, rate: float, limit: float) -> None:
        """Bits per second and seconds. What waits already keeps its departure."""
        self.rate, self.limit, self.per_byte = rate, limit, 8.0 / rate

    def depart(self, now: float, size: int) -> float | None:
        """When the last byte of a packet that comes at `now` has left; None: dropped."""
        start = self.free if self.free > now else now
        if start - now > self.limit:
            return None
        self.free = start + size * self.per_byte
        return self.free


@dataclass
class Counts:
    """Of one direction. sent = delivered + lost + (dropped or cut on the far side) + what is on the way."""

    sent: int = 0
    """Packets that left the uplink."""
    sent_bytes: int = 0
    lost: int = 0
    """Packets, at random."""
    dropped: int = 0
    """Packets, by a full queue at either end."""
    cut: int = 0
    """Packets, by a cut link."""
    delivered: int = 0
    delivered_bytes: int = 0


class Path:
    """The way from one endpoint to another."""

    def __init__(self, source: str, target: str, up: Link, down: Link, config: WanConfig) -> None:
        self.source, self.target, self.up, self.down = source, target, up, down
        pair = config.pair(source, target)
        self.delay, self.jitter, self.loss = pair["rtt"] / 2, pair["jitter"] / 2, pair["loss"]
        self.cut = False
        self.cap: Link | None = None
        """A link of the pair's own while that is slowed."""
        self.counts = Counts()
        self._latest = 0.0
        name = f"{config.seed} {source} {target}"
        self._losses, self._jitters = random.Random(f"loss {name}"), random.Random(f"jitter {name}")

    def send(self, now: float, size: int, packets: int = 1) -> float | None:
        """When a packet, or some that stay together, of `size` bytes that comes at `now` reaches the far downlink; None: it
        does not. Call it in order of `now`."""
        counts = self.counts
        if self.cut:
            counts.cut += packets
            return None
        departed = self.up.depart(now, size)
        if departed is not None and self.cap is not None:
            departed = self.cap.depart(departed, size)
        if departed is None:
            counts.dropped += packets
            return None
        counts.sent += packets
        counts.sent_bytes += size
        if self.loss and self._losses.random() < self.loss:
            counts.lost += packets
            return None
        arrival = departed + self.delay
        if self.jitter:
            arrival += max(self._jitters.uniform(-self.jitter, self.jitter), -self.delay)
            self._latest = arrival = max(arrival, self._latest)
        return arrival

    def arrive(self, now: float, size: int, packets: int = 1) -> float | None:
        """When what reached the far downlink at `now` comes out of it; None: it does not. Call it in order of
        `now` over all paths to that endpoint."""
        departed = None if self.cut else self.down.depart(now, size)
        if departed is not None:
            self.counts.delivered += packets
            self.counts.delivered_bytes += size
        elif self.cut:
            self.counts.cut += packets
        else:
            self.counts.dropped += packets
        return departed


class Network:
    """All paths between the regions and the hub, and what can be done to them."""

    def __init__(self, config: WanConfig, regions: Sequence[str]) -> None:
        if len(regions) > 250:
            raise ConfigError(f"regions names {len(regions)} regions: a WAN lab has room for 250")
        self.config, self.names = config, [*regions, HUB]
        self._cut: set[frozenset[str]] = set()
        self._slow: dict[frozenset[str], float] = {}
        """By region or pair: the share of the rate that is left."""
        self.links = {n: {d: Link(1.0, math.inf) for d in ("up", "down")} for n in regions}
        self.paths = {(a, b): self._path(a, b) for a in self.names for b in self.names if a != b}
        self._apply()

    def _path(self, a: str, b: str) -> Path:
        """What goes to the hub, or comes from it, does not use up the regions' lines."""
        if HUB in (a, b):
            return Path(a, b, Link(math.inf, math.inf), Link(math.inf, math.inf), self.config)
        return Path(a, b, self.links[a]["up"], self.links[b]["down"], self.config)

    def change(self, what: str, names: Sequence[str], share: float = 1.0) -> None:
        """cut, restore, slow or unslow a region or a pair; restore and unslow of a region are of all its pairs, too, and
        without names of everything. Raises ConfigError."""
        key = frozenset(names)
        self._check(what, names, share)
        if what == "cut":
            self._cut.add(key)
        elif what == "slow":
            self._slow[key] = share
        elif what == "restore":
            self._cut = {other for other in self._cut if not _undoes(key, other)}
        else:
            self._slow = {other: s for other, s in self._slow.items() if not _undoes(key, other)}
        self._apply()

    def _check(self, what: str, names: Sequence[str], share: float) -> None:
        if what not in ("cut", "restore", "slow", "unslow"):
            raise ConfigError(f"{what} is not a command: write cut, restore, slow, unslow or status")
        if unknown := [name for name in names if name not in self.names]:
            raise ConfigError(f"{what} {unknown[0]}: there is no such region, only {', '.join(self.names)}")
        if len(set(names)) != len(names) or len(names) > 2 or (not names and what in ("cut", "slow")):
            raise ConfigError(f"{what} {' '.join(names)}: name one region or two".replace(" :", ":"))
        if what == "slow" and not 0 < share <= 1:
            raise ConfigError(f"slow {' '.join(names)} {share:g}: give a share of the rate above 0 and up to 1")
        if what == "slow" and HUB in names:
            raise ConfigError(f"slow {HUB}: its links have no rate, only regions have one")

    def _apply(self) -> None:
        for name, links in self.links.items():
            for direction, link in links.items():
                rate = self.config.rate(name, direction) * self._slow.get(frozenset([name]), 1.0)
                link.set(rate, self.config.limit(name, self.names, rate))
        for (a, b), path in self.paths.items():
            path.cut = any(key <= {a, b} for key in self._cut)
            share = self._slow.get(frozenset([a, b]))
            rate = min(self.config.rate(a, "up"), self.config.rate(b, "down")) * (share or 1.0)
            path.cap = Link(rate, self.config.limit(a, self.names, rate)) if share else None

    def status(self) -> dict[str, Any]:
        """{"regions": {name: {up, down: bits per second now, slowed: share}}, "links": {from: {to: {rtt, jitter, loss,
        cut_now, slowed, and the counts}}}}"""
        regions = {
            name: {"up": links["up"].rate, "down": links["down"].rate, "slowed": self._slow.get(frozenset([name]), 1.0)}
            for name, links in self.links.items()
        }
        links: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for (a, b), path in self.paths.items():
            state = {"cut_now": path.cut, "slowed": self._slow.get(frozenset([a, b]), 1.0)}
            links[a][b] = {**self.config.pair(a, b), **state, **asdict(path.counts)}
        return {"regions": regions, "links": links}


def _undoes(key: frozenset[str], other: frozenset[str]) -> bool:
    """Whether undoing `key` undoes `other`, too."""
    return key == other if len(key) == 2 else key <= other
