"""The planes of a region in its store: files of bounded size, whatever the size of the fragments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt import pieces
from ckpt.checkpoint import DamagedError, load_manifest
from ckpt.reading import read_range
from ckpt.store import Store, StoreError
from ckpt.survivor import Survivor
from diloco import checkpoints, saving
from diloco.checkpointing import CkptConfig
from diloco.checkpoints import Checkpoints, describe
from diloco.config import ModelConfig
from diloco.fold import counters
from diloco.fragments import group_parameters
from diloco.inner import Inner, InnerConfig
from diloco.model import build_llama
from diloco.parallel import Region, layer_of
from diloco.planes import Planes
from diloco.saving import Among, Saver
from diloco.shards import Shards
from tests.test_journal import Log, answer, joining, opening


@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
def test_planes_come_back_from_shards_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(pieces, "SHARD", limit)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    fragments = group_parameters(shapes, {}, count=2, block=16)
    region = Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)
    store, shards = Store(str(tmp_path)), Shards(model, fragments, region)
    slices = [(0, fragment.blocks) for fragment in fragments]
    saved, loaded = Planes(fragments, slices), Planes(fragments, slices)
    for fragment in fragments:
        saved.load(fragment.index, 0, torch.randn(fragment.elements), torch.randn(fragment.elements))
    points = Checkpoints(store, "run", region, shards, keep=CkptConfig(keep=1), model={})
    points.save_first(saved)
    manifest = next(points.candidates())
    points.load(manifest, loaded)
    for plane in ("theta", "momentum"):
        for ours, theirs in zip(getattr(saved, plane), getattr(loaded, plane), strict=True):
            assert torch.equal(ours, theirs)
    elements = [sum(p["stop"] - p["start"] for p in shard["pieces"]) for shard in manifest["shards"]]
    assert max(elements) <= limit and sum(elements) == 2 * sum(fragment.elements for fragment in fragments)


def test_a_global_checkpoint_says_where_its_parameters_are(tmp_path: Path) -> None:
    """Its layout, read as another program would, gives every parameter; its model has the defaults of today in it."""
    region = Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)
    args = {"vocab": 16, "dim": 8, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 12}
    model = build_llama(**args)
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    fragments = group_parameters(shapes, layer_of(model), count=2)
    shards, store = Shards(model, fragments, region), Store(str(tmp_path))
    planes = Planes(fragments, [(0, fragment.blocks) for fragment in fragments])
    for f in range(len(fragments)):
        planes.load(f, 0, shards.read(f), torch.zeros(fragments[f].elements))
    what = describe(model, ModelConfig(args=args), seq_len=32)
    points = Checkpoints(store, "run", region, shards, keep=CkptConfig(keep=1), model=what)
    manifest = load_manifest(store, points.save_first(planes))
    assert manifest["model"]["args"] == {**args, "rope_theta": 5e5, "norm_eps": 1e-5, "tied": False}
    assert manifest["model"]["target"] == "diloco.model.build_llama" and manifest["model"]["seq_len"] == 32
    found = {}
    for f, slots in enumerate(manifest["layout"]):
        for slot in slots:
            elements = math.prod(slot["shape"])
            flat = read_range(store, manifest, "theta", f, slot["start"], slot["start"] + elements)
            found[slot["name"]] = flat.view(slot["shape"])
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())


@dataclass
class OddArgs:
    width: int = 3
    clip: float = float("inf")
    dtype: torch.dtype = torch.float32


def test_what_is_no_json_in_a_model_of_ones_own_is_not_said() -> None:
    odd, plain = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    odd.args = OddArgs()  # type: ignore[assignment]
    cfg = ModelConfig("mine.Odd", {"depth": [1, 2]})
    assert describe(odd, cfg, 8) == {"target": "mine.Odd", "args": {"width": 3, "depth": [1, 2]}, "seq_len": 8}
    assert describe(plain, cfg, 8)["args"] == {"depth": [1, 2]}


class OneRank:
    """A region of one rank with a model of its own."""

    def __init__(self, store: Store, error_feedback: bool) -> None:
        region = Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        fragments = group_parameters(shapes, {}, count=2, block=16)
        self.shards = Shards(model, fragments, region)
        self.planes = Planes(fragments, [(0, fragment.blocks) for fragment in fragments], error_feedback)
        self.inner = Inner(InnerConfig(batch=1), model, lambda model, tokens: (model, tokens), region)
        self.inner.materialise()
        self.points = Checkpoints(store, "run", region, self.shards, keep=CkptConfig(keep=1), model={})


@pytest.mark.parametrize(("there", "here", "exact"), [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_residuals_come_back_with_the_local_parameters(tmp_path: Path, there: int, here: int, exact: int) -> None:
    """Or start from zero, where there were none, or where the local parameters cannot come back."""
    store = Store(str(tmp_path))
    saved, loaded = OneRank(store, bool(there)), OneRank(store, bool(here))
    for residual in saved.planes.residual or []:
        residual.copy_(torch.randn(residual.numel()))
    state = Log(opening(fragments=2)).state
    saver = Saver(saved.points, saved.planes, saved.inner, "eu_1", "eu")
    saver.save(state, Among(()), {"adam": 3}, {})
    assert saver.uploads.wait(60)
    own = next(loaded.points.own("eu"))
    loaded.points.load_own(own, loaded.inner, loaded.planes, moments_only=not exact)
    assert (loaded.planes.residual is not None) == bool(here)
    for f, residual in enumerate(loaded.planes.residual or []):
        assert residual.any() == bool(there and exact)
        assert not residual.any() or torch.equal(residual, saved.planes.residual[f])  # type: ignore[index]
    assert torch.equal(loaded.shards.read(0), saved.shards.read(0)) == bool(exact)
    assert loaded.inner.updates == 3


@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_takes_the_memory_of_the_one_before_unless_that_disowned_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    store, state = Store(str(tmp_path)), Log(opening(fragments=2)).state
    saved, loaded, jobs = OneRank(store, True), OneRank(store, True), list[dict[str, Any]]()
    for planes in (saved.planes.theta, saved.planes.momentum, saved.planes.residual or []):
        for plane in planes:
            plane.copy_(torch.randn(plane.numel()))
    before = Saver(saved.points, saved.planes, saved.inner, "eu_1", "eu")
    monkeypatch.setattr(before.uploads, "submit", jobs.append)
    before.save(state, Among(("eu_1",)), {"adam": 3}, {})
    survivor = Survivor({**jobs[0]["keep"]["what"], "busy": False}, before.uploads.arena)
    monkeypatch.setattr(saving, "find", lambda name, held: survivor)

    after = Saver(loaded.points, loaded.planes, loaded.inner, "eu_2", "eu")
    found = after.found
    assert found is not None and found["common"] and after.uploads.arena is survivor.arena
    after.load(found, loaded.planes)
    after.load_own(found, loaded.inner, loaded.planes, moments_only=not exact)
    for f, theta in enumerate(loaded.planes.theta):
        assert torch.equal(theta, saved.planes.theta[f])
        assert torch.equal(loaded.shards.read(f), saved.shards.read(f)) == exact
        assert torch.equal(loaded.planes.residual[f], saved.planes.residual[f]) == exact  # type: ignore[index]
    assert loaded.inner.updates == 3

    before.disown()
    again = Saver(loaded.points, loaded.planes, loaded.inner, "eu_3", "eu")
    assert again.found is None and again.uploads.arena is not survivor.arena
    again.save(state, Among(("eu_3",)), {"adam": 3}, {}, proven=False)
    assert again.uploads.wait(60)
    for saver in (before, after, again):
        saver.dismiss()
        saver.close()


def first_saved(store: Store) -> tuple[OneRank, OneRank, dict[str, Any]]:
    saved, loaded = OneRank(store, False), OneRank(store, False)
    for f, fragment in enumerate(saved.shards.fragments):
        saved.planes.load(f, 0, torch.randn(fragment.elements), torch.randn(fragment.elements))
    saved.points.save_first(saved.planes)
    return saved, loaded, next(loaded.points.candidates())


def test_a_run_can_go_back_to_its_start(tmp_path: Path) -> None:
    """With fewer regions than it began with."""
    first = first_saved(Store(str(tmp_path)))[2]
    log = Log(opening(fragments=2, start_regions=2), joining("eu_1"), joining("us_1"))
    assert counters(log.state).keys() == first["counters"].keys()
    log.add(log.round(answer("eu_1", (0, 4)), answer("us_1", (1, 24))))
    log.add({"kind": "leave", "member": "us_1"})
    state = log.add(log.rewind(first["counters"], first["prefix"]))
    assert (state.rounds, state.ledger.applied, state.fragments[0].base) == (0, 0, 0)
    log.add(log.round(answer("eu_1", (state.members["eu_1"].leases[0].id, 4))))


def test_an_outage_is_waited_for_and_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path))
    saved, loaded, manifest = first_saved(store)
    monkeypatch.setattr(checkpoints, "AGAIN", 0.01)
    real, away = store.view, [StoreError("the store is away")] * 2

    def sometimes(key: str, start: int, stop: int) -> memoryview:
        if away:
            raise away.pop()
        return real(key, start, stop)

    monkeypatch.setattr(store, "view", sometimes)
    loaded.points.load(manifest, loaded.planes)
    assert capsys.readouterr().out.count("the store is away; trying again") == 2
    for name in ("theta", "momentum"):
        for ours, theirs in zip(getattr(saved.planes, name), getattr(loaded.planes, name), strict=True):
            assert torch.equal(ours, theirs)
    monkeypatch.setattr(checkpoints, "OUTAGE", 0.0)
    away.append(StoreError("the store is away"))
    with pytest.raises(StoreError, match="away"):
        loaded.points.load(manifest, loaded.planes)
    assert not loaded.points.damaged and loaded.planes.bases == [-1, -1]
    assert next(loaded.points.candidates()) == manifest


def test_a_damaged_checkpoint_is_not_taken_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    _, loaded, manifest = first_saved(store)
    key = f"{manifest['prefix']}/{manifest['shards'][0]['name']}.safetensors"
    store.write(key, store.read(key)[:-1] + b"!")
    with pytest.raises(DamagedError, match=key):
        loaded.points.load(manifest, loaded.planes)
    assert loaded.planes.bases == [-1, -1] and loaded.points.damaged == {manifest["prefix"]}
    entries = Log(opening(fragments=2)).entries
    assert not list(loaded.points.on_the_way([manifest], entries))
    loaded.points.damaged.clear()
    assert list(loaded.points.on_the_way([manifest], entries)) == [manifest]
