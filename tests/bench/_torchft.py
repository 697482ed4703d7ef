"""One replica of stock torchft 0.2.0, `Manager` + `DiLoCo`, on the model and the steps of tests.bench._failing: the peer of
tests.bench.failover.

Every silence that torchft can be told of is SILENCE, as in the product; the rest is left at its defaults. Writes metrics.jsonl
in run.dir/<region> with the fields of the product's that the benchmark reads.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("RUST_LOG", "error")

import torch
from torch import nn
from torch.distributed import TCPStore
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from diloco.composing import compose_config
from diloco.data import Dataset, build_source
from diloco.inner import Inner
from diloco.metrics import Metrics
from diloco.parallel import open_region
from diloco.train import leave
from diloco.trainer import build_model, load_loss
from tests.bench._failing import drawn_out, hang_on_signal, hold
from tests.ports import free_port

SILENCE = 5.0
REGIONS = 3
HELD = 3
"""At which of a sync's all-reduces a replica holds: the others wait in the same one."""


class Group(ProcessGroupGloo):
    """Gloo that can be held in the middle of a sync."""

    calls = 0

    def allreduce(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls % HELD == 0:
            hold()
        return super().allreduce(*arguments)


def build_manager(name: str, address: str, model: nn.Module, inner: Inner) -> Manager:
    port = free_port()
    global store  # lives as long as the process
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.optimizer.load_state_dict(state["optimizer"])

    return Manager(
        pg=Group(timeout=timedelta(seconds=SILENCE)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.optimizer.state_dict()},
        min_replica_size=1,
        use_async_quorum=False,  # DiLoCo asks for it
        timeout=timedelta(seconds=SILENCE),
        connect_timeout=timedelta(seconds=SILENCE),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=port,
        lighthouse_addr=address,
        replica_id=name,
        hostname="127.0.0.1",
        init_sync=False,  # all begin with the same parameters
    )


def meet(directory: Path, name: str) -> None:
    """A quorum is of who is there: all begin at once."""
    (directory / f"{name}.ready").touch()
    while len(list(directory.glob("*.ready"))) < REGIONS:
        time.sleep(0.01)


def digest(model: nn.Module) -> str:
    data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(data).hexdigest()


def main(overrides: list[str]) -> int:
    cfg = compose_config(overrides)
    torch.set_num_threads(1)
    region = open_region(cfg.parallel)
    source = build_source(cfg.data)
    model = build_model(cfg, region, source.vocab)
    inner = Inner(cfg.inner, model, load_loss(cfg), region)
    data = Dataset(source, cfg.inner.seq_len, cfg.data.holdout, cfg.run.seed)
    outer = torch.optim.SGD(model.parameters(), lr=cfg.outer.lr, momentum=cfg.outer.momentum, nesterov=True)
    manager = build_manager(f"{cfg.region.name}_0", cfg.elastic.lighthouse, model, inner)
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    hang_on_signal()
    meet(Path(cfg.run.dir), cfg.region.name)
    step, take, every = 0, drawn_out(inner), cfg.outer.sync_every
    metrics = Metrics(Path(cfg.run.dir) / cfg.region.name / "metrics.jsonl")
    with DiLoCo(manager, [model], inner.optimizer, outer, every):
        while not leaving.is_set():
            step, before = step + 1, manager.current_step()
            take(data.batch(range(step * cfg.inner.batch, (step + 1) * cfg.inner.batch)), 0.5)
            if step % every == 0:
                committed = manager.current_step() > before
                metrics.write("round", step=step, committed=committed, seq=manager.current_step(), digest=digest(model))
            metrics.write("step", step=step)
    manager.shutdown()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
