"""The inner loop: its speed against a bare PyTorch loop, and a rank's memory against what its state must take.

python -m tests.bench.inner [speed] [memory]     both by default, about five minutes on two cores
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

from diloco import exchanging
from diloco.composing import compose_config
from diloco.config import Config
from diloco.data import Dataset
from diloco.joining import join
from diloco.leaving import depart
from diloco.model import next_token_loss
from diloco.parallel import Region, open_region
from diloco.train import leave
from diloco.trainer import Order, Trainer, build_model
from elastic.process import fork
from tests.bench import _memory
from tests.bench._table import Row, at_least, show
from tests.ports import free_port

BLOCK = 25
"""Inner steps between two changes from one loop to the other; two blocks are a round."""
ROUNDS = 6
"""The first one is for warming up."""
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
"""Of both loops alike. One by default: a step of `tiny` is so short that threads wait for each other, and where anybody
else uses the machine, they do for seconds."""


class Bare:
    """What anybody would write: model, loss, clipping, fused AdamW, and batches that are in memory already."""

    def __init__(self, cfg: Config, region: Region, dataset: Dataset, vocab: int) -> None:
        inner = cfg.inner
        self.model = build_model(cfg, region, vocab)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), inner.lr, (inner.beta1, inner.beta2), inner.eps, inner.weight_decay, fused=True
        )
        self.clip = inner.clip
        self.batches = [dataset.batch(range(i * inner.batch, (i + 1) * inner.batch)) for i in range(BLOCK)]

    def block(self) -> float:
        """Seconds for BLOCK steps."""
        begin = time.perf_counter()
        for tokens in self.batches:
            loss, _ = next_token_loss(self.model, tokens.long())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - begin


class Interleaved(Trainer):
    """The real loop, which halts after every BLOCK inner steps for as many steps of the bare one.

    Time is cut where `train` asks for the next order, so that nothing it does falls between two pieces: an iteration
    with an inner step counts as such, with its order and its report; all others are the round.
    """

    def __init__(self, cfg: Config, region: Region) -> None:
        super().__init__(cfg, region)
        self.bare = Bare(cfg, region, self.dataset, self.dataset.source.vocab)
        self.bare.block()
        self.threads = set(os.listdir("/proc/self/task"))
        self.blocks: dict[str, list[float]] = {"loop": [], "bare": [], "others": []}
        self.rounds: list[float] = []
        self.spent = {True: 0.0, False: 0.0}
        self.mark, self.stepped = time.perf_counter(), False

    def next_order(self) -> Order:
        now = time.perf_counter()
        self.spent[self.stepped] += now - self.mark
        if self.stepped and self.clock.steps % BLOCK == 0:
            self.blocks["loop"].append(self.spent[True])
            before = self.busy()
            self.blocks["bare"].append(self.bare.block())
            self.blocks["others"].append(self.busy() - before)
            self.spent[True] = 0.0
            now = time.perf_counter()
        if self.stepped and self.clock.since == 1:
            self.rounds.append(self.spent[False])
            self.spent[False] = 0.0
        self.mark = now
        order = super().next_order()
        self.stepped = order.step
        return order

    def busy(self) -> float:
        """CPU seconds of the threads that joining the run has started: coordinator, heartbeats, lighthouse."""
        ticks = 0
        for thread in set(os.listdir("/proc/self/task")) - self.threads:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def speed(directory: Path) -> list[Row]:
    cfg = compose_config(
        [
            "region.name=eu",
            f"run.dir={directory}",
            f"run.rounds={ROUNDS}",
            f"outer.sync_every={2 * BLOCK}",
            f"elastic.lighthouse=http://127.0.0.1:{free_port()}",
        ]
    )
    exchanges = fork(exchanging.main)
    torch.set_num_threads(THREADS)
    with ExitStack() as stack, (directory / "log").open("w") as log, contextlib.redirect_stdout(log):
        trainer = Interleaved(cfg, open_region(cfg.parallel))
        join(trainer, stack, exchanges)
        stack.callback(trainer.report.close)
        trainer.train()
        depart(trainer)
    loop, bare, others = (trainer.blocks[name][2:] for name in ("loop", "bare", "others"))
    tokens = BLOCK * trainer.tokens_per_step
    pairs = median(b / a for a, b in zip(loop, bare, strict=True))
    one_round = median(trainer.rounds[2:])
    return [
        Row(f"bare PyTorch loop, {THREADS} thread(s)", tokens / median(bare), "tokens/s"),
        Row(f"inner loop with everything on, {THREADS} thread(s)", tokens / median(loop), "tokens/s"),
        at_least("inner loop / bare loop, of the medians", 100 * median(bare) / median(loop), "%", 95),
        Row("inner loop / bare loop, median of neighbours", 100 * pairs, "%"),
        Row("background threads during the bare loop", 100 * sum(others) / sum(bare), "% of time"),
        Row("a round: snapshot to evaluation and checkpoint", one_round, "s"),
        Row(f"rounds' share of the time at H={2 * BLOCK}", 100 * one_round / (2 * median(loop) + one_round), "%"),
    ]


def main(wanted: list[str]) -> int:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        if "speed" in wanted:
            print(f"speed: {ROUNDS} rounds of {2 * BLOCK} steps, and as many bare steps between them …", flush=True)
            rows += speed(Path(directory))
        if "memory" in wanted:
            for ranks in (1, 2):
                print(f"memory: {_memory.ROUNDS} rounds at 150m on {ranks} rank(s) …", flush=True)
                rows += _memory.measure(Path(directory) / f"memory-{ranks}", ranks)
    return show("inner", rows)


if __name__ == "__main__":
    leave(main(sys.argv[1:] or ["speed", "memory"]))
