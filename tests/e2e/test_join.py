"""A region joins a run that goes on: all members serve it, and its AdamW goes on from a member's moments."""

from __future__ import annotations

import json
import re

import pytest
import torch

from ckpt.checkpoint import load_manifest
from ckpt.reading import Reader
from ckpt.store import Store
from tests.e2e.cluster import Cluster

BASE = ["outer.sync_every=16", "run.rounds=100000", "ckpt.every=1", "run.eval_every=0", "outer.fragments=2"]


@pytest.mark.parametrize("inner", ["peer", "fresh"])
def test_a_joiner(cluster: Cluster, inner: str) -> None:
    """Two members, one of two ranks; the joiner's first stored inner state says how many updates are behind it."""
    cluster.start("eu", *BASE, "elastic.start_regions=2", nproc=2)
    cluster.start("us", *BASE, "elastic.start_regions=2")
    cluster.until(lambda: cluster.rounds() >= 6)
    asia = cluster.start("asia", *BASE, f"elastic.join_inner={inner}")
    state = cluster.state()
    assert state is not None
    store = cluster.run / "store"
    own = store / "regions" / state.run / "asia"
    cluster.until(lambda: list(own.glob("*/manifest.json")))
    text = asia.text()
    first = min(own.glob("*/manifest.json"), key=lambda path: int(path.parent.name))
    manifest = load_manifest(Store(str(store)), str(first.parent.relative_to(store)))
    behind = manifest["progress"]["adam"]
    steps = max(
        json.loads(line).get("step", 0) for line in (cluster.run / "asia" / "metrics.jsonl").read_text().splitlines()
    )
    assert re.search(r"asia_\d+: fetched .* MB from \w+", text), text
    if inner == "peer":
        assert re.search(r"inner state of (eu|us)_\d+", text), text
        assert behind >= 6 * 8 and behind > steps
        moment = Reader(Store(str(store)), manifest).read("exp_avg_sq", 0, 0, 1000)
        assert torch.count_nonzero(moment) > 0
    else:
        assert "fresh inner state" in text and behind < 6 * 8
