"""Serving what other members lack: blocks of planes, their digests, and the bits of committed rounds; and asking one for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic import tcp
from elastic.node import Node
from elastic.plan import chunks, rank_blocks
from elastic.wire import MAX_PAYLOAD, Connection, Message

STALL = 10.0
"""Seconds of silence after which a donor is given up."""
NOTHING = -1
"""The base of who does not have what is asked for."""


class Unavailable(OSError):
    """No member that can be reached has what is asked for."""


@dataclass(frozen=True)
class Donor:
    member: str
    endpoints: tuple[str, ...]
    """Of its ranks."""


Read = Callable[[str, int, int, int], tuple[int, Tensor] | None]
"""(plane, fragment, first block, last block) -> (base: seq of the last round in it, copy of the data), or None."""


def serve(node: Node, read: Read, congestion: str = "") -> None:
    """Answers fetch connections from `read`, each in a thread of its own. An ask may say which base it wants. Asks may be
    sent ahead of their answers, which come in order."""

    def handler(connection: Connection, hello: Message) -> None:
        tcp.tune(connection.sock, congestion)
        while True:
            ask, _ = connection.receive()
            found = read(str(ask["plane"]), int(ask["fragment"]), int(ask["first"]), int(ask["last"]))
            base, data = (NOTHING, None) if found is None else found
            if data is None or ask.get("base", base) != base:
                connection.send({"type": "none", "base": base})
            else:
                connection.send({"type": "blocks", "base": base}, data.view(torch.uint8).numpy().data)

    node.handlers["fetch"] = handler


def ask(connection: Connection, plane: str, fragment: int, first: int, last: int, base: int | None = None) -> None:
    """Raises OSError."""
    wanted = {} if base is None else {"base": base}
    connection.send({"type": "ask", "plane": plane, "fragment": fragment, "first": first, "last": last, **wanted})


def answer(connection: Connection) -> tuple[int, bytearray | None]:
    """The base that the donor has, and the data if it is the one that was asked for. Raises OSError, KeyError or ValueError."""
    reply, payload = connection.receive()
    return int(reply["base"]), payload if reply["type"] == "blocks" else None


class Lines:
    """Connections to donors' ranks that nobody is using: who asks next need not dial, and finds a congestion window."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._idle: dict[tuple[str, int], Connection] = {}
        self._closed = False

    def take(self, donor: Donor, rank: int, timeout: float = STALL) -> Connection:
        """timeout: seconds of silence. Raises OSError."""
        if connection := self._idle.pop((donor.member, rank), None):
            connection.sock.settimeout(timeout)
            return connection
        return self.node.dial(donor.endpoints[rank], "fetch", timeout)[0]

    def give(self, donor: Donor, rank: int, connection: Connection) -> None:
        """Nothing is under way on it."""
        self._idle[donor.member, rank] = connection
        if self._closed:
            self.close()

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self.node.release(self._idle.popitem()[1])


def read_all(
    lines: Lines, donor: Donor, plane: str, fragments: Sequence[tuple[int, int]], nbytes: int
) -> list[tuple[int, list[bytearray]]]:
    """Everything that a donor has of a plane with `nbytes` a block: (base, runs of blocks in order) of each fragment; the
    base is NOTHING if its ranks differ. fragments: (index, blocks). Raises OSError."""
    bases: list[set[int]] = [set() for _ in fragments]
    runs: list[list[bytearray]] = [[] for _ in fragments]
    for rank in range(len(donor.endpoints)):
        connection = lines.take(donor, rank)
        try:
            for i, (f, blocks) in enumerate(fragments):
                for first, last in chunks(*rank_blocks(blocks, rank, len(donor.endpoints)), MAX_PAYLOAD // nbytes):
                    ask(connection, plane, f, first, last)
                    base, data = answer(connection)
                    bases[i].add(base)
                    runs[i].append(data or bytearray())
        except BaseException:
            lines.node.release(connection)
            raise
        lines.give(donor, rank, connection)
    return [(base.pop() if len(base) == 1 else NOTHING, run) for base, run in zip(bases, runs, strict=True)]


def base_of(node: Node, donor: Donor, plane: str, fragment: int) -> int:
    """The seq of the last round in what a donor has. Raises OSError."""
    connection, _ = node.dial(donor.endpoints[0], "fetch", STALL)
    try:
        ask(connection, plane, fragment, 0, 0)
        return answer(connection)[0]
    finally:
        node.release(connection)
