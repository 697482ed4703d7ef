"""Started by test_parallel under torchrun: trains small models on several meshes of the same ranks, prints JSON.

`train` is also what the test runs in its own process, as one unwrapped rank, for the reference.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from diloco.evaluate import evaluate
from diloco.inner import Inner, InnerConfig
from diloco.model import build_llama, llama_plan, next_token_loss
from diloco.parallel import ParallelConfig, Plan, Region, grad_norm, local_tensor, open_region, parallelize
from diloco.train import leave

LLAMA: dict[str, Any] = {"vocab": 128, "dim": 64, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": 96}
# The clip bites in every step, so that a wrong norm changes the curve.
INNER = InnerConfig(lr=3e-3, batch=8, micro_batch=2, seq_len=24, clip=0.25, z_loss=1e-3, schedule="constant")
STEPS = 8


def ffn_plan(model: nn.Module, tp: int) -> dict[str, ParallelStyle]:
    """Leaves matrices out, so that one AdamW group has parameters on both meshes."""
    return {name: style for name, style in llama_plan(model, tp).items() if ".ffn." in name}


@dataclass
class Case:
    tp: int
    tied: bool = False
    plan: Plan = llama_plan
    dtype: str = "float32"
    checkpoint_activations: bool = False
    compile: bool = False


CASES = {
    "fsdp2_tp2": Case(tp=2),
    "fsdp4": Case(tp=1),
    "tp4": Case(tp=4),
    "fsdp2_tp2_tied": Case(tp=2, tied=True),
    "fsdp4_tied": Case(tp=1, tied=True),
    "tp4_tied": Case(tp=4, tied=True),
    "fsdp2_tp2_part": Case(tp=2, plan=ffn_plan),
    "fsdp2_tp2_checkpoint": Case(tp=2, checkpoint_activations=True),
    "fsdp2_tp2_bf16": Case(tp=2, dtype="bfloat16"),
}


def batch(step: int) -> Tensor:
    """A learnable sequence: each token follows from the one before."""
    start = torch.randint(0, 128, (INNER.batch, 1), generator=torch.Generator().manual_seed(step))
    return (start + 5 * torch.arange(INNER.seq_len + 1)) % 128


def train(case: Case) -> dict[str, Any]:
    """Loss and norm curves, parameter names, and the 1-norm of every full parameter at the end."""
    cfg = ParallelConfig(
        tp=case.tp,
        device="cpu",
        dtype=case.dtype,
        checkpoint_activations=case.checkpoint_activations,
        compile=case.compile,
        timeout=120,
    )
    region = open_region(cfg)
    torch.manual_seed(0)
    model = parallelize(build_llama(**LLAMA, tied=case.tied), region, cfg, case.plan)
    inner = Inner(INNER, model, next_token_loss, region)
    inner.materialise()
    stats = [inner.step(batch(i).chunk(region.dp)[region.dp_rank], 1.0) for i in range(STEPS)]
    return {
        "nll": [s.nll.item() for s in stats],
        "grad_norm": [s.grad_norm for s in stats],
        "norm_again": _norm_without_inner(model, region),
        "parameters": {name: _full(p).abs().sum().item() for name, p in model.named_parameters()},
        "replicas_differ": _replicas_differ(model, region),
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        "held_out": _evaluate_and_write_twice(model, region),  # the last one: it changes the parameters
    }


def _full(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def _norm_without_inner(model: nn.Module, region: Region) -> float:
    objective, _ = next_token_loss(model, batch(0).chunk(region.dp)[region.dp_rank])
    objective.backward()
    norm = grad_norm(model.parameters(), region).item()
    model.zero_grad()
    return norm


class HeldOut:
    """As much of a Dataset as `evaluate` needs."""

    heldout_windows = INNER.batch

    def heldout(self, i: int, of: int) -> np.ndarray:
        return batch(0)[i].numpy()


@torch.no_grad()
def _evaluate_and_write_twice(model: nn.Module, region: Region) -> list[float]:
    """Held-out loss, and again after a write to the shards, as between two rounds."""
    losses, shards = [], list(model.parameters())
    for _ in range(2):
        losses.append(evaluate(model, next_token_loss, HeldOut(), region, INNER.batch, 2)[0])
        for p in shards:
            local_tensor(p).mul_(0.5)
    return losses


def _replicas_differ(model: nn.Module, region: Region) -> list[str]:
    """Parameters outside the plan whose bits are not the same on every tp rank."""
    different = []
    for name, p in model.named_parameters():
        if isinstance(p, DTensor) and "tp" not in (p.device_mesh.mesh_dim_names or ()):
            bits = _full(p).view(torch.int32).to(torch.int64)
            low, high = bits.clone(), bits.clone()
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
            if not torch.equal(low, high):
                different.append(name)
    return different


def bytes_round_trip(region: Region) -> list[bool]:
    """Rank 0's bytes arrive everywhere, the empty and the large too, whatever the others pass."""
    results = []
    for sent in (b"", b"\x00", b"a round", bytes(range(256)) * 5000):
        mine = sent if region.rank == 0 else (b"noise" if region.rank == 1 else None)
        arrived = torch.tensor(float(region.broadcast_bytes(mine) == sent))
        results.append(region.all_reduce_sum(arrived).item() == region.world)
    region.barrier()
    return results


def main(names: list[str]) -> None:
    region = open_region(ParallelConfig(tp=2, device="cpu", timeout=120))
    results: dict[str, Any] = {name: train(CASES[name]) for name in names}
    results["bytes"] = bytes_round_trip(region)
    results["place"] = [region.rank, region.world, region.dp, region.tp, region.dp_rank, region.tp_rank]
    region.close()
    if region.rank == 0:
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
    leave(0)  # Gloo's threads can abort the interpreter's finalization on a busy machine
