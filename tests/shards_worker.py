"""torchrun worker of test_shards: flat slices of a seeded model on a mesh, before and after a round trip.

OUT TP: writes OUT/<ranks>-<tp>-<tied>-r<rank>-{read,moment,after}.npz, one array per fragment.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from diloco.fragments import group_parameters
from diloco.inner import Inner, InnerConfig
from diloco.model import build_llama, llama_plan, next_token_loss
from diloco.parallel import ParallelConfig, Region, layer_of, open_region, parallelize
from diloco.shards import Shards
from diloco.train import leave

ARGS = {"vocab": 256, "dim": 32, "layers": 3, "heads": 4, "kv_heads": 4, "ffn": 96}


def main(out: Path, tp: int) -> None:
    cfg = ParallelConfig(tp=tp)
    region = open_region(cfg)
    for tied in (False, True):
        round_trip(out, cfg, region, tied)
    region.close()


def round_trip(out: Path, cfg: ParallelConfig, region: Region, tied: bool) -> None:
    torch.manual_seed(7)
    model = parallelize(build_llama(**ARGS, tied=tied), region, cfg, llama_plan)
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    fragments = group_parameters(shapes, layer_of(model), 2, block=1024)
    shards = Shards(model, fragments, region)

    def save(what: str, slices: list[torch.Tensor]) -> None:
        np.savez(out / f"{region.world}-{region.tp}-{tied}-r{region.rank}-{what}.npz", *[s.numpy() for s in slices])

    save("read", [shards.read(f.index) for f in fragments])
    known = [known_values(f.elements)[slice(*shards.span(f.index))] for f in fragments]
    for f, flat in zip(fragments, known, strict=True):
        shards.write(f.index, flat)
    save("after", [shards.read(f.index) for f in fragments])
    # An AdamW moment has the parameters' placements and takes the same way.
    inner = Inner(InnerConfig(batch=12, seq_len=8), model, next_token_loss, region)
    inner.materialise()
    for f, flat in zip(fragments, known, strict=True):
        shards.write(f.index, -flat, lambda p: inner.optimizer.state[p]["exp_avg"])
    save("moment", [shards.read(f.index, lambda p: inner.optimizer.state[p]["exp_avg"]) for f in fragments])


def known_values(elements: int) -> torch.Tensor:
    """Distinct values, negative zero among them."""
    values = torch.arange(elements, dtype=torch.float32).sub_(100)
    values[3] = -0.0
    return values


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)  # Gloo's threads can abort the interpreter's finalization on a busy machine
