"""The inner step: AdamW, gradient accumulation, clipping, and learning-rate schedules in committed tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from diloco.errors import ConfigError
from diloco.parallel import Region, grad_square, local_tensor

Loss = Callable[..., tuple[Tensor, Tensor]]
"""`model.loss`: loss(model, tokens int64 [B, T+1]) -> fp32 scalars (objective to differentiate, mean nll)."""


@dataclass
class InnerConfig:
    """Inner optimizer and schedule. `batch` is the whole region's, so that any mesh gives the same curve."""

    lr: float = 3e-4
    weight_decay: float = 0.1  # not for parameters of one dimension
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # global gradient norm; 0 = no clipping
    batch: int = 8  # sequences per inner step of the whole region
    micro_batch: int = 0  # sequences per rank and forward; 0 = batch / dp, without accumulation
    seq_len: int = 256  # tokens predicted per sequence
    schedule: str = "wsd"  # wsd | cosine | constant
    warmup: float = 0.05  # fraction of the run's tokens
    cooldown: float = 0.17  # fraction of the run's tokens (wsd)
    min_lr: float = 0.0  # fraction of lr at the end (wsd, cosine)
    z_loss: float = 0.0  # handed to model.loss when not 0


RANGES = {  # keys: (least, most, in words)
    "lr eps": (math.ulp(0.0), 1e3, "a positive number"),
    "beta1 beta2": (0.0, 1 - 2**-53, "0 or more and below 1"),
    "warmup cooldown min_lr": (0.0, 1.0, "a fraction from 0 to 1"),
    "weight_decay clip z_loss micro_batch": (0.0, 1e9, "0 (off) or more"),
    "batch seq_len": (1, 1e9, "1 or more"),
}


