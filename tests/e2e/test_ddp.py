"""+experiment=ddp: two regions, one of them of two ranks, train like one region whose batches are both of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckpt.reading import Reader, newest
from ckpt.store import Store
from tests.e2e.cluster import Cluster

STEPS = 12
COMMON = ("+experiment=ddp", f"run.rounds={STEPS}", "run.eval_every=4", "run.report_every=1", "ckpt.every=6")


def planes(cluster: Cluster) -> dict[str, Tensor]:
    store = Store(str(cluster.run / "store"))
    state = cluster.state()
    assert state is not None
    manifest = next(newest(store, f"checkpoints/{state.run}", lambda *_: None))
    assert manifest["counters"]["rounds"] == STEPS
    reader = Reader(store, manifest)
    last = max(piece["stop"] for shard in manifest["shards"] for piece in shard["pieces"])
    return {plane: reader.read(plane, 0, 0, last) for plane in ("theta", "momentum", "variance")}


def test_two_regions_equal_one_with_their_batches_joined(tmp_path: Path) -> None:
    found, losses = [], []
    for regions in ({"eu": (2, 4), "us": (1, 4)}, {"all": (1, 8)}):
        directory = tmp_path / str(len(regions))
        directory.mkdir()
        cluster = Cluster(directory)
        try:
            for name, (nproc, batch) in regions.items():
                start = f"elastic.start_regions={len(regions)}"
                cluster.start(name, *COMMON, f"inner.batch={batch}", start, nproc=nproc)
            cluster.finish()
            found.append(planes(cluster))
            losses.append([record["loss"] for record in cluster.records(next(iter(regions)), "eval")])
            digests = [[record["digest"] for record in cluster.records(name, "round")] for name in regions]
            assert all(len(d) == STEPS and d == digests[0] for d in digests)
        finally:
            cluster.close()
    joined, alone = found
    assert losses[0] == pytest.approx(losses[1], abs=2e-5) and len(losses[0]) == 3
    for plane, atol in (("theta", 2e-5), ("momentum", 1e-6), ("variance", 1e-8)):
        assert torch.allclose(joined[plane], alone[plane], rtol=1e-3, atol=atol), plane
    assert (joined["theta"] - alone["theta"]).abs().mean() < 2e-7
