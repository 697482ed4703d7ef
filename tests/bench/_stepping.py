"""A process in a namespace of the WAN lab that takes real inner steps, exchanges in the background, or does both at a time:
started by tests.bench.overlap. Reads commands as JSON lines, answers each with one."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import torch

from diloco import exchanging
from diloco.averaging import Averaging
from diloco.codec import CodecConfig, build_codec
from diloco.composing import compose_config
from diloco.data import Dataset, build_source
from diloco.exchanging import Setup
from diloco.fragments import BLOCK, Fragment, Slot
from diloco.inner import Inner
from diloco.parallel import open_region
from diloco.trainer import build_model, load_loss
from elastic.lighthouse import ElasticConfig
from elastic.memory import Pipe, shared_zeros
from elastic.order import Order, Outcome, Party
from elastic.plan import ownership
from elastic.process import Exchange, fork
from tests.bench._worker import cpu_seconds, obey


class Worker:
    """A member of exchanges between two, and a model to train meanwhile."""

    def __init__(self, exchanges: Pipe, me: int, address: str, elements: int) -> None:
        self.me, codec = me, CodecConfig("int8")
        fragment = Fragment(0, (Slot("w", (elements,), 0),))
        self.averaging = Averaging([fragment], build_codec(codec), zeros=shared_zeros)
        self.exchange = Exchange(exchanges, lambda: print("the process of the exchanges has ended", flush=True))
        self.exchange.on_outcome = self.end
        identity = {"run": "bench", "fingerprint": "{}", "member": f"m_{me}", "rank": 0}
        congestion = ElasticConfig().congestion
        setup = Setup(
            identity, address, [elements], BLOCK, vars(codec), compile=True, stall=60.0, congestion=congestion
        )
        self.endpoint = self.exchange.open(setup.message())["endpoint"]
        self.ended = threading.Condition()
        self.outcomes: dict[str, Outcome] = {}
        self.delta, self.zeros = shared_zeros(elements), shared_zeros(elements)
        self.delta.normal_(generator=torch.Generator().manual_seed(me))

    def end(self, outcome: Outcome) -> None:
        with self.ended:
            self.outcomes[outcome.attempt] = outcome
            self.ended.notify_all()

    def exchanges(self, members: list[list[Any]], names: list[str]) -> dict[str, Any]:
        """One after the other. members: [number, endpoint] of each; names: of the attempts, the same at both ends."""
        parties = tuple(Party(f"m_{number}", (endpoint,), 1.0) for number, endpoint in members)
        place = [number for number, _ in members].index(self.me)
        begin, cpu, sent = time.monotonic(), cpu_seconds(), 0
        for name in names:
            key = (0, 0, int(name))
            contribution = self.averaging.contribution(0, 0, self.averaging.blocks(0), self.delta, self.zeros)
            self.exchange.offer(key, contribution)
            self.exchange.start(Order(name, key, parties, tuple(ownership([1.0, 1.0])), place))
            with self.ended:
                self.ended.wait_for(lambda name=name: name in self.outcomes)  # type: ignore[misc]
            outcome = self.outcomes.pop(name)
            assert outcome.digests is not None, outcome.reason
            self.exchange.decided(key)
            sent += outcome.sent
        return {"seconds": time.monotonic() - begin, "cpu": cpu_seconds() - cpu, "sent": sent}

    def build(self, overrides: list[str]) -> dict[str, Any]:
        """The model, and a few steps that do not count."""
        cfg = compose_config(["region.name=eu", *overrides])
        region = open_region(cfg.parallel)
        source = build_source(cfg.data)
        model = build_model(cfg, region, source.vocab)
        self.inner = Inner(cfg.inner, model, load_loss(cfg), region)
        self.batch = Dataset(source, cfg.inner.seq_len, cfg.data.holdout, 0).batch(range(cfg.inner.batch))
        return self.steps(3.0)

    def steps(self, seconds: float) -> dict[str, Any]:
        """Inner steps for so long."""
        done = threading.Event()
        timer = threading.Timer(seconds, done.set)
        timer.start()
        return self._until(done)

    def both(self, members: list[list[Any]], names: list[str]) -> dict[str, Any]:
        """Inner steps for as long as the exchanges in the background take."""
        done, found = threading.Event(), dict[str, Any]()

        def work() -> None:
            found.update(self.exchanges(members, names))
            done.set()

        threading.Thread(target=work, daemon=True).start()
        return {**self._until(done), "exchange": found}

    def _until(self, done: threading.Event) -> dict[str, Any]:
        count, begin = 0, time.monotonic()
        while not done.is_set():
            self.inner.step(self.batch, 0.5)
            count += 1
        return {"rate": count / (time.monotonic() - begin)}


def main() -> None:
    exchanges = fork(exchanging.main)
    torch.set_num_threads(1)
    obey(Worker(exchanges, int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))


if __name__ == "__main__":
    main()
