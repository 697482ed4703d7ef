"""torchft's lighthouse: discovery and failure detection. Soft state: it may vanish or restart without harm.

`python -m elastic.lighthouse --bind HOST:PORT [--tls DIR]` runs one and prints its address. It asks nobody who he is, and lets
anybody kill a member. So with TLS or a run secret the lighthouse itself is on loopback, and what listens on HOST:PORT is the
end of a tunnel (`elastic.tunnel`); regions bring the other end with them.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

os.environ.setdefault("RUST_LOG", "error")  # it logs every member's data otherwise; read when torchft is imported

from torchft.coordination import LighthouseClient, LighthouseServer, QuorumMember

from elastic.addresses import host_port, is_local
from elastic.handshake import Refused
from elastic.security import OPEN, Security
from elastic.service import serve
from elastic.tunnel import Entrance, Exit

HEARTBEAT_TIMEOUT = 5.0
"""Seconds without a heartbeat after which the lighthouse takes a region for dead."""


@dataclass
class ElasticConfig:
    """Membership and the network between regions."""

    lighthouse: str = "http://127.0.0.1:29510"
    """The first region starts one there if nothing answers and the host is this machine."""
    start_regions: int = 1
    """How many regions to wait for before the first round; where a run goes on, for `start_patience`."""
    start_patience: float = 60.0
    """Seconds for which a region that goes on with a run waits for `start_regions` before its first round."""
    min_regions: int = 1
    """Below this many connected regions no round begins."""
    host: str = ""
    """The address under which other regions reach this one's ranks; empty: loopback if the lighthouse is on loopback,
    this host's own address otherwise."""
    max_local_steps: int = 0
    """Inner steps that a region may take beyond its boundary while it cannot sync; 0: 4 x outer.sync_every."""
    lease_rounds: int = 20
    """Rounds without a sign of a region after which its data leases return to the pool."""
    max_norm_ratio: float = 10.0
    """A contribution whose norm per inner step is more than this multiple of the median of the fragment's last ones gets no
    weight, and its region starts again from the run's parameters; 0: none is rejected."""
    join_inner: str = "peer"
    """AdamW's moments of a region that joins and has none of its own stored: peer: as a living member has them; fresh: zero."""
    peer_timeout: float = 5.0
    """Seconds of silence on a control connection after which a peer is given up."""
    stall_timeout: float = 30.0
    """Seconds of silence after which a peer in an exchange is given up, at most: once its rate is known, by that."""
    hang_timeout: float = 4.5
    """Seconds after which a region whose main loop does not come back from an inner step leaves the others, at least: four times
    what a step takes, if that is more. The others know within 5 s then."""
    streams: int = 0
    """TCP streams per pair of ranks; 0: as many as the round trip and the rate ask for."""
    congestion: str = "bbr"
    """TCP congestion control of bulk data, if the kernel has it; empty: the kernel's default. Loss-based ones (cubic, reno)
    collapse at a percent of loss on long links; bbr does not."""
    gateway: str = ""
    """HOST:PORT of an `elastic.gateway` through which other regions reach this one's ranks; empty: directly."""
    dial_only: bool = False
    """Nobody can dial this region's ranks: they dial the others. Two such regions cannot meet without a gateway."""
    tls: str | list[str] = ""
    """A directory made by launch.certs, with this region's certificate, or the paths [authority, certificate, key, revocation
    list]; empty: no TLS."""
    secret_file: str = ""
    """Without TLS: a file with the run secret; empty: the environment variable DILOCO_SECRET. Needed unless everything is on
    loopback."""


class Lighthouse:
    """One that runs: at `host`:`port` (0: any free one), or behind a tunnel that ends there. Raises RuntimeError or OSError if
    the port is taken."""

    def __init__(self, host: str, port: int, security: Security = OPEN) -> None:
        secured = security.secured
        self._server = LighthouseServer(
            bind="127.0.0.1:0" if secured else f"{host}:{port}",
            min_replicas=1,
            join_timeout_ms=1000,  # None would mean 100 ms, too short to meet anybody
            quorum_tick_ms=50,
            heartbeat_timeout_ms=int(HEARTBEAT_TIMEOUT * 1000),
        )
        own = host_port(self._server.address())[1]
        self._exit: Exit | None = None
        try:
            self._exit = Exit(host, port, security, own) if secured else None
        except BaseException:
            self._server.shutdown()
            raise
        self.address = f"http://{host}:{self._exit.port if self._exit else own}"

    def shutdown(self) -> None:
        if self._exit is not None:
            self._exit.close()
        self._server.shutdown()


def reach(address: str, security: Security, member: str) -> AbstractContextManager[Entrance | None]:
    """What makes the lighthouse at `address` reachable as long as it is open: a tunnel's local end; None if it is reached
    directly."""
    return Entrance(*host_port(address), security, member) if security.secured else nullcontext()


