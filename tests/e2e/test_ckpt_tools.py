"""`python -m ckpt` on what a real run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckpt.checkpoint import load_manifest
from ckpt.layout import Theta
from ckpt.store import Store
from ckpt.tool import main
from diloco.fragments import Fragment, block_digests, digest
from diloco.model import build_llama
from tests.e2e.cluster import Cluster
from tests.e2e.test_by_hand import digests
from tests.test_ckpt_export import logits_of, parameters_of


def test_a_run_is_listed_verified_exported_and_imported(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks with FSDP and tied weights: what comes out is the θ whose digest the run has seen, and transformers agrees."""
    cluster.start("eu", "outer.sync_every=8", "run.rounds=4", "ckpt.every=2", nproc=2)
    cluster.finish()
    seen, run, hf = digests(cluster, "eu"), str(cluster.run), tmp_path / "hf"
    assert main(["ls", run]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[2] for row in rows] == ["0", "2", "4"] and rows[-1][3] == f"{4 * 8 * 4 * 32:,}"
    assert main(["show", run]) == main(["verify", run]) == 0
    assert main(["export", run, "--format", "hf", str(hf)]) == 0
    assert main(["import", str(hf), str(tmp_path / "imported")]) == 0
    exported, imported = [line for line in capsys.readouterr().out.splitlines() if line.startswith("θ ")]
    assert exported == imported
    store = Store(str(tmp_path / "imported"))
    manifest = load_manifest(store, "checkpoints/import/0")
    theta = Theta(store, manifest)
    flat = torch.cat([block for name in theta.slots for block in theta.blocks(name)])
    assert digest(block_digests(flat, Fragment.block)) == seen[max(seen)]
    model = build_llama(**manifest["model"]["args"])
    model.load_state_dict(parameters_of(store, manifest), strict=False)
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(tokens) - logits_of(hf, tokens)).abs().max() <= 1e-4
