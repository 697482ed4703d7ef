"""Real text: State of the Union addresses, as bytes and as GPT-2 tokens; those of one time in one region, the rest in another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from diloco.journal import main
from diloco.metrics import HELD_OUT
from tests.e2e.cluster import SHORT, Cluster
from tests.texts import GPT2, SOTU, package

HELDOUT = "0.1"
CENTURIES = {"old": lambda year: year <= 1900, "new": lambda year: year > 1900}


def prepare(out: Path, texts: list[Path], tokenizer: str) -> dict[str, Any]:
    """The index of what `prepare` makes of the files."""
    command = [sys.executable, "-m", "diloco.data", "prepare", *map(str, texts), str(out), "--tokenizer", tokenizer]
    done = subprocess.run([*command, "--holdout", HELDOUT, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "index.json").read_text())


def corpora(directory: Path, texts: list[Path], tokenizer: str) -> dict[str, dict[str, Any]]:
    """Prepared folders in `directory`: all addresses, those until 1900, and those after it. Which documents are held out is
    the same in all of them."""
    found = {"all": prepare(directory / "all", texts, tokenizer)}
    for name, of_it in CENTURIES.items():
        found[name] = prepare(directory / name, [path for path in texts if of_it(int(path.name[:4]))], tokenizer)
    return found


def documents(folder: Path, index: dict[str, Any], split: str) -> list[str]:
    """The texts, decoded, of a folder of GPT-2 tokens."""
    decode, found = Tokenizer.from_file(str(folder / "tokenizer.json")).decode, []
    for name in index[split]["names"]:
        tokens = np.fromfile(folder / f"{name}.tokens", dtype=index["dtype"])
        ends = np.fromfile(folder / f"{name}.ends", dtype=np.uint64).astype(int)
        found += [decode(document[:-1]) for document in np.split(tokens, ends[:-1])]
    return found


def count(index: dict[str, Any], split: str, what: str) -> int:
    return sum(index[split][what])


@pytest.mark.parametrize(("tokenizer", "every"), [("bytes", 1), ("gpt2", 4)])
def test_each_region_has_times_of_its_own(cluster: Cluster, tokenizer: str, every: int, capsys: Any) -> None:
    """`data`, all of it, is for evaluation only: the regions train on nothing but what they hold alone. every: of so many
    addresses one is used."""
    name = str(package(GPT2)) if tokenizer == "gpt2" else "bytes"
    texts = sorted((package(SOTU) / "data").glob("*.txt"))[::every]
    found = corpora(cluster.directory, texts, name)
    for split in ("train", "heldout"):
        for what in ("documents", "bytes", "tokens"):
            whole, *parts = (count(index, split, what) for index in found.values())
            assert whole == sum(parts) and min(parts) > 0
    assert count(found["all"], "train", "documents") + count(found["all"], "heldout", "documents") == len(texts)
    ratio = count(found["all"], "train", "bytes") / count(found["all"], "train", "tokens")
    assert 5 < ratio < 5.5 if tokenizer == "gpt2" else 0.99 < ratio < 1

    if tokenizer == "gpt2":
        said = documents(cluster.directory / "all", found["all"], "heldout")
        assert set(said) <= {path.read_text() for path in texts}

    shape = f"vocab: {found['all']['vocab']}, dim: 32, layers: 2, heads: 2, kv_heads: 2, ffn: 64, tied: true"
    settings = [*SHORT, f"model.args={{{shape}}}", "outer.sync_every=16", "run.rounds=6", "elastic.start_regions=2"]
    settings += [
        "inner.batch=2",
        "inner.lr=0.01",
        "inner.warmup=0",
        "data=prepared",
        f"data.path={cluster.directory}/all",
    ]
    for region, century in (("eu", "old"), ("us", "new")):
        own = f"region.sources=[{{name: {century}, weight: 1, path: {cluster.directory}/{century}}}]"
        cluster.start(region, own, base=settings)
    cluster.finish()
    for region, sets in (("eu", {HELD_OUT, "eu/old"}), ("us", {HELD_OUT, "us/new"})):
        losses: dict[str, list[float]] = {}
        for record in cluster.records(region, "eval"):
            losses.setdefault(record["set"], []).append(record["bits_per_byte"])
        assert losses.keys() == sets, "its own are evaluated where they are"
        assert all(of_set[-1] < of_set[0] - 0.15 for of_set in losses.values()), losses
    assert main(["tokens", str(cluster.run)]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[:2] == [["eu", "eu/old"], ["us", "us/new"]], rows
