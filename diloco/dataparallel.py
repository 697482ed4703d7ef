"""Data parallelism between regions (outer.optimizer=adamw): a contribution is a gradient of the common parameters, and the outer
step is the AdamW of `inner`. It takes the same rounds, exchange and planes as DiLoCo: the exact reference for its loss,
bytes and speed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diloco.fold import State
from diloco.inner import InnerConfig, lr_at
from diloco.outer import AdamW

if TYPE_CHECKING:
    from diloco.trainer import Trainer


def adamw_fingerprint(cfg: InnerConfig) -> str:
    """Of the numbers that every region has to step by. The batch is a region's own."""
    numbers = {key: value for key, value in asdict(cfg).items() if key not in ("batch", "micro_batch")}
    return f"adamw:{hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]}"


def read_gradient(trainer: Trainer, fragment: int, out: Tensor) -> None:
    """This rank's slice of the region's gradient, fp32, which is gone from the parameters then. Collective."""

    def select(parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    trainer.shards.read(fragment, select, out)
    trainer.inner.optimizer.zero_grad(set_to_none=True)


def adamw_of(trainer: Trainer, before: State, entry: dict[str, Any], gradients: Iterable[Tensor]) -> AdamW:
    """The numbers of a round's step, the same in every region, whatever its mesh: the norm is summed block by block, and the
    last digits of it and of the learning rate, which may depend on the CPU, are not used. Collective."""
    inner, fragment = trainer.cfg.inner, entry["fragment"]
    blocks = (x for run in gradients for x in run.split(trainer.fragments[fragment].block))
    squares = json.dumps([float(x.double().square().sum()) for x in blocks]).encode()
    norm = math.sqrt(sum(x for rank in trainer.region.gather_bytes(squares) for x in json.loads(rank)))
    tokens = sum(answer["tokens"] for answer in entry["answers"])
    lr = lr_at(inner, before.progress(1, tokens))
    scale = min(inner.clip / (_short(norm) + 1e-6), 1.0) if inner.clip else 1.0
    step = before.fragments[fragment].rounds + 1
    return AdamW(_short(lr), inner.beta1, inner.beta2, inner.eps, inner.weight_decay, step, scale)


def _short(value: float) -> float:
    return float(f"{value:.7g}")
