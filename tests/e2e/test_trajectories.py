"""θ and momentum after every round, in every region, against a plain numpy DiLoCo fed with the same local parameters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ckpt.store import Store
from diloco.fold import fold
from diloco.fragments import BLOCK
from diloco.journal import Journal
from tests.e2e.cluster import Cluster
from tests.reference import diloco_round


def load(record: Path, region: str, seq: int, fragment: int, what: str) -> np.ndarray:
    """A whole fragment from the ranks' slices."""
    parts = sorted((record / region).glob(f"{seq}-{fragment}-r*-{what}.npy"))
    assert parts, f"{region} recorded no {what} of fragment {fragment} at entry {seq}"
    return np.concatenate([np.load(part) for part in parts])


def check(cluster: Cluster, record: Path, regions: list[str], rounds: int) -> None:
    """Replays the journal in numpy; every comparison is of bits."""
    state, done = None, 0
    theta: dict[int, np.ndarray] = {}
    momentum: dict[int, np.ndarray] = {}
    for data in Journal(Store(str(cluster.run / "store"))).read():
        before, state = state, fold(state, data)
        entry = json.loads(data)
        if entry["kind"] != "round":
            continue
        assert before is not None
        f, seq = entry["fragment"], entry["seq"]
        theta.setdefault(f, load(record, regions[0], 0, f, "theta"))
        momentum.setdefault(f, np.zeros_like(theta[f]))
        names = [before.members[answer["member"]].region for answer in entry["answers"]]
        assert sorted(names) == sorted(regions)
        local = [load(record, name, seq, f, "local") for name in names]
        weights = [before.weight(answer) for answer in entry["answers"]]
        settings = before.settings
        theta[f], momentum[f] = diloco_round(
            theta[f], momentum[f], local, weights, settings.lr, settings.momentum, before.fingerprint["codec"], BLOCK
        )
        for name in regions:
            assert np.array_equal(load(record, name, seq, f, "theta").view(np.int32), theta[f].view(np.int32))
            assert np.array_equal(load(record, name, seq, f, "momentum").view(np.int32), momentum[f].view(np.int32))
        done += 1
    assert done == rounds


@pytest.mark.parametrize(
    ("regions", "codec", "fragments", "sync_every"),
    [
        ({"eu": 1, "us": 1}, "none", 1, 4),
        ({"eu": 1, "us": 1, "asia": 1}, "none", 3, 6),
        ({"eu": 4, "us": 1}, "none", 1, 4),
        ({"eu": 1, "us": 1}, "int8", 3, 6),
        ({"eu": 4, "us": 2}, "int8", 2, 4),
    ],
)
def test_planes_equal_numpy(
    cluster: Cluster, tmp_path: Path, regions: dict[str, int], codec: str, fragments: int, sync_every: int
) -> None:
    rounds, record = 2 * fragments + 1, tmp_path / "record"
    capabilities = ["default", "avx2", "avx2"]  # regions on unlike machines agree, too
    for (name, nproc), capability in zip(regions.items(), capabilities, strict=False):
        cluster.start(
            name,
            f"codec={codec}",
            f"outer.fragments={fragments}",
            f"outer.sync_every={sync_every}",
            f"run.rounds={rounds}",
            f"elastic.start_regions={len(regions)}",
            "parallel.tp=2" if nproc == 4 else "parallel.tp=1",
            nproc=nproc,
            module="tests.e2e.recorded",
            env={"RECORD": str(record), "ATEN_CPU_CAPABILITY": capability},
        )
    cluster.finish()
    check(cluster, record, list(regions), rounds)
    digests = [[r["digest"] for r in cluster.records(name, "round")] for name in regions]
    assert len(digests[0]) == rounds and all(d == digests[0] for d in digests)
