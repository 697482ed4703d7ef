"""Whole runs against an independent DiLoCo in plain PyTorch: nothing of ours but the model and the data."""

from __future__ import annotations

import copy

import pytest
import torch

from diloco.data import DataConfig, Dataset, build_source
from diloco.model import build_llama, next_token_loss
from tests.e2e.cluster import Cluster

ARGS = {"vocab": 256, "dim": 64, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 128, "tied": True}
BATCH, SEQ_LEN, LR = 4, 32, 1e-3
QUIET = ["inner.schedule=constant", "inner.warmup=0", f"inner.lr={LR}", "run.report_every=1", "codec=none"]


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))


def plain(
    members: int, rounds: int, sync_every: int, lr: float, momentum: float
) -> tuple[list[list[float]], list[float]]:
    """Training losses of each member by step, and the held-out loss after each round."""
    torch.manual_seed(0)
    shared = build_llama(**ARGS)
    workers = [copy.deepcopy(shared) for _ in range(members)]
    inner = [adamw(worker) for worker in workers]
    outer = torch.optim.SGD(shared.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    data = Dataset(build_source(DataConfig()), SEQ_LEN, 0.02, 0)
    leased = 5 * sync_every * BATCH  # each member's first lease: 4 H steps ahead and the round at hand
    losses: list[list[float]] = [[] for _ in workers]
    held_out = []
    for r in range(rounds):
        for k, worker in enumerate(workers):
            for step in range(r * sync_every, (r + 1) * sync_every):
                batch = data.batch(range(k * leased + step * BATCH, k * leased + (step + 1) * BATCH)).long()
                objective, nll = next_token_loss(worker, batch)
                objective.backward()
                torch.nn.utils.clip_grad_norm_(worker.parameters(), 1.0)
                inner[k].step()
                inner[k].zero_grad()
                losses[k].append(nll.item())
        with torch.no_grad():
            for p, *local in zip(shared.parameters(), *(w.parameters() for w in workers), strict=True):
                p.grad = torch.stack([p - x for x in local]).mean(dim=0)
            outer.step()
            for worker in workers:
                worker.load_state_dict(shared.state_dict())
            windows = torch.stack([torch.from_numpy(data.heldout(i, 4)) for i in range(4)])
            held_out.append(next_token_loss(shared, windows)[1].item())
    return losses, held_out


@pytest.mark.parametrize(
    ("members", "sync_every", "lr", "momentum", "rounds"),
    [(2, 4, 0.7, 0.9, 4), (1, 1, 1.0, 0.0, 4)],
    ids=["two-members", "H1-is-plain-adamw"],
)
def test_losses_equal_plain_pytorch(
    cluster: Cluster, members: int, sync_every: int, lr: float, momentum: float, rounds: int
) -> None:
    """To 2e-5 nats: fp32 noise of another summation order. Leases last for the first four rounds."""
    names = ["eu", "us"][:members]
    for name in names:
        cluster.start(
            name,
            *QUIET,
            f"outer.sync_every={sync_every}",
            f"outer.lr={lr}",
            f"outer.momentum={momentum}",
            f"run.rounds={rounds}",
            f"elastic.start_regions={members}",
        )
    losses, held_out = plain(members, rounds, sync_every, lr, momentum)
    cluster.finish()
    for name, expected in zip(names, losses, strict=True):
        ours = [record["loss"] for record in cluster.records(name, "step")]
        assert ours == pytest.approx(expected, abs=2e-5)
        assert [r["loss"] for r in cluster.records(name, "eval")] == pytest.approx(held_out, abs=2e-5)


def test_one_member_with_h1_is_adamw() -> None:
    """The reference itself, at M=1, H=1, outer lr 1 and momentum 0, is AdamW alone."""
    losses, _ = plain(1, 6, 1, 1.0, 0.0)
    torch.manual_seed(0)
    model = build_llama(**ARGS)
    optimizer = adamw(model)
    data = Dataset(build_source(DataConfig()), SEQ_LEN, 0.02, 0)
    for step, expected in enumerate(losses[0]):
        objective, nll = next_token_loss(model, data.batch(range(step * BATCH, (step + 1) * BATCH)).long())
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert nll.item() == pytest.approx(expected, abs=1e-5)