def connect(address: str, timeout: float = 2.0) -> LighthouseClient:
    """Raises RuntimeError if nothing, or something else than a lighthouse, answers there."""
    return LighthouseClient(address, timedelta(seconds=timeout))


def answers(host: str, port: int) -> bool:
    """Whether anything listens there."""
    try:
        socket.create_connection((host, port), 2.0).close()
    except OSError:
        return False
    return True


class LighthouseError(RuntimeError):
    """The lighthouse cannot be reached or started; one sentence."""


class AwayError(LighthouseError):
    """Nothing answers there."""


def find_or_serve(address: str, wait: float = 5.0, security: Security = OPEN, region: str = "") -> Lighthouse | None:
    """Makes sure that a lighthouse answers at `address`, starting one if the host is this machine's loopback. Returns
    the lighthouse if this call started it. Raises LighthouseError."""
    host, port = host_port(address)
    deadline = time.monotonic() + wait
    with reach(address, security, f"{region}_0") as entrance:
        while True:
            taken = answers(host, port)
            try:
                if taken:
                    _probe(address, entrance)
                    return None
                if is_local(host):
                    return Lighthouse(host, port, security)
            except Refused as error:
                raise LighthouseError(
                    f"elastic.lighthouse={address} cannot be used: {error}; use TLS, or the run secret, alike everywhere"
                ) from None
            except (RuntimeError, OSError) as error:  # TimeoutError among them
                if time.monotonic() > deadline:
                    what = "something that is not a lighthouse answers there" if taken else str(error)
                    raise LighthouseError(
                        f"elastic.lighthouse={address} cannot be used: {what}; name another port"
                    ) from None
            if not is_local(host) and time.monotonic() > deadline:
                raise AwayError(
                    f"elastic.lighthouse={address} does not answer: start one there with "
                    f"`python -m elastic.lighthouse --bind {host}:{port}`, or name the address of the one that runs"
                )
            time.sleep(0.2)


def _probe(address: str, entrance: Entrance | None) -> None:
    """Raises RuntimeError or OSError unless a lighthouse answers."""
    if entrance is not None:
        entrance.knock().close()
        address = entrance.address
    connect(address).heartbeat("probe_0", timeout=timedelta(seconds=2))


Found = Callable[[dict[str, str]], None]


class Membership:
    """A region's side of the lighthouse: heartbeats while the region makes progress, and the question who is there,
    asked from a thread of its own and only when membership changes."""

    def __init__(self, address: str, member: str, endpoint: str, run: str, progress: Callable[[], bool], found: Found):
        self.address, self.member, self.endpoint, self.run = address, member, endpoint, run
        self.progress, self.found = progress, found
        self.reachable = True
        self._asked = threading.Event()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=t, name=t.__name__, daemon=True) for t in (self._beat, self._ask)]
        for thread in self._threads:
            thread.start()

    def ask(self) -> None:
        """Membership changed or is wanted: ask the lighthouse; `found` gets {member: endpoint of its rank 0}."""
        self._asked.set()

    def close(self) -> None:
        self._closed.set()
        self._asked.set()

    def _beat(self) -> None:
        client = None
        while not self._closed.wait(HEARTBEAT_TIMEOUT / 5):
            if not self.progress():
                continue
            try:
                client = client or connect(self.address)
                client.heartbeat(self.member, timeout=timedelta(seconds=2))
                self.reachable = True
            except (RuntimeError, TimeoutError):
                client, self.reachable = None, False  # soft state: connected peers go on without it

    def _ask(self) -> None:
        client = None
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._closed.is_set():
                return
            try:
                client = client or connect(self.address)
                self.found(self._members(client))
            except (RuntimeError, TimeoutError):
                client = None  # nobody else asked in time, or it is away; who asked will ask again

    def _members(self, client: LighthouseClient) -> dict[str, str]:
        client.heartbeat(self.member, timeout=timedelta(seconds=2))
        data: dict[object, object] = {"run": self.run}
        quorum = client.quorum(
            self.member, timedelta(seconds=HEARTBEAT_TIMEOUT), self.endpoint, self.endpoint, 1, 1, False, data
        )
        return {m.replica_id: m.address for m in quorum.participants if self._ours(m)}

    def _ours(self, member: QuorumMember) -> bool:
        return member.replica_id != self.member and (member.data or {}).get("run") == self.run


def main(argv: Sequence[str] | None = None) -> int:
    def open_at(host: str, port: int, security: Security) -> tuple[str, Callable[[], None]]:
        lighthouse = Lighthouse(host, port, security)
        return lighthouse.address, lighthouse.shutdown

    return serve("lighthouse", __doc__, "127.0.0.1:29510", open_at, argv)


if __name__ == "__main__":
    sys.exit(main())
