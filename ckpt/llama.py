"""What the parameters of our Llama (`diloco.model.build_llama`) are called, and how they lie, in Hugging Face's
`LlamaForCausalLM`. Data, so that an export needs neither of the two.

Both turn pairs of a head's elements by RoPE (arXiv 2104.09864): ours are neighbours (2j, 2j + 1), as in Meta's code, theirs
(j, j + head_dim / 2), so the rows of wq and wk change places within each head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from ckpt.errors import RequestError

TARGET = "diloco.model.build_llama"
EMBEDDING, HEAD = ("embed.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight")
NORM = ("norm.weight", "model.norm.weight")
LAYER = {
    "attention_norm.weight": ("input_layernorm.weight", ("dim",)),
    "attention.wq.weight": ("self_attn.q_proj.weight", ("dim", "dim")),
    "attention.wk.weight": ("self_attn.k_proj.weight", ("kv_dim", "dim")),
    "attention.wv.weight": ("self_attn.v_proj.weight", ("kv_dim", "dim")),
    "attention.wo.weight": ("self_attn.o_proj.weight", ("dim", "dim")),
    "ffn_norm.weight": ("post_attention_layernorm.weight", ("dim",)),
    "ffn.w1.weight": ("mlp.gate_proj.weight", ("ffn", "dim")),
    "ffn.w2.weight": ("mlp.down_proj.weight", ("dim", "ffn")),
    "ffn.w3.weight": ("mlp.up_proj.weight", ("ffn", "dim")),
}
"""Of each layer, in the model's order: our name -> theirs, and the sizes of its shape."""
ROTARY = ("attention.wq.weight", "attention.wk.weight")
CONFIG = {
    "vocab": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
"""Our args -> keys of config.json; rope_theta has moved between versions of transformers."""


@dataclass(frozen=True)
class Shape:
    """The args of build_llama, all of them."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    rope_theta: float
    norm_eps: float
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Parameter:
    """A parameter by both names; `rotary`: its rows are heads of rotary pairs."""

    name: str
    theirs: str
    shape: tuple[int, ...]
    rotary: bool = False


def parameters(shape: Shape) -> Iterator[Parameter]:
    """Those of a model, in its own order; a tied head is no parameter."""
    yield Parameter(*EMBEDDING, (shape.vocab, shape.dim))
    for i in range(shape.layers):
        for name, (theirs, sizes) in LAYER.items():
            dims = tuple(getattr(shape, size) for size in sizes)
            yield Parameter(f"layers.{i}.{name}", f"model.layers.{i}.{theirs}", dims, name in ROTARY)
    yield Parameter(*NORM, (shape.dim,))
    if not shape.tied:
        yield Parameter(*HEAD, (shape.vocab, shape.dim))


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads of rows [n * head_dim, columns]: from neighbouring pairs to Hugging Face's halves."""
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of to_halves."""
    return rows.view(-1, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def shape_of(model: dict[str, Any]) -> Shape:
    """From what a manifest says of its model. RequestError if that is no Llama of ours."""
    if model["target"] != TARGET:
        raise RequestError(f"model.target={model['target']} is no Llama: only checkpoints of {TARGET} can be exported")
    names = [each.name for each in fields(Shape)]
    if sorted(model["args"]) != sorted(names):
        raise RequestError(f"model.args={model['args']} are not those of a Llama: it has {', '.join(names)}")
    return checked(Shape(**model["args"]), "model.args")


def checked(shape: Shape, where: str) -> Shape:
    """The shape itself. RequestError unless such a model can be."""
    for name, value in asdict(shape).items():
        kinds = {"tied": (bool,), "rope_theta": (int, float), "norm_eps": (int, float)}.get(name, (int,))
        if type(value) not in kinds or (name != "tied" and not 0 < value < 1 << 40):
            raise RequestError(f"{where}: {CONFIG.get(name, name)}={value!r} is no size of a Llama: set it to one")
    if shape.dim % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise RequestError(
            f"{where}: {shape.dim} elements do not split into {shape.heads} heads with {shape.kv_heads} of keys: "
            "name a model whose sizes divide each other"
        )
    return shape


def to_config(shape: Shape, seq_len: int, dtype: str) -> dict[str, Any]:
    """config.json. dtype: float32 or bfloat16; seq_len: tokens of a training sample. Written as transformers 4 and 5 read it."""
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "max_position_embeddings": seq_len,
        "rope_theta": shape.rope_theta,
        "rope_parameters": rope,
        "torch_dtype": dtype,
        # Our data has no tokens of this kind that a checkpoint knew of; Llama's defaults, 1 and 2, are text here.
        "bos_token_id": None,
        "eos_token_id": None,
        **{theirs: getattr(shape, ours) for ours, theirs in CONFIG.items()},
    }


def from_config(config: dict[str, Any]) -> tuple[Shape, int]:
    """(shape, longest sample) from a config.json. RequestError for what build_llama cannot be."""
    if config.get("model_type") != "llama":
        raise RequestError(f"config.json: model_type={config.get('model_type')!r} is not llama: name a Llama's folder")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise RequestError(f"config.json: rope_parameters={rope!r} is no JSON object: name another model")
    # transformers' own defaults, for what a config leaves out
    heads = config.get("num_attention_heads")
    known = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **config}
    known["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    args: dict[str, Any] = {ours: known.get(theirs) for ours, theirs in CONFIG.items()}
    args["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    shape = checked(Shape(**args), "config.json")
    _check_plain({**config, "rope_type": rope.get("rope_type", rope.get("type", "default"))}, shape)
    length = config.get("max_position_embeddings", 2048)
    if type(length) is not int or length < 1:
        raise RequestError(f"config.json: max_position_embeddings={length!r} is no length: set it to one")
    return shape, length


def _check_plain(config: dict[str, Any], shape: Shape) -> None:
    """RequestError for a variant that build_llama does not have: Llama 3.1's stretched RoPE, biases, wider heads."""
    only = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_type": "default",
        "head_dim": shape.head_dim,
    }
    for key, value in only.items():
        if config.get(key) not in (None, value):
            raise RequestError(f"config.json: {key}={config[key]!r}, and our Llama has {value!r}: name another model")
