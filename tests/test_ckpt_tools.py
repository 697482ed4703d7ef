"""`python -m ckpt`: what it says of a store, the damage it finds, averages, and commands that cannot be carried out."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt import layout, pieces
from ckpt.checkpoint import MANIFEST, commit_manifest, load_manifest, save_shard
from ckpt.format import FORMAT, Piece
from ckpt.layout import Theta
from ckpt.store import Store
from ckpt.tool import main
from tests.llama_checkpoints import GROUPED, SMALL, random_llama, save_llama

Tool = Callable[..., tuple[int, str]]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    """tool("ls", url): exit code and what was said."""

    def run(*argv: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with three checkpoints, and a region's own."""
    store = Store(str(tmp_path / "run" / "store"))
    for entry in (0, 9, 10):
        save_llama(store, random_llama(SMALL, seed=entry), entry=entry, applied=100 * entry)
    record = save_shard(store, "regions/run/eu/9", "r0-0", [Piece("x", 0, 0, 5, torch.ones(5))])
    commit_manifest(store, "regions/run/eu/9", {"seq": 9}, [record])
    return tmp_path / "run"


def one_sentence(said: str) -> None:
    assert said.startswith("ckpt: ") and said.count("\n") == 1 and "Traceback" not in said, said


def damaged(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("damaged: ")]


def theta_of(url: str, prefix: str) -> dict[str, torch.Tensor]:
    store = Store(url)
    theta = Theta(store, load_manifest(store, prefix))
    return {name: torch.cat(list(theta.blocks(name))) for name in theta.slots}


def test_ls_has_a_line_for_each(run: Path, tool: Tool) -> None:
    store = Store(str(run / "store"))
    store.write("checkpoints/run/11/eu-r0-0.safetensors", b"")  # of a save that was not committed
    code, said = tool("ls", run)
    rows = [line.split() for line in said.splitlines()]
    assert code == 0 and rows[0] == ["run", "entry", "rounds", "tokens", "size", "shards"]
    assert [row[:4] for row in rows[1:]] == [
        ["run", "0", "0", "0"],
        ["run", "9", "9", "28,800"],
        ["run", "10", "10", "32,000"],
    ]
    assert tool("ls", f"file://{run}")[1] == tool("ls", run / "store")[1] == said


@pytest.mark.parametrize(("name", "entry"), [("", 10), ("@9", 9), ("@run/0", 0)])
def test_show_has_facts_and_layout(run: Path, tool: Tool, name: str, entry: int) -> None:
    code, said = tool("show", f"{run}{name}")
    assert code == 0 and f"checkpoints/run/{entry} · format {FORMAT}" in said
    assert f"entry {entry} · rounds {entry} · tokens {3200 * entry:,}" in said and "rope_theta=500000.0" in said
    elements = sum(p.numel() for p in random_llama(SMALL).parameters())
    assert f"momentum, theta · {elements:,} parameters each" in said
    assert len([line for line in said.splitlines() if line.startswith("fragment ")]) == 3 + 2 * 9
    assert "layers.1.attention.wk.weight [8, 16]" in said


def test_verify_finds_every_damage(run: Path, tool: Tool) -> None:
    store = Store(str(run / "store"))
    code, said = tool("verify", run)
    assert code == 0 and said.endswith("looked at 4 checkpoint(s) · all right\n"), said
    shards = [run / "store" / key for key in store.list() if key.endswith(".safetensors")]
    assert len(shards) == 4
    for shard in shards:
        changed = bytearray(shard.read_bytes())
        changed[-2] ^= 4
        shard.write_bytes(changed)
    (run / "store/checkpoints/run/9" / MANIFEST).write_text("{}")
    code, said = tool("verify", run)
    assert code == 1 and len(damaged(said)) == 4 and said.endswith("4 damaged or missing\n"), said
    assert said.count("does not have the digest of the manifest") == 3 and "has no format version" in said
    code, said = tool("verify", f"{run}@0")
    assert code == 1 and len(damaged(said)) == 1 and "looked at 1 checkpoint(s)" in said
    code, said = tool("ls", run)
    assert code == 1 and len(damaged(said)) == 1
    one_sentence(tool("show", f"{run}@9")[1])
    assert tool("show", f"{run}@9")[0] == 1


