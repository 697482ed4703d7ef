"""The inner step against a plain PyTorch loop; schedules against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diloco.errors import ConfigError
from diloco.inner import Inner, InnerConfig, lr_at, validate
from diloco.model import build_llama, next_token_loss
from diloco.parallel import ParallelConfig, Region, open_region

VOCAB, BATCH, LENGTH = 32, 8, 12


@pytest.fixture
def region() -> Region:
    return open_region(ParallelConfig(device="cpu"))


def model() -> nn.Module:
    torch.manual_seed(0)
    return build_llama(vocab=VOCAB, dim=16, layers=2, heads=2, kv_heads=1, ffn=32)


def batch(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def config(**changes: Any) -> InnerConfig:
    return InnerConfig(**{"lr": 1e-2, "batch": BATCH, "seq_len": LENGTH, "clip": 0.5, **changes})


def weights(m: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in m.parameters()])


def bare_loop(m: nn.Module, steps: int, cfg: InnerConfig) -> list[tuple[float, float]]:
    """What Inner must equal: (loss, gradient norm) of each step."""
    matrices = [p for p in m.parameters() if p.ndim > 1]
    vectors = [p for p in m.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay,
    )
    curve = []
    for step in range(steps):
        tokens = batch(step)
        loss = nn.functional.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(m.parameters(), cfg.clip) if cfg.clip else torch.zeros(())
        for group in optimizer.param_groups:
            group["lr"] = lr_at(cfg, (step + 1) / steps)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_equals_a_bare_loop(region: Region, micro_batch: int) -> None:
    ours, theirs, cfg = model(), model(), config(micro_batch=micro_batch)
    inner = Inner(cfg, ours, next_token_loss, region)
    stats = [inner.step(batch(step), (step + 1) / 10) for step in range(10)]
    expected = bare_loop(theirs, 10, cfg)
    assert min(norm for _, norm in expected) > cfg.clip, "clipping was not put to the test"
    for got, (loss, norm) in zip(stats, expected, strict=True):
        assert got.applied
        assert got.nll.item() == pytest.approx(loss, rel=1e-5)
        assert got.grad_norm == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-3, atol=1e-5)


def test_no_clipping(region: Region) -> None:
    ours, theirs, cfg = model(), model(), config(clip=0.0)
    inner = Inner(cfg, ours, next_token_loss, region)
    inner.step(batch(0), 1 / 2)
    inner.step(batch(1), 1.0)
    bare_loop(theirs, 2, cfg)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-3, atol=1e-5)


def test_lone_fp32_rank_is_not_wrapped(region: Region) -> None:
    assert region.mesh is None and not torch.distributed.is_initialized()
    inner = Inner(config(), model(), next_token_loss, region)
    assert all(type(p) is nn.Parameter for p in inner.params)
    assert all(group["fused"] for group in inner.optimizer.param_groups)
    decay = {p.ndim: group["weight_decay"] for group in inner.optimizer.param_groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.0}


def test_frozen_parameters_stay(region: Region) -> None:
    m = model()
    frozen = m.get_parameter("embed.weight").requires_grad_(False)
    before = frozen.clone()
    inner = Inner(config(), m, next_token_loss, region)
    inner.step(batch(0), 0.5)
    assert torch.equal(frozen, before) and all(p is not frozen for p in inner.params)


def test_gradients_that_are_not_finite_are_skipped(region: Region) -> None:
    m = model()
    poison = iter([1.0, math.nan, math.inf, 1.0])

    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        objective, nll = next_token_loss(model, tokens)
        return objective * next(poison), nll

    inner = Inner(config(), m, loss, region)
    inner.step(batch(0), 0.5)
    before, moment = weights(m), inner.optimizer.state[inner.params[0]]["exp_avg"].clone()
    for step in (1, 2):
        stats = inner.step(batch(step), 0.5)
        assert not stats.applied and not math.isfinite(stats.grad_norm)
        assert torch.equal(weights(m), before)
        assert torch.equal(inner.optimizer.state[inner.params[0]]["exp_avg"], moment)
    assert inner.skipped == 2
    assert inner.step(batch(3), 0.5).applied and not torch.equal(weights(m), before)


def test_materialised_state_is_what_a_step_makes(region: Region) -> None:
    stepped, made = (Inner(config(lr=1e-2), model(), next_token_loss, region) for _ in range(2))
    made.materialise()
    assert not any(state["exp_avg"].any() for state in made.optimizer.state.values())
    stepped.step(batch(0), 0.5)
    made.step(batch(0), 0.5)
    made.materialise()  # keeps what is there
    for p, q in zip(stepped.params, made.params, strict=True):
        assert torch.equal(p, q)
        theirs, ours = stepped.optimizer.state[p], made.optimizer.state[q]
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert torch.equal(theirs[key], ours[key]) and theirs[key].dtype == ours[key].dtype


def test_z_loss_reaches_the_loss(region: Region) -> None:
    with_z, without = (Inner(config(z_loss=z), model(), next_token_loss, region) for z in (0.1, 0.0))
    a, b = with_z.step(batch(0), 0.5), without.step(batch(0), 0.5)
    assert torch.equal(a.nll, b.nll) and a.grad_norm > b.grad_norm

    def plain(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return next_token_loss(model, tokens)

    with pytest.raises(ConfigError, match=r"inner\.z_loss=0\.1, but model\.loss takes no z_loss"):
        Inner(config(z_loss=0.1), model(), plain, region)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("wsd", {0.05: 0.5, 0.1: 1.0, 0.5: 1.0, 0.8: 1.0, 0.85: 0.6, 1.0: 0.2, 1.7: 0.2}),
        ("cosine", {0.05: 0.5, 0.1: 1.0, 0.55: 0.6, 1.0: 0.2}),
        ("constant", {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 1.0: 1.0}),
    ],
)
def test_schedules(schedule: str, expected: dict[float, float]) -> None:
    cfg = InnerConfig(lr=2.0, schedule=schedule, warmup=0.1, cooldown=0.2, min_lr=0.2)
    for progress, factor in expected.items():
        assert lr_at(cfg, progress) == pytest.approx(2.0 * factor), progress


def test_schedule_edges() -> None:
    for schedule in ("wsd", "cosine", "constant"):
        for warmup, cooldown in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.83, 0.17)):
            cfg = InnerConfig(schedule=schedule, warmup=warmup, cooldown=cooldown)
            rates = [lr_at(cfg, progress / 1000) for progress in range(1001)]
            assert all(0 <= rate <= cfg.lr for rate in rates)
            assert max(rates) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 6}, ["inner.batch=6", "set it to 8"]),
        ({"micro_batch": 3}, ["inner.micro_batch=3", "a divisor"]),
        ({"micro_batch": 4}, ["inner.micro_batch=4", "a divisor"]),
        ({"lr": 0.0}, ["inner.lr=0.0", "positive"]),
        ({"lr": math.nan}, ["inner.lr=nan"]),
        ({"beta2": 1.0}, ["inner.beta2=1.0"]),
        ({"seq_len": 0}, ["inner.seq_len=0"]),
        ({"schedule": "linear"}, ["inner.schedule=linear", "wsd, cosine or constant"]),
        ({"warmup": 0.9}, ["inner.cooldown=0.17", "0.1 or less"]),
        ({"clip": -1.0}, ["inner.clip=-1.0"]),
    ],
)
def test_bad_values(changes: dict[str, Any], words: list[str]) -> None:
    validate(config(), dp=4)
    with pytest.raises(ConfigError) as error:
        validate(config(**changes), dp=4)
    assert all(word in str(error.value) for word in words), error.value
