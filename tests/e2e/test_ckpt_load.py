"""What a run starts from, with real processes: an import, another run, and its own checkpoints when some are damaged."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt.checkpoint import MANIFEST, load_manifest
from ckpt.layout import Theta
from ckpt.reading import Reader, numbered
from ckpt.store import Store
from ckpt.tool import main
from diloco.data import DataConfig, Dataset, build_source
from diloco.fragments import Fragment, block_digests, digest
from diloco.model import build_llama, next_token_loss
from tests.e2e import no_pickle
from tests.e2e.cluster import Cluster, RegionProcess
from tests.llama_checkpoints import random_llama, save_llama
from tests.test_ckpt_export import parameters_of

ARGS = {"vocab": 256, "dim": 64, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 128, "tied": True}
"""Of the runs here."""
BASE = ["outer.sync_every=8", "run.rounds=2"]


def entries(cluster: Cluster) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((cluster.run / "store" / "journal").glob("*.json"))]


def rounds(cluster: Cluster) -> list[dict[str, Any]]:
    return [entry for entry in entries(cluster) if entry["kind"] == "round"]


def first(cluster: Cluster) -> dict[str, Any]:
    """The manifest of the run's first checkpoint."""
    state = cluster.state()
    assert state is not None
    return load_manifest(Store(str(cluster.run / "store")), f"checkpoints/{state.run}/0")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with what came from a folder of Hugging Face."""
    folder = tmp_path_factory.mktemp("import")
    save_llama(Store(str(folder / "run/store")), random_llama(ARGS))
    assert main(["export", str(folder / "run"), "--format", "hf", str(folder / "hf")]) == 0
    assert main(["import", str(folder / "hf"), str(folder / "imported")]) == 0
    return str(folder / "imported")


def test_a_run_starts_from_an_import(cluster: Cluster, imported: str) -> None:
    """Two ranks: the parameters of the first round are the import's, and so is the loss of the first step."""
    region = cluster.start("eu", *BASE, f"ckpt.resume={imported}", "run.report_every=1", nproc=2)
    cluster.finish()
    store = Store(imported)
    manifest = load_manifest(store, "checkpoints/import/0")
    assert "a new run with the parameters and outer momentum of" in region.text()
    theta = Theta(store, manifest)
    flat = torch.cat([block for name in theta.slots for block in theta.blocks(name)])
    assert rounds(cluster)[0]["theta"] == digest(block_digests(flat, Fragment.block))
    assert first(cluster)["started"]["digest"] == manifest["digest"]
    model = build_llama(**ARGS)
    model.load_state_dict(parameters_of(store, manifest), strict=False)
    data = DataConfig()
    tokens = Dataset(build_source(data), 32, data.holdout, 0).batch(range(4)).long()
    expected = next_token_loss(model, tokens)[1].item()
    step = min(cluster.records("eu", "step"), key=lambda record: record["step"])
    assert abs(step["loss"] - expected) < 1e-4, (step, expected)


def test_all_regions_of_a_run_name_what_it_starts_from(cluster: Cluster, imported: str) -> None:
    """One of them opens it, the other joins, though the journal is there by then."""
    for name in ("eu", "us"):
        cluster.start(name, *BASE, f"ckpt.resume={imported}", "elastic.start_regions=2")
    cluster.finish()
    assert len(rounds(cluster)[-1]["answers"]) == 2
    assert first(cluster)["started"]["named"] == imported


def test_a_run_starts_from_another_one_and_refuses_others(cluster: Cluster, imported: str, tmp_path: Path) -> None:
    """θ and momentum, whatever the fragments; a run that is there goes on with what it started from, and with nothing else."""
    cluster.start("eu", *BASE)
    cluster.finish()
    (tmp_path / "second").mkdir()
    second = Cluster(tmp_path / "second")
    try:
        eu = second.start("eu", *BASE, f"ckpt.resume={cluster.run}", "outer.fragments=2", nproc=2)
        second.finish()
        source, mine = Store(str(cluster.run / "store")), Store(str(second.run / "store"))
        prefix = numbered(source, first(cluster)["prefix"].rsplit("/", 1)[0])[0]
        assert f"parameters and outer momentum of {source.url} {prefix}" in eu.text()
        there, here = load_manifest(source, prefix), first(second)
        slots = Theta(source, there).slots, Theta(mine, here).slots
        readers = Reader(source, there), Reader(mine, here)
        for name in slots[0]:
            for plane in ("theta", "momentum"):
                a, b = (
                    r.read(plane, s[name].fragment, s[name].start, s[name].stop)
                    for r, s in zip(readers, slots, strict=True)
                )
                assert torch.equal(a, b) and b.any()
        again = [*BASE, "run.rounds=3"]
        refused = second.start("us", *again, f"ckpt.resume={imported}")
        assert refused.wait() == 2
        assert re.search(rf"ckpt\.resume={imported} is for a new run, .* began from {cluster.run}: set", refused.text())
    finally:
        second.close()


REFUSED = {
    r"model\.args\.rope_theta is 500000\.0 there and 10000 here: set model\.args\.rope_theta": [
        "+model.args.rope_theta=10000"
    ],
    r"model\.args\.ffn is 128 there and 192 here": [
        "model.args={vocab: 256, dim: 64, layers: 4, heads: 4, kv_heads: 2, ffn: 192, tied: true}"
    ],
}


@pytest.mark.parametrize("says", REFUSED)
def test_another_model_is_refused_with_both_values(cluster: Cluster, imported: str, says: str) -> None:
    region = cluster.start("eu", *BASE, f"ckpt.resume={imported}", *REFUSED[says])
    assert region.wait() == 2
    assert re.search(says, region.text()) and "Traceback" not in region.text()
    assert not list((cluster.run / "store").glob("journal/*.json"))


