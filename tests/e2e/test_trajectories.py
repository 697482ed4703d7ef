"""θ and momentum after every round, in every region, against a plain numpy DiLoCo fed with the same local parameters; and
the local parameters after every merge, against the formula."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ckpt.store import Store
from diloco.fold import fold
from diloco.fragments import BLOCK
from diloco.journal import Journal
from diloco.merging import rounding_seed
from tests.e2e.cluster import Cluster
from tests.reference import decode, encode, nesterov, weighted_mean


def load(record: Path, region: str, seq: int, fragment: int, what: str) -> np.ndarray:
    """A whole fragment from the ranks' slices."""
    parts = sorted((record / region).glob(f"{seq}-{fragment}-r*-{what}.npy"))
    assert parts, f"{region} recorded no {what} of fragment {fragment} at entry {seq}"
    return np.concatenate([np.load(part) for part in parts])


def merged(x: np.ndarray, theta: np.ndarray, snapshot: np.ndarray, alpha: float | None) -> np.ndarray:
    """Local parameters after a merge of one's own contribution; alpha: of merge=mix."""
    if alpha is None:
        return theta + (x - snapshot)
    return np.float32(alpha) * x + np.float32(1 - alpha) * theta


class Wire:
    """What the others get of a region's pseudo-gradient, in numpy; with error feedback it keeps the residuals."""

    def __init__(self, codec: str, rounding: str = "nearest", decay: float | None = None) -> None:
        self.codec, self.rounding, self.decay = codec, rounding, decay
        self.residual: dict[tuple[str, int], np.ndarray] = {}
        self.rounds: dict[int, int] = {}

    def contribution(self, region: str, f: int, delta: np.ndarray) -> np.ndarray:
        error = self.residual.get((region, f), np.zeros_like(delta))
        full = delta if self.decay is None else delta + error
        sent = self._through(full, rounding_seed(0, f, self.rounds.get(f, 0), region))
        if self.decay is not None:
            self.residual[region, f] = ((error + delta) - sent) * np.float32(self.decay)
        return sent

    def mean(self, f: int, parts: list[np.ndarray], weights: list[float]) -> np.ndarray:
        self.rounds[f] = self.rounds.get(f, 0) + 1
        mean = weighted_mean(parts, weights)
        return mean + np.float32(0) if self.codec == "topk" else self._through(mean, 0)

    def _through(self, x: np.ndarray, seed: int) -> np.ndarray:
        return decode(self.codec, encode(self.codec, x, BLOCK, self.rounding, seed), len(x), BLOCK)


def check(
    cluster: Cluster, record: Path, regions: list[str], rounds: int, wire: Wire, alpha: float | None = None
) -> None:
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
        weights = before.weights(entry["fragment"], entry["answers"])
        settings = before.settings
        parts = [wire.contribution(name, f, theta[f] - x) for name, x in zip(names, local, strict=True)]
        gradient = wire.mean(f, parts, weights)
        theta[f], momentum[f] = nesterov(theta[f], momentum[f], gradient, settings.lr, settings.momentum)
        for name, snapshot in zip(names, local, strict=True):
            assert np.array_equal(load(record, name, seq, f, "theta").view(np.int32), theta[f].view(np.int32))
            assert np.array_equal(load(record, name, seq, f, "momentum").view(np.int32), momentum[f].view(np.int32))
            x = merged(load(record, name, seq, f, "before"), theta[f], snapshot, alpha)
            assert np.array_equal(load(record, name, seq, f, "after"), x)
            if wire.decay is not None:
                residual = load(record, name, seq, f, "residual")
                assert residual.any() and np.array_equal(residual, wire.residual[name, f])
        done += 1
    assert done == rounds