def validate(cfg: InnerConfig, dp: int = 1) -> None:
    """Raises ConfigError for values that cannot work with `dp` data-parallel ranks."""
    for keys, (least, most, words) in RANGES.items():
        for key in keys.split():
            if not least <= getattr(cfg, key) <= most:
                raise ConfigError(f"inner.{key}={getattr(cfg, key)} is out of range: set it to {words}")
    if cfg.schedule not in ("wsd", "cosine", "constant"):
        raise ConfigError(f"inner.schedule={cfg.schedule} is not known: set it to wsd, cosine or constant")
    if cfg.schedule == "wsd" and cfg.warmup + cfg.cooldown > 1:
        room = f"{1 - cfg.warmup:g} or less, as inner.warmup={cfg.warmup} takes the rest"
        raise ConfigError(f"inner.cooldown={cfg.cooldown} is too long: set it to {room}")
    if cfg.batch % dp:
        near = -(-cfg.batch // dp) * dp
        raise ConfigError(f"inner.batch={cfg.batch} does not split over {dp} FSDP ranks: set it to {near}, say")
    if cfg.micro_batch and (cfg.batch // dp) % cfg.micro_batch:
        raise ConfigError(
            f"inner.micro_batch={cfg.micro_batch} does not divide the {cfg.batch // dp} sequences of each "
            f"rank's share of inner.batch={cfg.batch}: set it to a divisor, or to 0 for no accumulation"
        )


def lr_at(cfg: InnerConfig, progress: float) -> float:
    """Learning rate at `progress`: the fraction of the run's tokens done when the step ends, so not 0.

    Linear warm-up, then `wsd` (constant, and a 1-sqrt cooldown: arXiv 2405.18392), `cosine` or `constant`.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < cfg.warmup:
        return cfg.lr * progress / cfg.warmup
    if cfg.schedule == "wsd" and progress > 1 - cfg.cooldown:
        factor = 1 - math.sqrt(max(0.0, 1 - (1 - progress) / cfg.cooldown))
    elif cfg.schedule == "cosine" and cfg.warmup < 1:
        factor = 0.5 * (1 + math.cos(math.pi * (progress - cfg.warmup) / (1 - cfg.warmup)))
    else:
        factor = 1.0
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * factor)


@dataclass
class StepStats:
    """What one inner step did, the same on every rank."""

    nll: Tensor  # fp32 scalar on the device: mean over the region, nats per token
    grad_norm: float  # before clipping
    lr: float
    applied: bool  # False: the gradient was not finite and the update was skipped


class Inner:
    """The inner optimizer of a region. What changes: the model, `optimizer` and `skipped`."""

    def __init__(self, cfg: InnerConfig, model: nn.Module, loss_fn: Loss, region: Region) -> None:
        validate(cfg, region.dp)
        self.cfg, self.model, self.region = cfg, model, region
        self.loss = _with_z_loss(loss_fn, cfg.z_loss)
        self.share = cfg.batch // region.dp
        self.micro_batch = cfg.micro_batch or self.share
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _adamw(cfg, self.params)
        self.skipped = 0

    def step(self, tokens: Tensor, progress: float) -> StepStats:
        """One AdamW update on this rank's share of the batch: int32 on the CPU [batch / dp, seq_len + 1].

        A collective. A gradient that is not finite is dropped, on every rank alike, and counted in `skipped`.
        """
        nll, norm = self.gradient(tokens)
        lr, applied = lr_at(self.cfg, progress), math.isfinite(norm)
        if applied:
            self._clip(norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.skipped += not applied
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(nll, norm, lr, applied)

    def gradient(self, tokens: Tensor) -> tuple[Tensor, float]:
        """Adds the region's mean gradient to the parameters' `grad`: (mean nll, its norm). A collective."""
        nll = self._backward(tokens)
        # The loss rides along with the norm: one small all-reduce, and one wait of the host, per step.
        parts = torch.stack((grad_square(self.params, self.region), nll / self.region.world))
        sums = self.region.all_reduce_sum(parts)
        return sums[1], math.sqrt(sums[0].item())

    def _backward(self, tokens: Tensor) -> Tensor:
        """Accumulate the mean gradient over the micro-batches; returns this rank's mean nll."""
        assert tokens.shape == (self.share, self.cfg.seq_len + 1), tokens.shape
        micro_batches = tokens.to(self.region.device, non_blocking=True).long().split(self.micro_batch)
        nll = torch.zeros((), device=self.region.device)
        for micro_batch in micro_batches:
            objective, part = self.loss(self.model, micro_batch)
            (objective / len(micro_batches)).backward()
            nll += part / len(micro_batches)
        return nll

    @torch.no_grad()
    def _clip(self, norm: float) -> None:
        """As `torch.nn.utils.clip_grad_norm_`, given the norm; on local parts, without DTensor's dispatch."""
        coefficient = self.cfg.clip / (norm + 1e-6)
        if self.cfg.clip and coefficient < 1:
            grads = [local_tensor(p.grad) for p in self.params if p.grad is not None]
            torch._foreach_mul_(grads, coefficient)  # pyright: ignore[reportPrivateImportUsage]

    @property
    def updates(self) -> int:
        """AdamW updates so far: its bias correction depends on them."""
        return int(max((float(state["step"]) for state in self.optimizer.state.values()), default=0))

    def set_updates(self, count: int) -> None:
        """After `materialise`: goes on as after `count` updates."""
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    def materialise(self) -> None:
        """Create AdamW's state now, as its first step would, so that saved moments can be copied into it."""
        for p in self.params:
            if not self.optimizer.state[p]:
                self.optimizer.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }


def _with_z_loss(loss_fn: Loss, z_loss: float) -> Loss:
    if not z_loss:
        return loss_fn
    try:
        inspect.signature(loss_fn).bind(None, None, z_loss=z_loss)
    except TypeError:
        sentence = f"inner.z_loss={z_loss}, but model.loss takes no z_loss: set inner.z_loss=0, or add the argument"
        raise ConfigError(sentence) from None
    return partial(loss_fn, z_loss=z_loss)


def _adamw(cfg: InnerConfig, params: list[nn.Parameter]) -> torch.optim.AdamW:
    """Fused AdamW. A group may mix DTensors of the dp x tp mesh and of dp alone; torch 2.13 knows how."""
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
