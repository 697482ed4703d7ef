"""Any mesh of a region's ranks trains like one rank, to fp32 reduction noise (real torchrun, CPU/Gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckpt.store import StoreError
from diloco.errors import ConfigError
from diloco.model import build_llama
from diloco.parallel import ParallelConfig, Region, blocks_of, on_rank_0, open_region, parallelize, validate
from diloco.settings import JournalError
from tests.parallel_worker import CASES, Case, train

ROOT = Path(__file__).parent.parent


def torchrun(ranks: int, script: str, *args: str) -> str:
    """Standard output of the script under torchrun, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "tests" / script), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def meshes() -> dict[str, Any]:
    """Every case of the worker, trained by four ranks."""
    return json.loads(torchrun(4, "parallel_worker.py").splitlines()[-1])


@pytest.fixture(scope="module")
def references() -> dict[bool, dict[str, Any]]:
    """One unwrapped rank in this process, with untied and tied weights."""
    return {tied: train(Case(tp=1, tied=tied)) for tied in (False, True)}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == "float32"])
def test_curve_of_one_rank(name: str, meshes: dict[str, Any], references: dict[bool, dict[str, Any]]) -> None:
    got, expected = meshes[name], references[CASES[name].tied]
    assert min(expected["grad_norm"]) > 0.25, "clipping was not put to the test"
    assert expected["nll"][-1] < expected["nll"][0] - 0.5, "nothing was learnt"
    assert got["nll"] == pytest.approx(expected["nll"], rel=2e-6)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5)
    assert got["norm_again"] == pytest.approx(expected["norm_again"], rel=2e-5)
    assert got["shapes"] == expected["shapes"]  # names too: no wrapper shows
    assert got["parameters"] == pytest.approx(expected["parameters"], rel=1e-5)
    assert got["replicas_differ"] == []
    assert got["held_out"] == pytest.approx(expected["held_out"], rel=2e-6), "an evaluation saw stale parameters"


def test_tied_weights_stay_one_parameter(meshes: dict[str, Any]) -> None:
    for name, case in CASES.items():
        assert ("output.weight" in meshes[name]["shapes"]) is not case.tied, name


def test_bfloat16_compute(meshes: dict[str, Any], references: dict[bool, dict[str, Any]]) -> None:
    got, expected = meshes["fsdp2_tp2_bf16"]["nll"], references[False]["nll"]
    assert got == pytest.approx(expected, rel=5e-3)
    assert got != pytest.approx(expected, rel=1e-5), "this was fp32"


def test_broadcast_bytes_and_places(meshes: dict[str, Any]) -> None:
    assert meshes["bytes"] == [True] * 4
    assert meshes["place"] == [0, 4, 2, 2, 0, 0]


def test_one_rank_variants(references: dict[bool, dict[str, Any]]) -> None:
    """Checkpointing changes nothing; bfloat16 on a lone rank goes through FSDP, without torchrun."""
    again = train(Case(tp=1, checkpoint_activations=True))
    assert again["nll"] == references[False]["nll"]
    assert again["shapes"] == references[False]["shapes"]
    try:
        half = train(Case(tp=1, dtype="bfloat16"))
    finally:
        open_region(ParallelConfig(device="cpu")).close()
    assert half["nll"] == pytest.approx(references[False]["nll"], rel=5e-3)
    assert half["nll"] != references[False]["nll"]


def test_lone_region() -> None:
    region = open_region(ParallelConfig(device="cpu"))
    assert region == Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)
    assert region.broadcast_bytes(b"a round") == b"a round"
    region.barrier()
    region.close()


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(ConfigError("a=1"), ConfigError), (JournalError("bug"), JournalError), (StoreError("away"), OSError)],
)
def test_what_rank_0_meets_is_raised_on_all_ranks(raised: Exception, kind: type[Exception]) -> None:
    said: list[bytes] = []

    def action() -> None:
        raise raised

    def broadcast(data: bytes | None) -> bytes:
        said.append(data or b"")
        return said[0]

    for rank in range(2):
        region = Region(rank, 2, 2, 1, rank, 0, torch.device("cpu"), None)
        region.broadcast_bytes = broadcast if rank == 0 else lambda _: said[0]  # type: ignore[method-assign]
        with pytest.raises(kind, match=f"^{raised}$"):
            on_rank_0(region, action)


def test_blocks_are_the_longest_module_list() -> None:
    model = build_llama(vocab=8, dim=8, layers=3, heads=2, kv_heads=1, ffn=8)
    assert blocks_of(model) == list(model.layers)
    assert blocks_of(nn.Linear(2, 2)) == []


def test_tp_without_a_plan() -> None:
    region = Region(0, 4, 2, 2, 0, 0, torch.device("cpu"), None)
    with pytest.raises(ConfigError, match=r"parallel\.tp=2 needs model\.plan"):
        parallelize(nn.Linear(2, 2), region, ParallelConfig(tp=2), None)


@pytest.mark.parametrize(
    ("cfg", "world", "words"),
    [
        (ParallelConfig(tp=3), 4, ["parallel.tp=3", "4 rank(s)"]),
        (ParallelConfig(tp=0), 4, ["parallel.tp=0"]),
        (ParallelConfig(tp=2), 1, ["parallel.tp=2", "1 rank(s)"]),
        (ParallelConfig(device="tpu"), 1, ["parallel.device=tpu", "'cuda'"]),
        (ParallelConfig(dtype="float16"), 1, ["parallel.dtype=float16", "'bfloat16'"]),
        (ParallelConfig(timeout=0), 1, ["parallel.timeout=0"]),
    ],
)
def test_bad_values(cfg: ParallelConfig, world: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        validate(cfg, world)
    assert all(word in str(error.value) for word in words), error.value


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(torch.cuda.device_count() + 1))
    with pytest.raises(ConfigError, match=r"parallel\.device=cuda, but .* set parallel\.device=cpu"):
        validate(ParallelConfig(device="cuda"), 1)
