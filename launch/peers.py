"""How doctors find each other, and the members of a live run: by the run's store, which all regions reach anyway. The lighthouse
is not asked: whoever knocks there counts among those whose absence delays a quorum."""

from __future__ import annotations

import json
import math
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckpt.store import Store
from diloco.config import Config
from diloco.exchanging import published
from diloco.fold import State, canonical
from elastic import probing
from elastic.addresses import own_host
from elastic.node import Identity, Node
from elastic.security import Security, region_of
from elastic.wire import NONSENSE
from launch.checks import FAIL, OK, WARN, Finding, clock

FOLDER, RATES = "doctor", "doctor-rates"
STALE = 600.0
"""Seconds after which who has not taken its entry away is dead."""
LINGER, BRIEFLY = 20.0, 5.0
"""Seconds that a doctor stays for others to measure the way to it: for those that it has reached, and for others."""
POLL = 0.5


@dataclass(frozen=True)
class Peer:
    member: str
    endpoints: tuple[str, ...]
    """Of its ranks, and of their exchanges; empty strings if they cannot be dialled."""
    facts: Mapping[str, Any]
    """What a doctor says of its machine; nothing of a member of a live run."""


def parse(data: bytes) -> Peer:
    """A doctor's entry. Raises one of NONSENSE if it is none."""
    said = json.loads(data)
    facts, member = said["facts"], str(said["member"])
    software = {str(name): str(version) for name, version in facts.get("software", {}).items()}
    if not region_of(member):
        raise ValueError(member)
    return Peer(
        member, (str(said["endpoint"]),), {"software": software, "devices": parse_devices(facts.get("devices", []))}
    )


def parse_devices(said: list[Any]) -> list[dict[str, Any]]:
    """As in `Meeting`'s facts. Raises one of NONSENSE."""
    devices: list[dict[str, Any]] = [
        {**{key: str(d[key]) for key in ("where", "device", "kind")}, "flops": float(d["flops"])} for d in said
    ]
    if not all(0 < d["flops"] < math.inf for d in devices):
        raise ValueError(devices)
    return devices


class Meeting:
    """This doctor's entry in the store, and its port. Raises OSError."""

    def __init__(self, cfg: Config, store: Store, security: Security, state: State | None, facts: Mapping[str, Any]):
        self.cfg, self.store, self.state = cfg, store, state
        self.member = f"{cfg.region.name}_{secrets.randbelow(10**9)}"
        self.reached = set[str]()
        """Members that this doctor has measured the way to."""
        self._left = set[str]()
        self._facts = facts
        self._answering: dict[str, bool] = {}
        """Member of a live run -> whether it does; asked once."""
        self._changed = threading.Condition()
        self.node = Node(own_host(cfg.elastic.host, cfg.elastic.lighthouse), security=security)
        run, fingerprint = (state.run, dict(state.fingerprint)) if state else ("doctor", {})
        self.node.identity = Identity(run, canonical(fingerprint).decode(), self.member)
        probing.serve(self.node, cfg.elastic.congestion, self._leave)
        try:
            self.endpoint = published(self.node, cfg.elastic.gateway, cfg.elastic.dial_only, f"{self.member}.0")
            entry = {"member": self.member, "endpoint": self.endpoint, "facts": dict(facts)}
            store.write(self._key, json.dumps(entry).encode())
        except BaseException:
            self.node.close()
            raise

    @property
    def _key(self) -> str:
        return f"{FOLDER}/{self.member}.json"

    def _leave(self, member: str) -> None:
        with self._changed:
            self._left.add(member)
            self._changed.notify_all()

    def find(self, count: int, seconds: float) -> list[Peer]:
        """Those of the run, once `count` are there, or after some seconds."""
        until = time.monotonic() + seconds
        while True:
            found = self._look()
            if len(self.regions(found)) >= count or time.monotonic() > until:
                return found
            time.sleep(POLL)

    def regions(self, peers: Sequence[Peer]) -> set[str]:
        """Those of them that are there, and not this one, which may have more machines."""
        return {region_of(peer.member) for peer in peers if self._there(peer)} - {self.cfg.region.name}

    def _there(self, peer: Peer) -> bool:
        """The journal has members that died. Of one that only dials out nobody can tell."""
        if peer.facts or not all(peer.endpoints):
            return True
        if peer.member not in self._answering:
            try:
                self.node.release(self.node.dial(peer.endpoints[0], "probe", probing.SILENCE)[0])
                self._answering[peer.member] = True
            except OSError:
                self._answering[peer.member] = False
        return self._answering[peer.member]

    def remembered(self, peers: Sequence[Peer]) -> list[dict[str, Any]]:
        """Devices of live members, which have no time for a measurement: as their last doctors found them."""
        regions, found = {region_of(peer.member) for peer in peers if not peer.facts}, list[dict[str, Any]]()
        for key in self.store.list(RATES) if regions else ():
            with suppress(FileNotFoundError, RecursionError, *NONSENSE):
                devices = parse_devices(json.loads(self.store.read(key)))
                found += [device for device in devices if device["where"].partition("/")[0] in regions]
        return found

    def _look(self) -> list[Peer]:
        """Doctors, and members of a live run in regions that have none."""
        doctors = self._doctors()
        there = {self.cfg.region.name, *(region_of(peer.member) for peer in doctors)}
        ended = self.state is None or self.state.stopped is not None
        members = [] if ended or self.state is None else list(self.state.members.values())
        living = [Peer(m.id, (*m.data, *m.endpoints), {}) for m in members if m.region not in there]
        return [*living, *doctors]

    def _doctors(self) -> list[Peer]:
        found = []
        for key, age in self.store.ages(FOLDER).items():
            if key == self._key or age > STALE:
                continue
            with suppress(FileNotFoundError, RecursionError, *NONSENSE):  # it is gone, or no doctor wrote it
                found.append(parse(self.store.read(key)))
        return found

    def close(self, peers: Sequence[Peer]) -> None:
        """Stays until the doctors among them have measured the way here. What stays is how fast these devices are."""
        doctors = {peer.member for peer in peers if peer.facts and self.endpoint}
        with self._changed:
            self._changed.wait_for(lambda: doctors <= self._left, BRIEFLY)
            self._changed.wait_for(lambda: doctors & self.reached <= self._left, LINGER - BRIEFLY)
        self.node.close()
        self.store.delete(self._key)
        if devices := self._facts.get("devices"):
            self.store.write(f"{RATES}/{devices[0]['where'].replace('/', '=')}.json", json.dumps(devices).encode())