def test_each_damaged_shard_has_its_sentence(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SHARD", 1000)
    store = Store(str(tmp_path))
    shards = [record["name"] for record in save_llama(store, random_llama(SMALL))["shards"]]
    store.delete(f"checkpoints/run/0/{shards[1]}.safetensors")
    store.write(f"checkpoints/run/0/{shards[3]}.safetensors", b"short")
    code, said = tool("verify", tmp_path)
    assert code == 1 and len(damaged(said)) == 2 < len(shards)
    assert "is missing" in damaged(said)[0] and "has 5 bytes" in damaged(said)[1]


def test_nothing_damaged_is_exported_or_averaged(run: Path, tool: Tool, tmp_path: Path) -> None:
    shard = next((run / "store/checkpoints/run/9").glob("*.safetensors"))
    changed = bytearray(shard.read_bytes())
    changed[len(changed) // 2] ^= 1
    shard.write_bytes(changed)
    for command in (("export", f"{run}@9", "--format", "hf"), ("average", f"{run}@9", f"{run}@10")):
        code, said = tool(*command, tmp_path / "out")
        assert code == 1 and "does not have the digest" in said and "Traceback" not in said
        assert not list(tmp_path.glob("*out*"))


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "with layout None": lambda m: m.pop("layout"),
    "as no list": lambda m: m["layout"].__setitem__(0, 7),
    "with name ''": lambda m: m["layout"][0][0].update(name=""),
    "with shape 'x'": lambda m: m["layout"][0][0].update(shape="x"),
    r"with shape \[-1": lambda m: m["layout"][0][0].update(shape=[-1, -8]),
    "with start None": lambda m: m["layout"][0][0].update(start=None),
    "at element 1 of fragment 0, not at 0": lambda m: m["layout"][0][0].update(start=1),
    "names a parameter twice": lambda m: m["layout"][0][0].update(name=m["layout"][1][0]["name"]),
    "but .* of them in theta": lambda m: m["layout"].append([{"name": "x", "shape": [1], "start": 0}]),
    "with counters None": lambda m: m.pop("counters"),
    "with rounds -1": lambda m: m["counters"].update(rounds=-1),
    "with seq_len '1'": lambda m: m["model"].update(seq_len="1"),
    "a model without target": lambda m: m["model"].pop("target"),
}


@pytest.mark.parametrize("finding", LAYOUTS)
def test_a_manifest_that_does_not_say_what_it_holds_is_damaged(tmp_path: Path, tool: Tool, finding: str) -> None:
    """However right its digest is."""
    store = Store(str(tmp_path))
    manifest = save_llama(store, random_llama(SMALL))
    LAYOUTS[finding](manifest)
    body = {k: v for k, v in manifest.items() if k not in ("format", "shards", "digest", "prefix")}
    store.delete(f"checkpoints/run/0/{MANIFEST}")
    commit_manifest(store, "checkpoints/run/0", body, manifest["shards"])
    for verb in ("verify", "show"):
        code, said = tool(verb, tmp_path)
        assert code == 1 and re.search(finding, said) and "Traceback" not in said, said


def test_an_average_is_the_weighted_mean(
    run: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, rounded once; read in blocks and from shards of any size."""
    monkeypatch.setattr(layout, "BLOCK", 100)
    monkeypatch.setattr(pieces, "SHARD", 250)
    out = f"{tmp_path}/average"
    code, said = tool("average", f"{run}@0", f"{run}@9", f"{run}@10", "--weights", "1,2,0.5", out)
    assert code == 0, said
    sources = [theta_of(f"{run}/store", f"checkpoints/run/{entry}") for entry in (0, 9, 10)]
    found = theta_of(out, "checkpoints/average/0")
    for name, tensor in found.items():
        x, y, z = (source[name].numpy().astype(np.float64) for source in sources)
        assert np.array_equal(tensor.numpy(), ((x + 2 * y + 0.5 * z) / 3.5).astype(np.float32)), name
    store = Store(out)
    manifest = load_manifest(store, "checkpoints/average/0")
    source = load_manifest(Store(f"{run}/store"), "checkpoints/run/0")
    assert manifest["layout"] == source["layout"] and manifest["model"] == source["model"]
    assert [each["weight"] for each in manifest["made"]["of"]] == [1, 2, 0.5]
    momentum = [p for shard in manifest["shards"] for p in shard["pieces"] if p["plane"] == "momentum"]
    assert sum(p["stop"] - p["start"] for p in momentum) == sum(t.numel() for t in found.values())
    assert tool("verify", out)[0] == 0 and "made        " in tool("show", out)[1]
    code, exported = tool("export", out, "--format=hf", tmp_path / "hf")
    assert code == 0 and exported.splitlines()[-1] == said.splitlines()[-1]


def test_an_average_of_one_with_itself_is_itself(run: Path, tool: Tool, tmp_path: Path) -> None:
    code, _ = tool("average", *[f"{run}@9"] * 3, tmp_path / "average")
    found = theta_of(str(tmp_path / "average"), "checkpoints/average/0")
    assert code == 0 and all(torch.equal(found[k], v) for k, v in theta_of(f"{run}/store", "checkpoints/run/9").items())


def test_an_average_of_runs_with_other_fragments(run: Path, tool: Tool, tmp_path: Path) -> None:
    """Parameters are found by name."""
    save_llama(Store(str(tmp_path / "one")), random_llama(SMALL, seed=9), fragments=1)
    code, said = tool("average", f"{run}@9", f"{tmp_path}/one@0", tmp_path / "average")
    assert code == 0, said
    found = theta_of(str(tmp_path / "average"), "checkpoints/average/0")
    assert all(torch.equal(found[k], v) for k, v in theta_of(f"{run}/store", "checkpoints/run/9").items())


def test_leftovers_of_a_killed_attempt_are_not_in_the_way(run: Path, tool: Tool, tmp_path: Path) -> None:
    store, create = Store(str(tmp_path / "average")), Store.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "create", lambda s, k, d: create(s, k, d) if MANIFEST not in k else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tool("average", f"{run}@0", f"{run}@9", tmp_path / "average")
    assert store.list() and tool("ls", tmp_path / "average")[0] == 2
    assert tool("average", f"{run}@0", f"{run}@10", tmp_path / "average")[0] == 0
    assert tool("verify", tmp_path / "average")[0] == 0


def test_what_exists_is_not_overwritten(run: Path, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    code, said = tool("export", run, "--format", "hf", tmp_path / "taken")
    assert code == 2 and f"OUT={tmp_path}/taken exists" in said and not list((tmp_path / "taken").iterdir())
    assert tool("export", run, "--format", "hf", tmp_path / "hf")[0] == 0
    before = {path: path.read_bytes() for path in (run / "store").rglob("*") if path.is_file()}
    for command in (("average", f"{run}@0", f"{run}@9", run), ("import", tmp_path / "hf", run / "store")):
        code, said = tool(*command)
        assert code == 2 and "has the checkpoint checkpoints/run/0" in said
        one_sentence(said)
    assert {path: path.read_bytes() for path in (run / "store").rglob("*") if path.is_file()} == before


def test_runs_of_one_store_are_told_apart(run: Path, tool: Tool, tmp_path: Path) -> None:
    """A region that was second to open the run has left its first checkpoint."""
    save_llama(Store(str(run / "store")), random_llama(SMALL, seed=77), run="lost", entry=0)
    assert tool("show", run)[0] == 0
    code, said = tool("export", f"{run}@0", "--format", "hf", tmp_path / "hf")
    assert code == 2 and "write URL@lost/0 or @run/0" in said
    code, said = tool("export", f"{run}@lost/0", "--format", "hf", tmp_path / "hf")
    assert code == 0 and said.startswith("from checkpoints/lost/0\n")


COMMANDS: dict[str, list[str]] = {
    "usage": ["dance"],
    "nothing is not 1 place": ["ls"],
    "is not 1 place": ["ls", "RUN", "RUN"],
    "--fast is not known here": ["ls", "RUN", "--fast"],
    "NOWHERE has no checkpoint": ["ls", "NOWHERE"],
    "RUN@77 is no checkpoint: write URL@ENTRY with one of run/0, run/9, run/10": ["show", "RUN@77"],
    "RUN@other/9 is no checkpoint": ["verify", "RUN@other/9"],
    "'s3:/bucket' is not a store": ["ls", "s3:/bucket"],
    "--format=None is not known: add --format hf": ["export", "RUN", "OUT"],
    "--format=gguf is not known": ["export", "RUN", "--format", "gguf", "OUT"],
    "--dtype=fp8 is not known: set it to fp32 or bf16": ["export", "RUN", "--format", "hf", "OUT", "--dtype", "fp8"],
    "--dtype has no value": ["export", "RUN", "--format", "hf", "OUT", "--dtype"],
    "is not 2 place": ["export", "RUN", "--format", "hf"],
    "names fewer than two checkpoints": ["average", "RUN@9", "OUT"],
    "names no entry": ["average", "RUN@9", "RUN", "OUT"],
    "--weights=1 is not 2 numbers": ["average", "RUN@9", "RUN@0", "OUT", "--weights=1"],
    "--weights=1,x is not 2 numbers": ["average", "RUN@9", "RUN@0", "OUT", "--weights=1,x"],
    "--weights=0,0 is not 2 numbers": ["average", "RUN@9", "RUN@0", "OUT", "--weights=0,0"],
    "--weights=1,-1 is not 2 numbers": ["average", "RUN@9", "RUN@0", "OUT", "--weights=1,-1"],
    "--weights=nan,1 is not 2 numbers": ["average", "RUN@9", "RUN@0", "OUT", "--weights=nan,1"],
    "are of different models": ["average", "RUN@9", "OTHER@0", "OUT"],
    "config.json cannot be read": ["import", "NOWHERE", "OUT"],
    "model.target=mine.Gru is no Llama": ["export", "GRU", "--format", "hf", "OUT"],
}


@pytest.mark.parametrize("sentence", COMMANDS)
def test_bad_commands_are_one_sentence(run: Path, tool: Tool, tmp_path: Path, sentence: str) -> None:
    save_llama(Store(str(tmp_path / "OTHER")), random_llama(GROUPED))
    gru = save_llama(Store(str(tmp_path / "GRU")), random_llama(SMALL), entry=1)
    gru["model"]["target"] = "mine.Gru"
    body = {k: gru[k] for k in ("seq", "counters", "model", "layout")}
    Store(str(tmp_path / "GRU")).delete(f"{gru['prefix']}/{MANIFEST}")
    commit_manifest(Store(str(tmp_path / "GRU")), gru["prefix"], body, gru["shards"])
    places = {"RUN": run, **{name: tmp_path / name for name in ("OTHER", "GRU", "NOWHERE", "OUT")}}
    argv = COMMANDS[sentence]
    for name, path in places.items():
        argv = [word.replace(name, str(path), 1) if word.startswith(name) else word for word in argv]
    code, said = tool(*argv)
    for name, path in places.items():
        said = said.replace(str(path), name)
    assert code == 2 and sentence in said and "Traceback" not in said, said
    assert not (tmp_path / "OUT").exists()


def test_a_store_that_is_away_is_one_sentence(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    code, said = tool("ls", "s3://bucket/run")
    assert code == 2 and "s3://bucket/run" in said
    one_sentence(said)


def test_it_is_a_program_that_needs_no_training_code(run: Path, tmp_path: Path) -> None:
    """As `python -m ckpt`, with `diloco` hidden."""
    (tmp_path / "diloco.py").write_text("raise ImportError('no training code')\n")
    path = f"{tmp_path}:{Path(__file__).parent.parent}"
    done = subprocess.run(
        [sys.executable, "-m", "ckpt", "export", str(run), "--format", "hf", str(tmp_path / "hf")],
        env={"PYTHONPATH": path, "PATH": "", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "config.json").exists() and "θ " in done.stdout
