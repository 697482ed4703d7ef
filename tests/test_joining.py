"""What a region that joins must have in common with the run, and all its ranks with each other."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ckpt.store import Store
from diloco.config import Config
from diloco.data import DataConfig
from diloco.errors import ConfigError
from diloco.evaluate import build_eval_sets
from diloco.fold import fold
from diloco.joining import _become_member, check_ranks, data_of
from diloco.journal import Journal
from diloco.mixing import Samples, build_samples
from diloco.trainer import Trainer
from tests.corpora import write_folder
from tests.test_journal import joining, opening
from tests.test_regional import build, own


class Ranks:
    """A region's rank 0, that hears these from the others."""

    rank = 0

    def __init__(self, *others: Any) -> None:
        self.others, self.turns = others, 0

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return [data, *(json.dumps(other).encode() for other in self.others)]

    def broadcast_bytes(self, data: bytes) -> bytes:
        self.turns += 1
        assert self.turns < 20, "it goes round and round"
        return data


def samples(path: Path, **changes: Any) -> Samples:
    return build_samples(DataConfig(path=str(path), **{"holdout": 0.1, **changes}), 4, 0)


def test_the_fingerprint_tells_what_is_held_out_and_where_documents_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 50)

    def fingerprint(holdout: float, **loss_args: Any) -> dict[str, Any]:
        data, cfg = samples(tmp_path / "a.txt", holdout=holdout), Config()
        cfg.model.loss_args = loss_args
        stub = SimpleNamespace(cfg=cfg, dataset=data, fragments=[], parameters=0, data_parallel=False)
        return Trainer.fingerprint(stub)  # type: ignore[arg-type]

    assert fingerprint(0.1)["windows"] == 112 and fingerprint(0.1) == fingerprint(0.1) != fingerprint(0.2)
    assert fingerprint(0.1, end=1) != fingerprint(0.1, end=2) != fingerprint(0.1)


def test_a_rank_with_other_data_is_named(tmp_path: Path) -> None:
    arrays = [np.full(100, k, dtype="u1") for k in range(3)]
    folders = [write_folder(tmp_path / str(k), {"train": [array]}) for k, array in enumerate(arrays)]
    prepared = {"source": "diloco.corpus.source.prepared", "holdout": 0.0}
    mine, theirs = (data_of(samples(folder, **prepared), [], {}) for folder in folders[:2])
    check_ranks(Ranks(mine, mine), mine)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^data is not the same .*\[24, 0, '{theirs['data'][2]}'\] on rank 2"):
        check_ranks(Ranks(mine, theirs), mine)  # type: ignore[arg-type]
    parts = (build(own(0, "a", 1, holdout=h)) for h in (0.1, 0.2))
    here, there = (data_of(samples(folders[0], **prepared), part, {}) for part in parts)
    with pytest.raises(ConfigError, match=r"^region\.sources\[0\] is not the same"):
        check_ranks(Ranks(there), here)  # type: ignore[arg-type]


def test_a_rank_with_another_evaluation_set_is_named(tmp_path: Path) -> None:
    """Its length, of text too, and the digest of what is prepared: the ranks evaluate it together."""
    write_folder(tmp_path / "a", {"train": [np.arange(101, dtype="u1")]}, 256)
    write_folder(tmp_path / "b", {"train": [np.arange(100, -1, -1, dtype="u1")]}, 256)
    for name, size in (("c", 41), ("d", 45)):
        (tmp_path / name).write_text("x" * size)
    train = DataConfig(path=str(tmp_path / "c"), holdout=0.0)
    data = build_samples(train, 4, 0)

    def facts(name: str, **more: Any) -> dict[str, list[Any]]:
        one = {"name": "books", "path": str(tmp_path / name), **more}
        return data_of(data, [], build_eval_sets(train, [one], data, 4))

    prepared = {"source": "diloco.corpus.source.prepared"}
    for here, there in ((facts("c"), facts("d")), (facts("a", **prepared), facts("b", **prepared))):
        check_ranks(Ranks(here), here)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"^run\.eval_sets \(books\) is not the same"):
            check_ranks(Ranks(there), here)  # type: ignore[arg-type]
    short, long = tmp_path / "short", tmp_path / "long"
    for path, size in ((short, 77), (long, 81)):
        path.write_text("x" * size)  # both train on 18 windows of 4
    here, there = (data_of(samples(path), [], {}) for path in (short, long))
    with pytest.raises(ConfigError, match=r"^data is not the same"):
        check_ranks(Ranks(there), here)  # type: ignore[arg-type]


def test_text_is_not_hashed_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 50)
    text = samples(tmp_path / "a.txt")
    assert data_of(text, [], {"held-out": text}) == {"data": [112, 12, ""]} and "digest" not in vars(text.source)


def test_a_join_that_became_invalid_ends_in_a_sentence(tmp_path: Path) -> None:
    """While this region restored, one of its name joined with other data under the same name."""
    journal = Journal(Store(str(tmp_path)))
    for entry in (opening(), {**joining("eu_1"), "sources": [["a", "1/2", "0" * 16]]}):
        assert journal.append(entry) and journal.read()
    cfg = Config()
    cfg.region.name, cfg.run.dir = "eu", str(tmp_path)
    links = SimpleNamespace(member="eu_2")
    trainer = SimpleNamespace(cfg=cfg, region=Ranks(), state=journal.state, own=build(own(0, "a", 0.5)), links=links)
    trainer.apply = lambda data: setattr(trainer, "state", fold(trainer.state, data))
    with pytest.raises(ConfigError, match=r"region\.sources\[0\] \(a\) is other data than the run in .* has had"):
        _become_member(trainer, journal, ["127.0.0.1:1"], ["127.0.0.1:2"])  # type: ignore[arg-type]