def examine(meeting: Meeting, peer: Peer, seconds: float) -> list[Finding]:
    """The way to a peer: its first port is measured, the others are dialled. seconds: of a flood."""
    name, elastic = f"peer {region_of(peer.member)}", meeting.cfg.elastic
    if not all(peer.endpoints):
        if meeting.endpoint:
            return [Finding(name, OK, "only dials out: it measures the way here")]
        return [
            Finding(
                name, FAIL, "neither can be dialled", "set elastic.gateway, or elastic.dial_only=false, in one of them"
            )
        ]
    ports = ", ".join(peer.endpoints)
    try:
        way = probing.measure(meeting.node, peer.endpoints[0], meeting.endpoint, seconds, elastic.congestion)
        for endpoint in peer.endpoints[1:]:
            meeting.node.release(meeting.node.dial(endpoint, "probe", probing.SILENCE)[0])
    except OSError as error:
        if not peer.facts:
            found = f"{peer.member} at {ports} is in the journal, and does not answer: {error}"
            return [Finding(name, WARN, found, "its run may have ended; if not, open the way there")]
        remedy = (
            "open the way from here to there, all ports (or elastic.gateway), and use the same certificates or secret"
        )
        return [Finding(name, FAIL, f"{peer.member} at {ports}: {error}", remedy)]
    meeting.reached.add(peer.member)
    found = (
        f"round trip {1000 * way.rtt:.1f} ms, {way.up * 8e-6:,.0f} Mbit/s up, {way.down * 8e-6:,.0f} Mbit/s down, "
        f"{'ports open both ways' if way.back == probing.OPEN else 'its ports are open'}"
    )
    values = {"member": peer.member, "rtt": way.rtt, "up": way.up, "down": way.down}
    findings = [Finding(name, OK, found, values=values), clock(f"{region_of(peer.member)}'s", way.clock)]
    if way.back in (probing.REFUSED, probing.SILENT):
        here = meeting.endpoint.partition(":")[0]
        remedy = f"open all ports of {here} for it, or set elastic.gateway or elastic.dial_only=true"
        findings.append(Finding(name, FAIL, f"it cannot dial {meeting.endpoint}: {way.back}", remedy))
    return findings
