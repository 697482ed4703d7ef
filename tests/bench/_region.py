"""One region of the exchange benchmark, a process in a namespace of the WAN lab: reads commands as JSON lines, answers each
with one. The product's own exchange, the two baselines, and raw TCP run here on the same links."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diloco.averaging import Averaging
from diloco.codec import CodecConfig, build_codec
from diloco.fragments import Fragment, Slot
from elastic.exchange import Exchanger
from elastic.lighthouse import ElasticConfig
from elastic.node import Identity, Node
from elastic.order import Order, Outcome, Party
from elastic.security import ENVIRONMENT, Security
from tests.bench._worker import cpu_seconds, obey

RAW_SECONDS = 4.0
"""Of a raw TCP stream, after as long for its start."""


class Region:
    def __init__(self, me: int, address: str) -> None:
        self.me, self.node = me, Node(address, security=Security(secret_from=f"${ENVIRONMENT}"))
        self.node.identity = Identity("bench", "{}", f"m{me}_{me}")
        self.endpoint = self.node.endpoint
        self.exchanger: Exchanger | None = None
        self.attempts = 0
        self.ended = threading.Condition()
        self.outcomes: dict[str, Outcome] = {}

    def load(self, elements: int, codec: str, **more: Any) -> dict[str, Any]:
        """A fragment of random pseudo-gradients."""
        generator = torch.Generator().manual_seed(self.me)
        self.delta = torch.randn(elements, generator=generator)
        self.zero = torch.zeros(elements)
        fragment = Fragment(0, (Slot("w", (elements,), 0),))
        self.averaging = Averaging([fragment], build_codec(CodecConfig(name=codec)))
        self.averaging.warm(False)
        if self.exchanger is None:
            how = {"congestion": ElasticConfig().congestion, **more}
            self.exchanger = Exchanger(self.node, self.averaging, 0, 60.0, **how)
            self.exchanger.on_outcome = self.end
        self.exchanger.arithmetic = self.averaging
        return {"endpoint": self.node.endpoint, "bytes": self.averaging.size(0, 0, fragment.blocks)}

    def end(self, outcome: Outcome) -> None:
        with self.ended:
            self.outcomes[outcome.attempt] = outcome
            self.ended.notify_all()

    def ours(self, endpoints: list[str], shares: list[int]) -> dict[str, Any]:
        """One exchange as in a run: contributions are encoded, frames tagged, and announced norms checked."""
        self.attempts += 1
        key, attempt = (0, 0, self.attempts), f"a{self.attempts}"
        assert self.exchanger is not None
        self.exchanger.offer(key, self.averaging.contribution(0, 0, self.averaging.blocks(0), self.delta, self.zero))
        norm = math.sqrt(self.delta.numel())  # everyone's, nearly
        parties = tuple(Party(f"m{k}_{k}", (endpoint,), 1.0, norm) for k, endpoint in enumerate(endpoints))
        before = cpu_seconds()
        self.exchanger.start(Order(attempt, key, parties, tuple(shares), self.me))
        with self.ended:
            self.ended.wait_for(lambda: attempt in self.outcomes)
        outcome = self.outcomes.pop(attempt)
        self.exchanger.decided(key)
        streams = [len(link.streams) for link in self.exchanger.links.all()]
        fields = {name: getattr(outcome, name) for name in ("seconds", "sent", "received", "up", "down", "reason")}
        return {**fields, "cpu": cpu_seconds() - before, "streams": max(streams, default=0)}

    # Peers

    def group(self, address: str, port: int, world: int) -> dict[str, Any]:
        """A Gloo process group over the WAN, for the baselines."""
        dist.init_process_group("gloo", f"tcp://{address}:{port}", rank=self.me, world_size=world)
        dist.barrier()
        return {}

    def gloo(self) -> dict[str, Any]:
        """All-reduce of fp32."""
        tensor = self.delta.clone()
        return self._timed(lambda: dist.all_reduce(tensor))

    def ring(self) -> dict[str, Any]:
        return self._timed(lambda: ring_all_reduce(self.delta.clone()))

    def _timed(self, work: Callable[[], Any]) -> dict[str, Any]:
        dist.barrier()
        begin = time.monotonic()
        work()
        return {"seconds": time.monotonic() - begin}

    # Raw TCP

    def listen(self) -> dict[str, Any]:
        server = socket.create_server((self.node.endpoint.split(":")[0], 0))
        threading.Thread(target=self._swallow, args=(server,), daemon=True).start()
        return {"port": server.getsockname()[1]}

    def _swallow(self, server: socket.socket) -> None:
        """Receives one stream and answers with its rate in bytes/s, the first seconds left out."""
        stream, _ = server.accept()
        server.close()
        buffer, got, begin = bytearray(1 << 20), 0, time.monotonic()
        while time.monotonic() - begin < 2 * RAW_SECONDS:
            n = stream.recv_into(buffer)
            got += n if time.monotonic() - begin >= RAW_SECONDS else 0
        stream.sendall(json.dumps(got / (time.monotonic() - begin - RAW_SECONDS)).encode() + b"\n")
        while stream.recv_into(buffer):
            pass
        stream.close()

    def raw(self, address: str, port: int) -> dict[str, Any]:
        """The rate that one TCP stream reaches to the listener there."""
        stream = socket.create_connection((address, port))
        stream.setblocking(False)
        data, answer = bytes(1 << 18), b""
        while not answer.endswith(b"\n"):
            try:
                stream.send(data)
            except BlockingIOError:
                time.sleep(0.001)
            with suppress(BlockingIOError):
                answer += stream.recv(100)
        stream.close()
        return {"rate": json.loads(answer)}


def ring_all_reduce(tensor: Tensor, buffers: int = 2) -> Tensor:
    """int8 ring all-reduce as in PRIME (arXiv 2412.01152, section 3.2): a reduce-scatter and an all-gather of world - 1 steps
    each, the data quantized anew at every hop, each step cut into buffers so that one is on its way while the other is
    quantized."""
    world, rank = dist.get_world_size(), dist.get_rank()
    right, left = (rank + 1) % world, (rank - 1) % world
    pieces = list(tensor.tensor_split(world))
    for step in range(2 * (world - 1)):
        gathering = step >= world - 1
        outgoing, incoming = pieces[(rank - step) % world], pieces[(rank - step - 1) % world]
        if gathering:
            outgoing, incoming = pieces[(rank - step + world) % world], pieces[(rank - step - 1 + world) % world]
        _hop(outgoing.tensor_split(buffers), incoming.tensor_split(buffers), right, left, gathering)
    return tensor.div_(world)


def _hop(outgoing: Any, incoming: Any, right: int, left: int, replace: bool) -> None:
    waiting = []
    for i, (out, into) in enumerate(zip(outgoing, incoming, strict=True)):
        scale = (out.abs().max() / 127).clamp_min(1e-12)
        values, scales = (out / scale).round_().to(torch.int8), scale.view(1)
        got, got_scale = torch.empty(into.numel(), dtype=torch.int8), torch.empty(1)
        work = [dist.isend(values, right, tag=2 * i), dist.isend(scales, right, tag=2 * i + 1)]
        work += [dist.irecv(got, left, tag=2 * i), dist.irecv(got_scale, left, tag=2 * i + 1)]
        waiting.append((into, got, got_scale, work, values, scales))
    for into, got, got_scale, work, *_ in waiting:
        for one in work:
            one.wait()
        decoded = got.float() * got_scale
        into.copy_(decoded) if replace else into.add_(decoded)


def main() -> None:
    me, address = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    devices = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for name in devices if name != "lo")
    obey(Region(me, address))


if __name__ == "__main__":
    main()
