"""Small Llamas and their checkpoints, saved as a run saves them but for the run."""

from __future__ import annotations

from typing import Any

import torch

from ckpt.checkpoint import commit_manifest, save_shard
from ckpt.layout import encode_layout
from ckpt.pieces import cut, groups
from ckpt.store import Store
from diloco.checkpoints import describe
from diloco.config import ModelConfig
from diloco.fragments import group_parameters
from diloco.model import Llama, build_llama
from diloco.parallel import layer_of

TINY: dict[str, Any] = {"vocab": 256, "dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 512, "tied": True}
GROUPED: dict[str, Any] = {
    **{"vocab": 96, "dim": 48, "layers": 3, "heads": 6, "kv_heads": 2, "ffn": 80, "tied": False},
    **{"rope_theta": 777.0, "norm_eps": 1e-3},
}
SMALL: dict[str, Any] = {"vocab": 32, "dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 24}


def random_llama(args: dict[str, Any], seed: int = 0) -> Llama:
    """No parameter is alike another one, norms included, and all of them matter for the logits."""
    torch.manual_seed(seed)
    model = build_llama(**args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else parameter.shape[-1] ** -0.5)
    return model


def save_llama(
    store: Store, model: Llama, fragments: int = 2, run: str = "run", entry: int = 0, applied: int = 0
) -> dict[str, Any]:
    """The manifest. Momentum is 1 everywhere; seq_len 32."""
    named = dict(model.named_parameters())
    shapes = [(name, tuple(p.shape)) for name, p in named.items()]
    layout = group_parameters(shapes, layer_of(model), fragments)
    prefix, pieces = f"checkpoints/{run}/{entry}", []
    for f, fragment in enumerate(layout):
        flat = torch.cat([named[slot.name].detach().flatten() for slot in fragment.slots])
        pieces += [*cut("theta", f, 0, len(flat), flat), *cut("momentum", f, 0, len(flat), torch.ones_like(flat))]
    records = [save_shard(store, prefix, f"eu-r0-{i}", group) for i, group in enumerate(groups(iter(pieces)))]
    body = {
        **{"seq": entry, "hash": "", "epoch": 0, "counters": {"rounds": entry, "applied": applied}},
        "model": describe(model, ModelConfig(args={}), seq_len=32),
        "layout": encode_layout([[(slot.name, slot.shape) for slot in f.slots] for f in layout]),
    }
    return commit_manifest(store, prefix, body, records)
