"""Fetching what a member lacks from the other members: blocks of θ and momentum, and the bits of committed rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.node import Node
from elastic.plan import chunks, rank_blocks
from elastic.wire import Connection, Message

TIMEOUT = 30.0
"""Seconds for one reply."""


class Unavailable(OSError):
    """No member that can be reached has what is asked for."""


@dataclass(frozen=True)
class Piece:
    """Blocks [first, last) of a plane as one donor rank had them: bytes, and the seq of the last round in them."""

    first: int
    last: int
    base: int
    data: Tensor


Read = Callable[[str, int, int, int], tuple[int, Tensor] | None]
"""(plane, fragment, first block, last block) -> (base, tensor), or None. plane is theta, momentum, or bits/<seq>."""


def serve(node: Node, read: Read) -> None:
    """Answers fetch connections from `read`, in threads of their own."""

    def handler(connection: Connection, hello: Message) -> None:
        while True:
            ask, _ = connection.receive()
            found = read(str(ask["plane"]), int(ask["fragment"]), int(ask["first"]), int(ask["last"]))
            if found is None:
                connection.send({"type": "none"})
            else:
                base, data = found
                connection.send({"type": "blocks", "base": base}, data.view(torch.uint8).numpy().data)

    node.handlers["fetch"] = handler


def fetch(
    node: Node, donors: Sequence[tuple[str, ...]], blocks: int, plane: str, fragment: int, first: int, last: int
) -> list[Piece]:
    """Blocks [first, last) from the first donor (its ranks' endpoints) that has them all. Raises Unavailable."""
    reasons = []
    for endpoints in donors:
        try:
            return _from_donor(node, endpoints, blocks, plane, fragment, first, last)
        except OSError as error:
            reasons.append(str(error))
    raise Unavailable(
        f"no member has {plane} of fragment {fragment}: {'; '.join(reasons) or 'there is no other member'}"
    )


def _from_donor(
    node: Node, endpoints: tuple[str, ...], blocks: int, plane: str, fragment: int, first: int, last: int
) -> list[Piece]:
    pieces = []
    for rank, endpoint in enumerate(endpoints):
        a, b = rank_blocks(blocks, rank, len(endpoints))
        a, b = max(a, first), min(b, last)
        if a < b:
            connection, _ = node.dial(endpoint, "fetch", TIMEOUT)
            try:
                pieces += [_ask(connection, plane, fragment, *chunk) for chunk in chunks(a, b)]
            finally:
                node.release(connection)
    return pieces


def _ask(connection: Connection, plane: str, fragment: int, first: int, last: int) -> Piece:
    connection.send({"type": "ask", "plane": plane, "fragment": fragment, "first": first, "last": last})
    reply, payload = connection.receive()
    if reply.get("type") != "blocks":
        raise Unavailable(f"{connection.sock.getpeername()} does not have them")
    return Piece(first, last, int(reply["base"]), torch.frombuffer(payload, dtype=torch.uint8))
