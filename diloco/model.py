"""The Llama 3 family (arXiv 2407.21783): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Any other family works as well: `model.target` is a callable that returns an `nn.Module`, `model.loss` is
called as `loss(model, tokens, **loss_args) -> (objective, nll)`, `model.plan` as `plan(model, tp)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from diloco.errors import ConfigError

INIT_STD = 0.02
# Under tensor parallelism the logits are a view, of which FSDP warns lest someone writes to it; the loss does not.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPLlama\) returned a view tensor")


@dataclass(frozen=True)
class LlamaArgs:
    """Shape of a Llama; `ffn` is the hidden size of SwiGLU, `tied` shares the embedding with the head."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def validate(self) -> None:
        """Raises ConfigError for a shape that cannot be built."""
        for name in ("vocab", "dim", "layers", "heads", "kv_heads", "ffn"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"model.args.{name}={value!r} is not a positive integer: set it to one")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                value = getattr(self, name)
                raise ConfigError(f"model.args.{name}={value} is not positive: leave it out for the default")
        if self.dim % (2 * self.heads):
            raise ConfigError(
                f"model.args.dim={self.dim} does not split into model.args.heads={self.heads} heads of even "
                f"size (rotary positions turn pairs): set model.args.dim to a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.args.kv_heads={self.kv_heads} does not divide model.args.heads={self.heads}: "
                "set model.args.kv_heads to a divisor of it"
            )


class Linear(nn.Linear):
    """A linear map without bias, drawn from N(0, std) in the order of construction."""

    def __init__(self, inputs: int, outputs: int, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


def rope_table(args: LlamaArgs, length: int, device: torch.device) -> Tensor:
    """Rotations exp(i t w_j) of RoPE (arXiv 2104.09864): complex64 [length, head_dim/2].

    Computed in every forward (microseconds), so that the model has no buffers; complex, so that FSDP's cast
    of floating-point inputs to the compute type leaves it alone: bfloat16 would blur the positions.
    """
    pairs = torch.arange(0, args.head_dim, 2, device=device, dtype=torch.float32)
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, args.rope_theta ** (-pairs / args.head_dim))
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [B, T, heads, head_dim] by rope [T, head_dim/2] or [B, T, head_dim/2], in fp32; dtype
    as x."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[..., None, :]).flatten(-2).to(x.dtype)


def packed(tokens: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Of rows of documents, each up to and with a token `end`, int64 [B, T]: each token's place in its document, int64
    [B, T], and which tokens it may look at, bool [B, 1, T, T]: those of its document that are not after it."""
    ends = tokens == end
    document = ends.cumsum(1) - ends.long()
    places = torch.arange(tokens.shape[1], device=tokens.device)
    begins = ends.roll(1, 1).long() * places  # the roll brings the last one to place 0, where it counts 0
    same = document[:, :, None] == document[:, None, :]
    return places - begins.cummax(1).values, (same & (places[:, None] >= places))[:, None]


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, args: LlamaArgs, out_std: float) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = Linear(args.dim, args.heads * args.head_dim)
        self.wk = Linear(args.dim, args.kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.kv_heads * args.head_dim)
        self.wo = Linear(args.heads * args.head_dim, args.dim, out_std)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        # As many heads as the projections give: under tensor parallelism each rank has its share of them.
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k, v = rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)
        gqa = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)
        return self.wo(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, args: LlamaArgs, out_std: float) -> None:
        super().__init__()
        self.w1 = Linear(args.dim, args.ffn)  # gate
        self.w2 = Linear(args.ffn, args.dim, out_std)  # down
        self.w3 = Linear(args.dim, args.ffn)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args: LlamaArgs) -> None:
        super().__init__()
        # Two residual projections a block: GPT-2's scaling keeps the residual stream's variance in bounds.
        out_std = INIT_STD / (2 * args.layers) ** 0.5
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args, out_std)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.ffn = FeedForward(args, out_std)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """Decoder-only transformer. Weights come from torch's default generator: `torch.manual_seed` first."""

    def __init__(self, args: LlamaArgs) -> None:
        super().__init__()
        self.args = args
        self.embed = Embedding(args.vocab, args.dim)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab)
        if args.tied:
            self.output.weight = self.embed.weight

    def forward(self, tokens: Tensor, end: int | None = None) -> Tensor:
        """Logits [B, T, vocab] in the compute dtype, of tokens int64 [B, T]. end: token after which a new document begins,
        as if it were alone; None: all is one document."""
        rope, mask = rope_table(self.args, tokens.shape[1], tokens.device), None
        if end is not None:
            places, mask = packed(tokens, end)
            rope = rope[places]
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x, rope, mask)
        return self.output(self.norm(x))