@pytest.mark.parametrize(
    ("value", "says"),
    [("always", "is not known: set it to auto, never or the URL"), ("/nowhere/at/all", "has no checkpoint: name")],
)
def test_what_is_no_checkpoint_is_refused(cluster: Cluster, value: str, says: str) -> None:
    region = cluster.start("eu", *BASE, f"ckpt.resume={value}")
    assert region.wait() == 2 and f"ckpt.resume={value}" in region.text() and says in region.text(), region.text()


def killed(cluster: Cluster, *overrides: str, nproc: int = 1) -> str:
    """A run that was killed after some rounds, with checkpoints of some of them: its id."""
    eu = cluster.start("eu", *LONG, *overrides, nproc=nproc)
    cluster.kill_when(
        lambda: cluster.rounds() >= 5 and cluster.inner_states_saved("eu") and len(saved(cluster)) > 3, eu
    )
    state = cluster.state()
    assert state is not None
    return state.run


LONG = ["outer.sync_every=8", "run.rounds=8"]


def saved(cluster: Cluster) -> list[str]:
    """Global checkpoints, newest first."""
    state, store = cluster.state(), Store(str(cluster.run / "store"))
    return numbered(store, f"checkpoints/{state.run}") if state else []


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def shards(cluster: Cluster, prefix: str) -> list[Path]:
    return sorted((cluster.run / "store" / prefix).glob("*.safetensors"))


def goes_on(cluster: Cluster, before: list[dict[str, Any]], *overrides: str, nproc: int = 1) -> RegionProcess:
    """Another region brings the run to its end from what the first one left; none of its rounds is lost or differs."""
    region = cluster.start("us", *LONG, *overrides, nproc=nproc)
    cluster.finish()
    after = rounds(cluster)
    assert after[: len(before)] == before and len(after) == 8
    theirs = {r["seq"]: r["digest"] for r in cluster.records("eu", "round")}
    base = after[len(before)]["base"]
    assert after[len(before)]["theta"] == theirs[base], "it goes on from another state than that of the last round"
    return region


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "swap"])
def test_damage_costs_one_checkpoint_and_not_one_round(cluster: Cluster, damage: str) -> None:
    """Two ranks wrote, two read: the one whose shard is fine falls back with the other."""
    killed(cluster, nproc=2)
    prefix, before = saved(cluster)[0], rounds(cluster)
    one, other = shards(cluster, prefix)[-1], shards(cluster, saved(cluster)[1])[-1]
    if damage == "flip":
        flip(one)
    elif damage == "cut":
        one.write_bytes(one.read_bytes()[:-1])
    elif damage == "gone":
        one.unlink()
    else:
        one.write_bytes(other.read_bytes())
    region = goes_on(cluster, before, nproc=2)
    assert f"checkpoint {prefix} is passed over" in region.text() and one.name in region.text()
    assert not [entry for entry in entries(cluster) if entry["kind"] == "rewind"]


def test_damage_without_the_bits_goes_back_in_the_journal(cluster: Cluster) -> None:
    killed(cluster, "ckpt.durable=false", "ckpt.lost_wait=5")
    before = saved(cluster)
    flip(shards(cluster, before[0])[0])
    region = cluster.start("us", *LONG, "ckpt.lost_wait=5")
    cluster.finish()
    rewinds = [entry for entry in entries(cluster) if entry["kind"] == "rewind"]
    assert [entry["checkpoint"] for entry in rewinds] == [before[1]], region.text()
    assert f"checkpoint {before[0]} is passed over" in region.text() and cluster.rounds() == 8


def test_damaged_inner_state_costs_its_age(cluster: Cluster) -> None:
    run = killed(cluster)
    own = numbered(Store(str(cluster.run / "store")), f"regions/{run}/eu")
    flip(shards(cluster, own[0])[0])
    region = cluster.start("eu", *LONG)
    cluster.finish()
    assert f"checkpoint {own[0]} is passed over" in region.text()
    assert f"inner state of entry {own[1].rsplit('/')[-1]}" in region.text() and cluster.rounds() == 8


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_under_any_name_is_never_loaded(cluster: Cluster, tmp_path: Path) -> None:
    run = killed(cluster)
    bomb, before = pickle.dumps(Bomb(tmp_path / "loaded")), rounds(cluster)
    newest, store = saved(cluster)[0], cluster.run / "store"
    later = store / f"checkpoints/{run}/999"
    later.mkdir()
    (later / MANIFEST).write_bytes(bomb)
    own = store / f"regions/{run}/us/3"
    own.mkdir(parents=True)
    (own / MANIFEST).write_bytes(bomb)
    for folder in (store / newest, store / f"checkpoints/{run}", store / "pins", store / "journal", store):
        folder.mkdir(exist_ok=True)
        for name in (".metadata", "__0_0.distcp", "model.pt", "state.pkl", "latest", "removed.safetensors"):
            (folder / name).write_bytes(bomb)
    shards(cluster, newest)[0].write_bytes(bomb)
    log = tmp_path / "pickles"
    region = cluster.start("us", *LONG, module="tests.e2e.no_pickle", env={no_pickle.LOG: str(log)})
    cluster.finish()
    assert log.read_text() == "on\n" and not (tmp_path / "loaded").exists()
    assert f"checkpoint checkpoints/{run}/999 is passed over" in region.text()
    assert f"checkpoint {newest} is passed over" in region.text() and rounds(cluster)[: len(before)] == before
    pickle.loads(bomb)  # noqa: S301 - it would have gone off
    assert (tmp_path / "loaded").exists()
