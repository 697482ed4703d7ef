"""What is evaluated, by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diloco.data import DataConfig, Dataset
from diloco.errors import ConfigError
from diloco.evaluate import build_eval_sets, evaluate
from diloco.mixing import build_samples
from tests.corpora import write_folder
from tests.test_data import counting

SEQ_LEN = 4
PREPARED = {"source": "diloco.corpus.source.prepared", "holdout": 0.0}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Training text of which a tenth is held out, and two prepared folders."""
    (tmp_path / "text.txt").write_text("0123456789" * 80 + "x")
    parts = {"train": [np.arange(41, dtype="u1")], "heldout": [np.arange(100, 121, dtype="u1")]}
    write_folder(tmp_path / "parted", parts, 256, 3)
    write_folder(tmp_path / "whole", {"train": [np.arange(41, dtype="u1")]}, 256, 5)
    return DataConfig(path=str(tmp_path / "text.txt"), holdout=0.1)


def build(data: DataConfig, *sets: Any) -> dict[str, Any]:
    return build_eval_sets(data, sets, build_samples(data, SEQ_LEN, 0), SEQ_LEN)


def test_a_set_is_what_its_folder_holds_out_or_all_of_it(data: DataConfig, tmp_path: Path) -> None:
    sets = [{"name": name, "path": str(tmp_path / name), **PREPARED} for name in ("parted", "whole")]
    sets.append({"name": "text", "path": data.path})
    sets.append({"name": "tenth", "path": data.path, "holdout": 0.1})
    found = build(data, *sets)
    windows = {name: each.heldout_windows for name, each in found.items()}
    assert windows == {"held-out": 20, "parted": 5, "whole": 10, "text": 200, "tenth": 20}
    assert [found[name].heldout(1).tolist() for name in ("parted", "whole")] == [
        [104, 105, 106, 107, 108],
        [4, 5, 6, 7, 8],
    ]
    assert (found["text"].heldout(0) == np.frombuffer(b"01234", dtype="u1")).all()
    assert [each.source.bytes_per_token for each in found.values()] == [1, 3, 5, 1, 1]


@pytest.mark.parametrize("sequences", [1, 6, 19, 20, 33])
@pytest.mark.parametrize("dp", [1, 3, 4])
def test_windows_from_all_of_it_whoever_evaluates(sequences: int, dp: int) -> None:
    """The same for any number of ranks, which all make as many forwards, and each window counts once."""
    samples = Dataset(counting(200 * SEQ_LEN + 1), SEQ_LEN, 0.1, 0)
    n = min(sequences, 20)
    expected = [samples.heldout(i * 20 // n)[:2].tolist() for i in range(n)]
    assert len({first for first, _ in expected}) == n
    counted: list[list[int]] = []
    calls: list[int] = []

    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        calls[-1] += 1
        seen.append([row[:2].tolist() for row in batch])
        nll = batch[:, 1].double().mean()
        return nll, nll

    sums = []
    for rank in range(dp):
        calls.append(0)
        seen: list[list[list[int]]] = []
        region = SimpleNamespace(
            dp=dp, dp_rank=rank, tp=1, device="cpu", all_reduce_sum=lambda x: (sums.append(x), x)[1]
        )
        evaluate(nn.Identity(), loss, samples, region, sequences, 2)  # type: ignore[arg-type]
        left = int(sums[-1][1].item()) // SEQ_LEN
        counted += [row for batch in seen for row in batch][:left]
    assert len(set(calls)) == 1 and counted == expected
    total, tokens = torch.stack(sums).sum(0).tolist()
    assert tokens == n * SEQ_LEN and total / tokens == pytest.approx(sum(row[1] for row in expected) / n)


def test_training_that_holds_nothing_out_has_its_named_sets_alone(data: DataConfig, tmp_path: Path) -> None:
    everything = DataConfig(path=data.path, holdout=0.0)
    assert build(everything) == {}
    assert list(build(everything, {"name": "text", "path": data.path})) == ["text"]


def test_a_set_that_has_no_whole_sequence_is_one_sentence(data: DataConfig, tmp_path: Path) -> None:
    parts = {"train": [np.arange(41, dtype="u1")], "heldout": [np.arange(SEQ_LEN, dtype="u1")]}
    short = {"name": "short", "path": str(write_folder(tmp_path / "short", parts, 256)), **PREPARED}
    with pytest.raises(ConfigError, match=r"^run\.eval_sets\[0\]: inner\.seq_len=4 is too long for what it holds out"):
        build(data, short)


def test_a_set_is_of_the_tokenizer_of_data(data: DataConfig, tmp_path: Path) -> None:
    """Also one that is not prepared, as far as its vocabulary tells."""
    for name, end in (("a", 0), ("b", 0), ("c", 7)):
        write_folder(tmp_path / name, {"train": [np.arange(41, dtype="u1")]}, 300, end=end)
    trained = DataConfig(path=str(tmp_path / "a"), **PREPARED)  # type: ignore[arg-type]
    sets = [{"name": name, "path": str(tmp_path / name)} for name in ("b", "c")]
    assert list(build(trained, sets[0])) == ["b"]
    with pytest.raises(ConfigError, match=r"^run\.eval_sets\[1\] \(c\) is of .* end 7, and data of bytes with end 0"):
        build(trained, *sets)
    text = {"name": "text", "path": data.path, "source": "diloco.data.text_bytes"}
    with pytest.raises(
        ConfigError, match=r"^run\.eval_sets\[0\] \(text\) has a vocabulary of 256, and data one of 300"
    ):
        build(trained, text)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([{"path": "x"}], r"run\.eval_sets\[0\]=.* has no name of its own: write it as"),
        (["books"], r"run\.eval_sets\[0\]=books has no name"),
        ([{"name": "held-out", "path": "x"}], "not as held-out"),
        ([{"name": "a/b", "path": "x"}], "has no name of its own"),
        ([{"name": "text"}, {"name": "text"}], r"run\.eval_sets\[1\]"),
        ([{"name": "books", "pth": "x"}], r"run\.eval_sets\[0\]\.pth is not known"),
        ([{"name": "books", "path": "nowhere"}], r"run\.eval_sets\[0\]: data\.path=nowhere does not exist"),
        ([{"name": "books", "path": "nowhere", **PREPARED}], r"run\.eval_sets\[0\]: data\.path=nowhere holds no index"),
    ],
)
def test_a_wrong_set_is_one_sentence(data: DataConfig, sets: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(data, *sets)