def train(cluster: Cluster, record: Path, regions: dict[str, int], rounds: int, *overrides: str, slow: int = 0) -> None:
    capabilities = ["default", "avx2", "avx2"]  # regions on unlike machines agree, too
    for (name, nproc), capability in zip(regions.items(), capabilities, strict=False):
        cluster.start(
            name,
            *overrides,
            f"run.rounds={rounds}",
            f"elastic.start_regions={len(regions)}",
            "parallel.tp=2" if nproc == 4 else "parallel.tp=1",
            nproc=nproc,
            module="tests.e2e.recorded",
            env={"RECORD": str(record), "ATEN_CPU_CAPABILITY": capability, "SLOW": str(slow)},
        )
    cluster.finish()
    digests = [[r["digest"] for r in cluster.records(name, "round")] for name in regions]
    assert len(digests[0]) == rounds and all(d == digests[0] for d in digests)


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
    overrides = [f"codec={codec}", f"outer.fragments={fragments}", f"outer.sync_every={sync_every}"]
    train(cluster, record, regions, rounds, *overrides)
    check(cluster, record, list(regions), rounds, Wire(codec))
    assert all(r["overlap"] == 0 for name in regions for r in cluster.records(name, "round"))


@pytest.mark.parametrize(
    ("regions", "codec", "fragments", "sync_every", "overlap", "slow", "alpha"),
    [
        ({"eu": 1, "us": 1}, "int8", 1, 8, 6, 3, None),
        ({"eu": 1, "us": 1}, "none", 4, 12, 10, 5, None),
        ({"eu": 2, "us": 1, "asia": 1}, "int8", 2, 8, 7, 5, None),
        ({"eu": 1, "us": 2}, "int8", 3, 12, 5, 2, 0.5),
        ({"eu": 1, "us": 1}, "none", 2, 8, 3, 1, 0.0),
    ],
)
def test_planes_equal_numpy_while_training_goes_on(
    cluster: Cluster,
    tmp_path: Path,
    regions: dict[str, int],
    codec: str,
    fragments: int,
    sync_every: int,
    overlap: int,
    slow: int,
    alpha: float | None,
) -> None:
    """Exchanges that take longer than inner steps, and where `slow` is more than a boundary's worth of steps, several
    fragments in flight."""
    rounds, record = 2 * fragments + 3, tmp_path / "record"
    overrides = [f"codec={codec}", f"outer.fragments={fragments}", f"outer.sync_every={sync_every}"]
    overrides += [f"outer.max_overlap_steps={overlap}", "inner.lr=1e-3"]
    overrides += [] if alpha is None else ["outer.merge=mix", f"outer.alpha={alpha}"]
    train(cluster, record, regions, rounds, *overrides, slow=slow)
    check(cluster, record, list(regions), rounds, Wire(codec), alpha)
    for name in regions:
        overlaps = [r["overlap"] for r in cluster.records(name, "round")]
        assert slow <= max(overlaps) <= overlap, overlaps
        assert sum(o > 0 for o in overlaps) > rounds / 2, overlaps
    state = cluster.state()
    assert state is not None
    dropped = sum(r["dropped"] for r in cluster.records("us", "round"))
    assert (dropped > 0) == (alpha is not None) and dropped == state.ledger.dropped * state.settings.seq_len


@pytest.mark.parametrize(
    ("regions", "codec", "rounding", "decay"),
    [
        ({"eu": 1, "us": 2}, "int4", "stochastic", 1.0),
        ({"eu": 1, "us": 1, "asia": 1}, "topk", "nearest", 0.95),
        ({"eu": 1, "us": 2}, "topk", "nearest", None),
    ],
)
def test_error_feedback_and_sparse_codecs_equal_numpy(
    cluster: Cluster, tmp_path: Path, regions: dict[str, int], codec: str, rounding: str, decay: float | None
) -> None:
    """Two fragments in flight: residuals change when a contribution is used, and only then."""
    rounds, record = 7, tmp_path / "record"
    overrides = [f"codec={codec}", f"codec.rounding={rounding}", f"codec.error_feedback={decay is not None}"]
    overrides += ["outer.fragments=2", "outer.sync_every=6", "outer.max_overlap_steps=5", "inner.lr=1e-3"]
    train(cluster, record, regions, rounds, *overrides, f"codec.feedback_decay={decay or 1.0}", slow=4)
    check(cluster, record, list(regions), rounds, Wire(codec, rounding, decay))
