"""The process that does a rank's exchanges (`elastic.process`): what it is told at its start, and what it makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from ckpt.store import Store
from diloco.averaging import Averaging
from diloco.checkpoints import save_bits
from diloco.codec import CodecConfig, build_codec
from diloco.fragments import Fragment, Slot
from elastic import probing
from elastic.exchange import Exchanger
from elastic.memory import Pipe
from elastic.node import Identity, Node
from elastic.process import serve
from elastic.security import Security


@dataclass(frozen=True)
class Setup:
    """All of it plain values, for it goes through a pipe."""

    identity: dict[str, Any]
    host: str
    """Where it listens."""
    elements: Sequence[int]
    """Of every fragment."""
    block: int
    codec: dict[str, Any]
    compile: bool
    stall: float
    streams: int = 0
    congestion: str = ""
    security: dict[str, Any] = field(default_factory=dict)
    gateway: str = ""
    dial_only: bool = False
    store: str = ""
    """Where the bits of a round go before it counts as held, if its order says so; empty: they stay here."""

    def message(self) -> dict[str, Any]:
        return asdict(self)


def main(pipe: Pipe) -> None:
    """Until the rank ends, which raises ConnectionError. The answer to the setup is {endpoint}, or {error}."""
    message, _ = pipe.receive()
    setup = Setup(**message)
    torch.set_num_threads(1)
    codec = CodecConfig(**setup.codec)
    fragments = [Fragment(f, (Slot("", (n,), 0),), setup.block) for f, n in enumerate(setup.elements)]
    averaging = Averaging(fragments, build_codec(codec), codec.feedback_decay)
    if setup.compile:
        averaging.warm(codec.error_feedback)  # if it cannot be, the rank says so: it compiles the same
    node = Node(setup.host, security=Security(**setup.security))
    node.identity = identity = Identity(**setup.identity)
    probing.serve(node, setup.congestion)
    exchanger = Exchanger(node, averaging, identity.rank, setup.stall, setup.streams, setup.congestion)
    if setup.store:
        exchanger.keep = partial(save_bits, Store(setup.store), identity.run)
    try:
        name = f"{identity.member}.{identity.rank}.data"
        pipe.send({"endpoint": published(node, setup.gateway, setup.dial_only, name)})
    except OSError as error:
        pipe.send({"error": str(error)})
    serve(pipe, exchanger, averaging.rebuild)


def published(node: Node, gateway: str, dial_only: bool, name: str) -> str:
    """The endpoint under which other regions dial this node; empty if they cannot. name: at the gateway, if there is one.
    Raises OSError if that does not answer."""
    if gateway:
        return node.register(gateway, name)
    return "" if dial_only else node.endpoint
