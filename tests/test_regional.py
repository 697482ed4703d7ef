"""Sources that one region holds alone: what ids mean, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diloco.composing import compose_config
from diloco.config import validate
from diloco.data import DataConfig
from diloco.errors import ConfigError
from diloco.evaluate import build_eval_sets
from diloco.mixing import build_samples
from diloco.reading import SOURCE
from diloco.regional import Regional, RegionConfig, build_own, shares_of
from tests.corpora import write_folder
from tests.test_mixture import of_source

SEQ_LEN = 4
DATA = DataConfig(source="tests.test_mixture.of_source", args={"k": 0, "n": 401}, holdout=0.0)
"""Token i is i; in the region's own sources, whose vocabulary is the same, a million more."""


def own(k: int, name: str, weight: Any, **more: Any) -> dict[str, Any]:
    args = {"k": 1, "n": 201, "of": k}
    return {"name": name, "weight": weight, "source": "tests.test_regional.of_region", "args": args, **more}


def of_region(cfg: DataConfig) -> Any:
    made = of_source(cfg)
    return replace(made, vocab=2, tokens=made.tokens * (int(cfg.args["of"]) + 1))


def build(*sources: Any, seed: int = 0, seq_len: int = SEQ_LEN, name: str = "eu") -> Any:
    return build_own(RegionConfig(name, list(sources)), DATA, build_samples(DATA, seq_len, 0).source, seq_len, seed)


def test_ids_name_samples_of_data_and_of_each_source() -> None:
    data, parts = build_samples(DATA, SEQ_LEN, 0), build(own(0, "a", 0.25), own(1, "b", "1/2"))
    assert shares_of(parts, "eu") == {"": Fraction(1, 4), "eu/a": Fraction(1, 4), "eu/b": Fraction(1, 2)}
    found = Regional(data, parts).batch([7, SOURCE + 3, 2 * SOURCE + 3, 7 + data.train_windows])
    expected = [data.sample(7), parts[0].samples.sample(3), parts[1].samples.sample(3), data.sample(7 + 100)]
    assert found.tolist() == [sample.tolist() for sample in expected]
    assert found[0, 0] < 401 and 10**6 <= found[1, 0] < 10**6 + 201 and found[2, 0] >= 2 * 10**6
    assert Regional(data, []).batch([3, 5]).tolist() == data.batch([3, 5]).tolist()


def test_the_digest_is_of_all_that_an_index_means() -> None:
    digests = [
        build(own(0, "a", 1))[0].digest,
        build(own(1, "a", 1))[0].digest,
        build(own(0, "a", 1), seed=1)[0].digest,
        build(own(0, "b", 1))[0].digest,
        build(own(0, "a", 1), name="us")[0].digest,
        build(own(0, "a", 1), seq_len=8)[0].digest,
        build(own(0, "a", 1, holdout=0.1))[0].digest,
        build(own(0, "a", 1, shuffle=40))[0].digest,
    ]
    assert len(set(digests)) == len(digests) and build(own(0, "a", 0.5))[0].digest == digests[0]


def test_what_is_streamed_has_room_in_the_cache(tmp_path: Path) -> None:
    """Of a part's own cache_bytes, of own sources and of evaluation sets."""
    url = f"file://{write_folder(tmp_path / 'out', {'train': [np.arange(41, dtype='u1')]}, 2)}"
    small = {"source": "diloco.corpus.source.prepared", "path": url, "cache": str(tmp_path), "cache_bytes": 5}
    words = r"\[0\]: data\.cache_bytes=5 does not hold .* set it to \d+ or more"
    with pytest.raises(ConfigError, match=rf"^region\.sources{words}"):
        build({"name": "a", "weight": 1, **small})
    with pytest.raises(ConfigError, match=rf"^data\.sources{words}"):
        build_samples(DataConfig(holdout=0.0, sources=[{"weight": 1, **small}]), SEQ_LEN, 0)
    with pytest.raises(ConfigError, match=rf"^run\.eval_sets{words}"):
        build_eval_sets(DATA, [{"name": "a", **small}], build_samples(DATA, SEQ_LEN, 0), SEQ_LEN)


def test_all_is_of_one_tokenizer(tmp_path: Path) -> None:
    """Own sources and data, and the parts of data; of the same vocabulary, and with what is not prepared among them."""
    shards = {"train": [np.arange(41, dtype="u1")]}
    folders = [write_folder(tmp_path / name, shards, 256, end=end) for name, end in (("a", 0), ("b", 0), ("c", None))]
    parts = [
        {"name": folder.name, "weight": 0.5, "source": "diloco.corpus.source.prepared", "path": str(folder)}
        for folder in folders
    ]
    text = {"weight": 1, "source": "tests.test_mixture.of_source", "args": {"k": 254, "n": 401}}
    alike = DataConfig(holdout=0.0, sources=[text, *parts[:2]])
    data = build_samples(alike, SEQ_LEN, 0).source
    words = r"is of the tokenizer bytes with end None, and data.* of bytes with end 0: prepare all with one"
    with pytest.raises(ConfigError, match=rf"^data\.sources\[2\] {words}"):
        build_samples(replace(alike, sources=[text, parts[0], parts[2]]), SEQ_LEN, 0)
    with pytest.raises(ConfigError, match=rf"^region\.sources\[1\] \(c\) {words}"):
        build_own(RegionConfig("eu", [parts[1], parts[2]]), alike, data, SEQ_LEN, 0)
    assert len(build_own(RegionConfig("eu", parts[:2]), alike, data, SEQ_LEN, 0)) == 2


def test_packing_ends_documents_where_the_data_does(tmp_path: Path) -> None:
    tokens = {"train": [np.arange(201, dtype="u1")]}
    folders = {end: write_folder(tmp_path / str(end), tokens, 256, end=end) for end in (9, None)}

    def check(path: Path, *more: str) -> None:
        validate(
            compose_config(
                ["region.name=eu", "model=tiny", "inner.seq_len=8", "data=prepared", f"data.path={path}", *more]
            ),
            1,
        )

    for path, end in ((folders[9], "9"), (folders[9], "null"), (folders[None], "null")):
        check(path, f"+model.loss_args.end={end}")
    check(folders[9])
    for end, path in folders.items():
        with pytest.raises(
            ConfigError, match=rf"^model\.loss_args\.end=8, but the documents of data end with {end}: set"
        ):
            check(path, "+model.loss_args.end=8")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["text"], r"region\.sources\[0\]=text has no name"),
        ([own(0, "a/b", 1)], r"region\.sources\[0\]=.* has no name"),
        ([own(0, "a", "much")], r"region\.sources\[0\]\.weight=much is not a share"),
        ([own(0, "a", True)], r"weight=True is not a share"),
        ([{"name": "a", "path": "x"}], r"region\.sources\[0\]\.weight=None is not a share"),
        ([own(0, "a", 1, pth="x")], r"region\.sources\[0\]\.pth is not known"),
        ([own(0, "a", 0.6), own(1, "b", 0.6)], r"the weights sum to 1\.2"),
        (
            [own(0, "a", 1, source="tests.test_mixture.of_source", args={"k": 5, "n": 99})],
            r"\(a\) has a vocabulary of 7",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(sources: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(*sources)
