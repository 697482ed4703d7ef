"""Held-out loss."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diloco.inner import Loss
from diloco.mixing import Samples
from diloco.parallel import Region


@torch.no_grad()
def evaluate(
    model: nn.Module, loss: Loss, dataset: Samples, region: Region, sequences: int, micro_batch: int
) -> tuple[float, int]:
    """Mean nll (nats per token) of the model as it is over the first held-out sequences, and how many tokens that is.
    Every rank takes part in every forward, so the sequences are rounded up to a multiple of the ranks. micro_batch:
    sequences per rank and forward; those of training need no more memory than training. Collective."""
    wanted = min(sequences, dataset.heldout_windows)
    per_rank = -(-wanted // region.dp)
    mine = [i % dataset.heldout_windows for i in range(region.dp_rank * per_rank, (region.dp_rank + 1) * per_rank)]
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    model.eval()
    for at in range(0, len(mine), micro_batch):
        windows = [torch.from_numpy(dataset.heldout(i)) for i in mine[at : at + micro_batch]]
        batch = torch.stack(windows).to(region.device)
        _, nll = loss(model, batch)
        tokens += batch[:, 1:].numel()
        total += nll.double().cpu() * batch[:, 1:].numel()
    if isinstance(model, FSDPModule):
        model.reshard()  # FSDP2 leaves the root gathered for a backward: the next forward would not see what is written
    model.train()
    sums = region.all_reduce_sum(torch.stack([total, torch.tensor(float(tokens), dtype=torch.float64)]))
    return (sums[0] / sums[1]).item(), int(sums[1].item()) // region.tp
