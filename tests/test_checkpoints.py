"""The planes of a region in its store: files of bounded size, whatever the size of the fragments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckpt.store import Store
from diloco import checkpoints
from diloco.checkpoints import Checkpoints
from diloco.fragments import group_parameters
from diloco.parallel import Region
from diloco.planes import Planes
from diloco.shards import Shards


@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
def test_planes_come_back_from_shards_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(checkpoints, "SHARD", limit)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    fragments = group_parameters(shapes, {}, count=2, block=16)
    region = Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)
    store, shards = Store(str(tmp_path)), Shards(model, fragments, region)
    slices = [(0, fragment.blocks) for fragment in fragments]
    saved, loaded = Planes(fragments, slices), Planes(fragments, slices)
    for fragment in fragments:
        saved.load(fragment.index, 0, torch.randn(fragment.elements), torch.randn(fragment.elements))
    points = Checkpoints(store, "run", region, shards, keep=1)
    points.save_first(saved)
    manifest = next(points.candidates())
    points.load(manifest, loaded)
    for plane in ("theta", "momentum"):
        for ours, theirs in zip(getattr(saved, plane), getattr(loaded, plane), strict=True):
            assert torch.equal(ours, theirs)
    elements = [sum(p["stop"] - p["start"] for p in shard["pieces"]) for shard in manifest["shards"]]
    assert max(elements) <= limit and sum(elements) == 2 * sum(fragment.elements for fragment in fragments)