def build_llama(**args: Any) -> Llama:
    """A Llama of `LlamaArgs(**args)` on torch's default device. Raises ConfigError for bad args."""
    fields = {f.name: f for f in dataclasses.fields(LlamaArgs)}
    for name in args.keys() - fields.keys():
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
        raise ConfigError(f"model.args.{name}={args[name]!r} is not known to Llama: did you mean model.args.{near}?")
    for name, field in fields.items():
        if name not in args and field.default is dataclasses.MISSING:
            raise ConfigError(f"model.args.{name} is missing: set it, or choose a shape, model=tiny for one")
    shape = LlamaArgs(**args)
    shape.validate()
    return Llama(shape)


def next_token_loss(
    model: nn.Module, tokens: Tensor, z_loss: float = 0.0, end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each token given those before it; end: of its document alone, if that token ends documents
    (model.loss_args.end). The first token of a document is then not predicted, as it has none before it.

    tokens: int64 [B, T+1]. Returns fp32 scalars (objective, nll): nll is the mean in nats per token that is predicted,
    detached; differentiate objective = nll + z_loss * mean(log(Z)^2) (PaLM, arXiv 2204.02311, section 5).
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    logits = (model(inputs) if end is None else model(inputs, end)).flatten(0, 1).float()
    if end is None:
        mean, nll = Tensor.mean, F.cross_entropy(logits, targets)
    else:
        mean = partial(_mean_where, (inputs != end).flatten())
        nll = mean(F.cross_entropy(logits, targets, reduction="none"))
    if not z_loss:
        return nll, nll.detach()
    return nll + z_loss * mean(logits.logsumexp(-1).square()), nll.detach()


def _mean_where(counted: Tensor, values: Tensor) -> Tensor:
    """0 if none is counted. Of fixed shapes: picking them out would make the host wait for the device."""
    return values.where(counted, 0.0).sum() / counted.sum().clamp(min=1)


def llama_plan(model: nn.Module, tp_size: int) -> dict[str, ParallelStyle]:
    """Tensor-parallel plan of a Llama (Megatron-LM, arXiv 1909.08053), for `parallelize_module`.

    Heads, SwiGLU's hidden units and the vocabulary are cut; norms stay whole on all ranks. Raises ConfigError
    if tp_size does not divide one of the former.
    """
    args = cast(Llama, model).args
    for name in ("heads", "kv_heads", "ffn", "vocab"):
        if getattr(args, name) % tp_size:
            raise ConfigError(
                f"parallel.tp={tp_size} does not divide model.args.{name}={getattr(args, name)}: "
                f"set parallel.tp to a divisor of it, or model.args.{name} to a multiple of {tp_size}"
            )
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        # Both ends are cut along the vocabulary, so that tied weights can be one parameter again.
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    for block in ("attention.wq", "attention.wk", "attention.wv", "ffn.w1", "ffn.w3"):
        plan[f"layers.*.{block}"] = ColwiseParallel()
    for block in ("attention.wo", "ffn.w2"):
        plan[f"layers.*.{block}"] = RowwiseParallel()
    return plan


def flops_per_token(parameters: int, layers: int, dim: int, seq_len: int) -> float:
    """Floating-point operations of one token, forward and backward: 6 N + 12 L d T (PaLM, appendix B)."""
    return 6.0 * parameters + 12.0 * layers * dim * seq_len
