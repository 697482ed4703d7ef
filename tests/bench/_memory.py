"""A rank's memory at 150m: started by tests.bench.inner, one process a rank, each a region's rank of its own.

Growth is the peak of the resident memory since just before the model was built (VmHWM, which writing 5 to clear_refs
resets), over everything a rank does: theta_0's checkpoint, steps, and rounds with exchange, evaluation and checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from diloco import exchanging
from diloco.composing import compose_config
from diloco.joining import join
from diloco.leaving import depart
from diloco.parallel import open_region
from diloco.train import leave
from diloco.trainer import Order, Trainer
from elastic.process import fork
from tests.bench._table import Row, at_most
from tests.ports import free_port

SEQ_LEN = 128
"""Short, and one sequence a rank: two cores do a step in a second or two, and activations hide nothing."""
SYNC_EVERY = 2
ROUNDS = 2
MIB = 2**20


def overrides(directory: Path, ranks: int) -> list[str]:
    return [
        "region.name=eu",
        "model=150m",
        f"run.dir={directory}",
        f"run.rounds={ROUNDS}",
        "run.eval_sequences=8",
        f"outer.sync_every={SYNC_EVERY}",
        f"inner.batch={ranks}",
        f"inner.seq_len={SEQ_LEN}",
        "ckpt.keep=1",
        f"elastic.lighthouse=http://127.0.0.1:{free_port()}",
    ]


def measure(directory: Path, ranks: int) -> list[Row]:
    """Runs the processes; the figures of the rank that needs most."""
    directory.mkdir()
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [sys.executable, "-m", *launcher, __name__, str(directory), *overrides(directory, ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    with (directory / "log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{(directory / 'log').read_text()[-3000:]}")
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("rank-*.json"))]
    return rows(max(found, key=lambda rank: rank["growth"]), ranks)


def rows(found: dict, ranks: int) -> list[Row]:
    case = f"150m, {ranks} rank(s): "
    formula = sum(found["terms"].values())
    lines = [Row(case + name, size / MIB, "MiB") for name, size in found["terms"].items()]
    lines += [Row(f"{case}peak while it {verb}", size / MIB, "MiB") for verb, size in found["peaks"].items()]
    return [
        *lines,
        Row(case + "formula, the sum of its terms", formula / MIB, "MiB"),
        at_most(case + "growth of resident memory", found["growth"] / MIB, "MiB", 1.15 * formula / MIB),
        Row(case + "growth / formula", 100 * found["growth"] / formula, "%"),
    ]


class Watched(Trainer):
    """Notes the peak of every verb; `base` is the resident memory before the model was built."""

    base = 0

    def __init__(self, *args) -> None:
        self.peaks: dict[str, int] = {}
        super().__init__(*args)

    def note(self, verb: str) -> None:
        self.peaks[verb] = max(self.peaks.get(verb, 0), status("VmHWM") - self.base)
        reset_peak()

    def next_order(self) -> Order:
        self.note("joins, or waits for an exchange")
        return super().next_order()

    def inner_step(self) -> None:
        super().inner_step()
        self.note("steps")

    def contribute(self, *args) -> None:
        super().contribute(*args)
        self.note("contributes")

    def merge(self, *args) -> None:
        super().merge(*args)
        self.note("merges, evaluates and saves")


def status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def terms(trainer: Trainer) -> dict[str, int]:
    """What a rank's state must take, in bytes: W ranks share N parameters."""
    world, n = trainer.region.world, trainer.parameters
    encoded = sum(trainer.averaging.size(f.index, 0, f.blocks) for f in trainer.fragments)
    counted = {
        "fp32 master, 4 N / W": 4 * n // world,
        "gradients, 4 N / W": 4 * n // world,
        "AdamW's moments, 8 N / W": 8 * n // world,
        "theta and outer momentum, 8 N / W": 8 * n // world,
        "exchange: snapshot, 4 N / W": 4 * n // world,
        "exchange: encoded contribution and result, 2 x 1.02 N / W": 2 * encoded // world,
        "activations: saved for backward, and 2 x logits": activations(trainer),
    }
    if world > 1:
        counted["FSDP: one module whole, 4 n, its gradients twice, 8 n"] = 12 * largest(trainer.model)
    return counted


def largest(model: nn.Module) -> int:
    """Parameters of the largest module that FSDP gathers at once: what is outside of the blocks, or one block."""
    sizes = {False: 0, True: 0}
    first = True
    for name, parameter in model.named_parameters():
        block = name.startswith("layers.")
        first = not block or name.startswith("layers.0.")
        sizes[block] += parameter.numel() * first
    return max(sizes.values())


def activations(trainer: Trainer) -> int:
    """Counted in one forward: every storage that autograd saves but parameters; and what the loss's backward adds, the
    gradients of the log-softmax's output and input."""
    inner, seen = trainer.inner, dict[int, int]()
    weights = {p.shape for p in trainer.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if whole.shape not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = trainer.dataset.batch(range(inner.share))[: inner.micro_batch].long()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective, _ = inner.loss(trainer.model, tokens)
    objective.backward()
    logits = inner.micro_batch * trainer.cfg.inner.seq_len * trainer.cfg.model.args["vocab"] * 4
    return sum(seen.values()) + 2 * logits


def main(directory: str, *arguments: str) -> int:
    cfg = compose_config(list(arguments))
    exchanges = fork(exchanging.main)
    with ExitStack() as stack:
        region = open_region(cfg.parallel)
        stack.callback(region.close)
        reset_peak()
        Watched.base = status("VmRSS")
        trainer = Watched(cfg, region)
        join(trainer, stack, exchanges)
        stack.callback(trainer.report.close)
        order = trainer.train()
        depart(trainer)
        found = {"growth": max(trainer.peaks.values()), "peaks": trainer.peaks, "terms": terms(trainer)}
        (Path(directory) / f"rank-{region.rank}.json").write_text(json.dumps(found))
        return 0 if order.clean else 1


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
