"""torchft's lighthouse: discovery and failure detection. Soft state: it may vanish or restart without harm.

`python -m elastic.lighthouse [--bind 127.0.0.1:29510]` runs one and prints its address. It has no authentication of its
own: bind it to loopback, or to a network that only the run's members reach.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

os.environ.setdefault("RUST_LOG", "error")  # it logs every member's data otherwise; read when torchft is imported

from torchft.coordination import LighthouseClient, LighthouseServer, QuorumMember

HEARTBEAT_TIMEOUT = 5.0
"""Seconds without a heartbeat after which the lighthouse takes a region for dead."""


@dataclass
class ElasticConfig:
    """Membership and the network between regions."""

    lighthouse: str = "http://127.0.0.1:29510"
    """The first region starts one there if nothing answers and the host is this machine."""
    start_regions: int = 1
    """How many regions to wait for before the first round."""
    min_regions: int = 1
    """Below this many connected regions no round begins."""
    host: str = ""
    """The address under which other regions reach this one's ranks; empty: loopback if the lighthouse is on loopback,
    this host's own address otherwise."""
    max_local_steps: int = 0
    """Inner steps that a region may take beyond its boundary while it cannot sync; 0: 4 x outer.sync_every."""
    lease_rounds: int = 20
    """Rounds without a sign of a region after which its data leases return to the pool."""
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


def host_port(address: str) -> tuple[str, int]:
    """Raises ValueError on anything but http://HOST:PORT or HOST:PORT."""
    host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not http://HOST:PORT")
    return host, int(port)


def is_local(host: str) -> bool:
    """This machine's loopback."""
    return host == "localhost" or host.startswith("127.") or host in ("::1", "[::1]")


def serve(host: str, port: int) -> tuple[LighthouseServer, str]:
    """Starts a lighthouse. Returns it and its address. Raises RuntimeError if the port is taken."""
    server = LighthouseServer(
        bind=f"{host}:{port}",
        min_replicas=1,
        join_timeout_ms=1000,  # None would mean 100 ms, too short to meet anybody
        quorum_tick_ms=50,
        heartbeat_timeout_ms=int(HEARTBEAT_TIMEOUT * 1000),
    )
    return server, f"http://{host}:{host_port(server.address())[1]}"


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


def find_or_serve(address: str, wait: float = 5.0) -> LighthouseServer | None:
    """Makes sure that a lighthouse answers at `address`, starting one if the host is this machine's loopback. Returns
    the server if this call started it. Raises LighthouseError."""
    host, port = host_port(address)
    deadline = time.monotonic() + wait
    while True:
        taken = answers(host, port)
        try:
            if taken:
                connect(f"http://{host}:{port}").heartbeat("probe_0", timeout=timedelta(seconds=2))
                return None
            if is_local(host):
                return serve(host, port)[0]
        except (RuntimeError, TimeoutError) as error:
            if time.monotonic() > deadline:
                what = "something that is not a lighthouse answers there" if taken else str(error)
                raise LighthouseError(
                    f"elastic.lighthouse={address} cannot be used: {what}; name another port"
                ) from None
        if not is_local(host) and time.monotonic() > deadline:
            raise LighthouseError(
                f"elastic.lighthouse={address} does not answer: start one there with "
                f"`python -m elastic.lighthouse --bind {host}:{port}`, or name the address of the one that runs"
            )
        time.sleep(0.2)


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m elastic.lighthouse", description=__doc__)
    parser.add_argument("--bind", default="127.0.0.1:29510", help="HOST:PORT; port 0 picks a free one")
    host, port = host_port(parser.parse_args().bind)
    server, address = serve(host, port)
    print(f"lighthouse {address}", flush=True)
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    done.wait()
    server.shutdown()


if __name__ == "__main__":
    main()
