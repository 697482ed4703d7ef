"""Ports for servers that tests start: below those that the kernel hands out by itself (ip_local_port_range), so that nobody
else gets one between the look and the start, and below those that a rendered Slurm script makes of its job's number."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

LOWEST, HIGHEST = 10_000, 20_000


def free_ports(count: int) -> list[int]:
    """Ports that were all free at once."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            # Not by the tests' own seed, which may be the same everywhere.
            port = random.SystemRandom().randrange(LOWEST, HIGHEST)
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


def free_port() -> int:
    return free_ports(1)[0]
