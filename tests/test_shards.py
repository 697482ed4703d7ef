"""Any mesh gives the same flat fragments, and takes them back exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.shards_worker import known_values

MESHES = [(1, 1), (4, 1), (4, 2), (4, 4), (3, 1)]
"""(ranks, tp)."""


def slices(out: Path, world: int, tp: int, tied: bool, what: str) -> list[np.ndarray]:
    """Whole fragments from the ranks' slices."""
    ranks = [np.load(out / f"{world}-{tp}-{tied}-r{rank}-{what}.npz") for rank in range(world)]
    return [np.concatenate([rank[key] for rank in ranks]) for key in ranks[0].files]


def bits(fragments: list[np.ndarray]) -> list[bytes]:
    return [fragment.tobytes() for fragment in fragments]


def test_every_mesh_reads_and_writes_the_same_bits(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    for world, tp in MESHES:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
        command = [sys.executable, *launcher, "-m", "tests.shards_worker", str(tmp_path), str(tp)]
        subprocess.run(command, env=env, check=True, timeout=120)
    for tied in (False, True):
        reference = slices(tmp_path, 1, 1, tied, "read")
        expected = [known_values(fragment.size).numpy() for fragment in reference]
        for world, tp in MESHES:
            assert bits(slices(tmp_path, world, tp, tied, "read")) == bits(reference)
            assert bits(slices(tmp_path, world, tp, tied, "after")) == bits(expected)
            assert bits(slices(tmp_path, world, tp, tied, "moment")) == bits([-values for values in expected])
