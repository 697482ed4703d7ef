"""`python -m tests.bench.frames [--repeat N]`: CPU-seconds that a GB of frames takes over loopback, both ends together, with
system calls: a checksum alone, a run secret, TLS. Taken in turns, so that they meet the same machine."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from statistics import median

from elastic.node import Identity, Node
from elastic.security import OPEN, Security, choose
from elastic.wire import Connection, Message
from launch.certs import issue
from tests.bench._table import Row, show

PAYLOAD = 128 << 10
"""Bytes of a frame, as the exchange's are."""
FRAMES = 1500


def cost(mine: Security, theirs: Security) -> float:
    """s/GB."""
    dialler, other = Node("127.0.0.1", security=mine), Node("127.0.0.1", security=theirs)
    dialler.identity, other.identity = Identity("bench", "{}", "us_1"), Identity("bench", "{}", "eu_1")
    done = threading.Event()

    def swallow(connection: Connection, hello: Message) -> None:
        for _ in range(FRAMES):
            connection.receive()
        done.set()

    other.handlers["data"] = swallow
    payload = memoryview(os.urandom(PAYLOAD))
    with closing(dialler), closing(other):
        connection, _ = dialler.dial(other.endpoint, "data")
        begin = time.process_time()
        for first in range(FRAMES):
            connection.send({"type": "part", "attempt": "a" * 32, "first": first}, payload)
        assert done.wait(60)
        return (time.process_time() - begin) / (FRAMES * PAYLOAD * 1e-9)


def rows(cases: Mapping[str, tuple[Security, Security]], repeat: int) -> Iterator[Row]:
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeat):
        for name, both in cases.items():
            found[name].append(cost(*both))
    least = median(found["crc32"])
    for name, costs in found.items():
        yield Row(name, median(costs), "s/GB")
        yield Row(f"{name} ÷ crc32", median(costs) / least, "x")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.frames", description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        certs, secret = Path(directory) / "certs", Path(directory) / "secret"
        issue(certs, ["eu", "us"])
        secret.write_text(secrets.token_hex(16))
        shared = Security(secret_from=str(secret))
        tls = choose(str(certs), "", "us"), choose(str(certs), "", "eu")
        cases = {"crc32": (OPEN, OPEN), "run secret": (shared, shared), "TLS": tls}
        return show("frames", list(rows(cases, options.repeat)))


if __name__ == "__main__":
    sys.exit(main())
