"""The outer step: token-weighted averaging of pseudo-gradients, then Nesterov (DiLoCo, arXiv 2311.08105, algorithm 1); or of
gradients, then AdamW (arXiv 1711.05101): plain data parallelism between regions.

Bit-exact across machines by construction: one rounding per operation (a separate multiply and add, never `alpha=`,
`addcmul`, a fused or a compiled step, which round differently on CPUs with and without FMA), in a fixed order, on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class OuterConfig:
    """The outer optimizer. Learning rates by number of regions: arXiv 2503.09799 (1: 0.4, 2-4: 0.6, 8: 0.8)."""

    optimizer: str = "nesterov"
    """nesterov: DiLoCo; adamw: data parallelism. Then regions exchange gradients at every inner step (sync_every=1), and the
    outer step is the AdamW of `inner`: the reference that DiLoCo is measured against."""
    sync_every: int = 50
    """H: inner steps between two exchanges of the same fragment."""
    lr: float = 0.7
    momentum: float = 0.9
    """Nesterov. Runs of few rounds want about 0.3: 0.9 needs more than a hundred rounds to settle."""
    fragments: int = 1
    """1 is classic DiLoCo; more: strided groups of layers that sync in turn, every H / fragments inner steps."""
    boundary: str = "steps"
    """steps: everyone contributes exactly H inner steps; first: whoever gets to H first opens, the others contribute
    what they have."""
    max_overlap_steps: int = 0
    """Inner steps that a region takes while the round of its snapshot is under way, before it waits; 0: it waits at every
    boundary. Streaming DiLoCo (arXiv 2501.18512) finds up to 5 harmless."""
    merge: str = "rebase"
    """rebase: x <- theta' + (x - s), what the region did since its snapshot s stays; mix: x <- alpha x + (1 - alpha) theta',
    as in Streaming DiLoCo, which drops 1 - alpha of it."""
    alpha: float = 0.5
    """Of merge=mix: the share of the local parameters that stays."""


def weighted_mean(contributions: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum(w * d) / sum(w) in fp32, in the order given. contributions: fp32 [n] each; weights: > 0 in sum."""
    total = contributions[0].mul(weights[0])
    for contribution, weight in zip(contributions[1:], weights[1:], strict=True):
        total.add_(contribution.mul(weight))
    return total.div_(torch.tensor(sum(weights), dtype=torch.float32))


def nesterov(theta: Tensor, momentum: Tensor, gradient: Tensor, lr: float, mu: float) -> None:
    """m <- mu * m + g; theta <- theta - lr * (g + mu * m), in place. theta, momentum, gradient: fp32 [n] on CPU."""
    momentum.mul_(mu).add_(gradient)
    update = momentum.mul(mu).add_(gradient).mul_(lr)
    theta.sub_(update)


@dataclass(frozen=True)
class AdamW:
    """One AdamW step's numbers. step: counts from 1; scale: of the gradient, for clipping."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    scale: float = 1.0


def adamw(theta: Tensor, mean: Tensor, variance: Tensor, gradient: Tensor, by: AdamW, decay: bool) -> None:
    """One step in place, as `torch.optim.AdamW` computes it up to rounding. All fp32 [n] on CPU; gradient is used up."""
    gradient.mul_(by.scale)
    mean.mul_(by.beta1).add_(gradient.mul(1 - by.beta1))
    variance.mul_(by.beta2).add_(gradient.square_().mul_(1 - by.beta2))
    # torch's fp32 square root is not correctly rounded. A root of 24 bits lies at least 2**-50 away from where rounding to
    # fp32 tips over, so that of fp64, rounded, is.
    denominator = variance.double().sqrt_().float().div_(math.sqrt(1 - by.beta2**by.step)).add_(by.eps)
    if decay:
        theta.mul_(1 - by.lr * by.weight_decay)
    theta.sub_(mean.mul(by.lr / (1 - by.beta1**by.step)).div_(denominator))
