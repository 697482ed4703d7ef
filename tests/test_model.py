"""The Llama family: sizes, seeded weights, causality, the loss, and sentences for shapes that cannot be."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diloco.errors import ConfigError
from diloco.model import Llama, build_llama, flops_per_token, llama_plan, next_token_loss, packed, rope_table, rotate

CONFIGS = Path(__file__).parent.parent / "configs" / "model"
SMALL: dict[str, Any] = {"vocab": 64, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48}
PARAMETERS = {
    "tiny": 1_016_960,
    "15m": 15_632_640,
    "150m": 152_783_616,
    "1b": 1_235_814_400,  # Llama 3.2 1B, as its model card counts
    "10b": 10_211_381_248,  # INTELLECT-1
}


def small(**changes: Any) -> Llama:
    torch.manual_seed(0)
    return build_llama(**{**SMALL, **changes})


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tokens(batch: int = 3, length: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def _rectangle(rows: list[list[int]]) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [5] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("size", PARAMETERS)
def test_configured_sizes(size: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{size}.yaml").read_text())
    assert set(config) == {"target", "args", "loss", "loss_args", "plan"}
    target, loss, plan = (
        getattr(import_module(config[key].rpartition(".")[0]), config[key].rpartition(".")[2])
        for key in ("target", "loss", "plan")
    )
    with torch.device("meta"):
        model = target(**config["args"])
    assert count(model) == PARAMETERS[size]
    assert loss is next_token_loss
    assert plan(model, 2)
    assert not list(model.buffers())


def test_weights_follow_the_seed() -> None:
    first, again = small(layers=8), small(layers=8)
    for (name, p), q in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert first.output.weight.std().item() == pytest.approx(0.02, rel=0.1)
    residual = torch.cat([b.ffn.w2.weight.flatten() for b in first.layers])  # type: ignore[union-attr]
    assert residual.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_tied_weights_are_one_parameter() -> None:
    tied = small(tied=True)
    assert tied.output.weight is tied.embed.weight
    assert count(small()) - count(tied) == 64 * 32
    assert "output.weight" not in dict(tied.named_parameters())


def test_logits_depend_on_the_past_only() -> None:
    model, x = small(), tokens()
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    before, after = model(x), model(changed)
    assert before.shape == (3, 17, 64)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


def test_rope_turns_by_relative_position() -> None:
    args = small().args
    rope = rope_table(args, 32, torch.device("cpu"))
    q, k = torch.randn(2, args.head_dim)
    turned_q, turned_k = (rotate(v.expand(1, 32, 1, -1), rope)[0, :, 0] for v in (q, k))
    scores = turned_q @ turned_k.T
    for offset in (0, 3, 11):
        diagonal = scores.diagonal(-offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[3, 0], atol=1e-3)


def test_grouped_queries_share_keys_and_values() -> None:
    """A GQA model equals a full one whose key and value heads are copies."""
    grouped, full = small(), small(kv_heads=4)
    state = grouped.state_dict()
    for name, value in state.items():
        if name.endswith(("wk.weight", "wv.weight")):
            state[name] = value.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(full(tokens()), grouped(tokens()), rtol=1e-5, atol=1e-6)


def test_loss_against_its_definition() -> None:
    model, x = small(), tokens()
    objective, nll = next_token_loss(model, x, z_loss=0.01)
    log_p = F.log_softmax(model(x[:, :-1]).double(), -1)
    expected = -log_p.gather(-1, x[:, 1:, None]).mean()
    z = model(x[:, :-1]).double().exp().sum(-1).log().square().mean()
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert objective.item() == pytest.approx((expected + 0.01 * z).item(), rel=1e-6)
    assert objective.requires_grad and not nll.requires_grad and nll.dtype == torch.float32
    plain, same = next_token_loss(model, x)
    assert torch.equal(plain.detach(), same)


def test_flops_per_token() -> None:
    assert flops_per_token(10, 2, 3, 5) == 6 * 10 + 12 * 2 * 3 * 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_heads": 3}, ["model.args.kv_heads=3", "model.args.heads=4"]),
        ({"dim": 36}, ["model.args.dim=36", "a multiple of 8"]),
        ({"layers": 0}, ["model.args.layers=0"]),
        ({"ffn": 1.5}, ["model.args.ffn=1.5"]),
        ({"norm_eps": 0.0}, ["model.args.norm_eps=0.0"]),
        ({"headz": 4}, ["model.args.headz=4", "model.args.heads?"]),
    ],
)
def test_impossible_shapes(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        small(**changes)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_argument() -> None:
    with pytest.raises(ConfigError, match=r"model\.args\.ffn is missing"):
        build_llama(**{name: value for name, value in SMALL.items() if name != "ffn"})


@pytest.mark.parametrize(("tp", "key"), [(3, "heads"), (4, "kv_heads")])
def test_tp_that_does_not_divide(tp: int, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.tp={tp} does not divide model\.args\.{key}={SMALL[key]}"):
        llama_plan(small(), tp)


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=5), min_size=1, max_size=3).map(_rectangle))
def test_packed_is_documents_side_by_side(rows: list[list[int]]) -> None:
    """Against each pair of places by itself; 0 ends documents."""
    places, mask = packed(torch.tensor(rows), 0)
    for b, row in enumerate(rows):
        for t in range(len(row)):
            begin = max((u + 1 for u in range(t) if row[u] == 0), default=0)
            assert places[b, t] == t - begin
            assert mask[b, 0, t].tolist() == [begin <= u <= t for u in range(len(row))]


def test_packed_documents_are_as_if_each_was_alone() -> None:
    model, row = small().double(), tokens(1, 40)[0] % 63 + 1
    row[[6, 7, 20, 39]] = 0
    other = tokens(1, 40, seed=2)[0]
    other[11] = 0
    together = model(torch.stack([row, other]), end=0)
    for b, begin, stop in [(0, 0, 7), (0, 7, 8), (0, 8, 21), (0, 21, 40), (1, 0, 12)]:
        alone = model(torch.stack([row, other])[b : b + 1, begin:stop])
        torch.testing.assert_close(together[b : b + 1, begin:stop], alone, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(together[0, 8:21], model(row[None])[0, 8:21], atol=1e-3), "or it shows nothing"


def test_the_loss_of_packed_documents_is_theirs_alone() -> None:
    """With z-loss, too: no target is predicted from another document. Against a pass of each by itself."""
    model, rows = small().double(), tokens(2, 41) % 63 + 1
    rows[0, [6, 7, 20, 39]] = rows[1, 11] = 0
    spans = [(0, 0, 7), (0, 8, 21), (0, 21, 40), (1, 0, 12), (1, 12, 41)]  # nothing is predicted in [7, 8) and [40, 41)
    alone = [model(rows[b : b + 1, begin : stop - 1])[0].float() for b, begin, stop in spans]
    targets = torch.cat([rows[b, begin + 1 : stop] for b, begin, stop in spans])
    nll = F.cross_entropy(torch.cat(alone), targets)
    z = torch.cat(alone).logsumexp(-1).square().mean()
    objective, found = next_token_loss(model, rows, z_loss=0.1, end=0)
    torch.testing.assert_close(found, nll.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(objective, nll + 0.1 * z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(next_token_loss(model, rows, end=0)[0], nll, atol=1e-5, rtol=1e-5)
    assert next_token_loss(model, torch.zeros_like(rows), z_loss=0.1, end=0)[0] == 0, "nothing to predict"
