"""Mixtures: exact in the index, true to the weights, every sample of every source once."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diloco.composing import compose_config
from diloco.data import DataConfig
from diloco.errors import ConfigError
from diloco.mixing import build_samples
from diloco.mixture import Mixture, Schedule, most
from tests.corpora import write_folder
from tests.test_data import Counting

GOLDEN = [0, 1, 0, 2, 0, 3, 0, 2, 0, 4, 0, 0, 2, 0, 3, 0, 2, 0, 1, 0]
INTELLECT1 = [Fraction(w) for w in (55, 10, 20, 10, 5)]
WEIGHTS = st.lists(st.fractions(0, 1000, max_denominator=10**6), min_size=1, max_size=9).filter(any)


def of_source(cfg: DataConfig) -> Counting:
    """Tokens that say which source they are of."""
    first = 1_000_000 * int(cfg.args["k"])
    return Counting(first + np.arange(int(cfg.args["n"])), vocab=int(cfg.args["k"]) + 2, digest=str(cfg.args))


@given(WEIGHTS, st.integers(0, 400))
@example(INTELLECT1, 400)
@example([Fraction(1, 10**6), Fraction(1), Fraction(10**6)], 400)
def test_every_prefix_hits_the_weights_and_numbers_each_source_without_a_gap(weights: list[Fraction], n: int) -> None:
    mixture, seen = Mixture(weights), [0] * len(weights)
    for i in range(n):
        source, j = mixture.locate(i)
        assert j == seen[source]
        seen[source] += 1
        for count, share in zip(seen, mixture.shares, strict=True):
            assert abs(count - (i + 1) * share) <= 1.5 and (count - (i + 1) * share) ** 2 <= i + 1
    assert mixture.counts(n) == seen


@given(WEIGHTS, st.integers(0, 10**30))
def test_far_out_the_counts_and_the_places_agree(weights: list[Fraction], n: int) -> None:
    mixture = Mixture(weights)
    before, after = mixture.counts(n), mixture.counts(n + 1)
    source, j = mixture.locate(n)
    assert j == before[source] and after == [c + (s == source) for s, c in enumerate(before)] and sum(before) == n
    assert all(abs(c - n * share) <= 1.5 for c, share in zip(before, mixture.shares, strict=True))


@given(WEIGHTS, st.integers(0, 10**12), st.integers(0, 10**6))
def test_no_stretch_of_samples_has_more_of_a_source_than_leases_are_granted_for(
    weights: list[Fraction], start: int, length: int
) -> None:
    mixture = Mixture(weights)
    before, after = mixture.counts(start), mixture.counts(start + length)
    for share, a, b in zip(mixture.shares, before, after, strict=True):
        assert b - a <= most(length, share) <= min(length, length * share + 3)
    assert most(length, Fraction(1)) == length and most(length, Fraction(0)) == 0


def test_a_mixture_is_the_same_for_ever() -> None:
    """A run that was begun with one version must go on with the next: these values may never change."""
    mixture = Mixture(INTELLECT1)
    assert [mixture.locate(i)[0] for i in range(20)] == GOLDEN
    assert mixture.counts(20) == [11, 2, 4, 2, 1]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)), max_size=4)
)
def test_phases_go_on_with_each_source_where_it_was(later: list[tuple[int, list[int]]]) -> None:
    starts = list(accumulate(length for length, _ in later))
    phases = [(start, [Fraction(w) for w in weights]) for start, (_, weights) in zip(starts, later, strict=True)]
    schedule, seen = Schedule([(0, [Fraction(1)] * 3), *phases]), [0] * 3
    for i in range(starts[-1] + 50 if starts else 50):
        source, j = schedule.locate(i)
        assert j == seen[source] and schedule.counts(i) == seen
        seen[source] += 1
        weights = next((w for start, w in reversed(phases) if start <= i), [Fraction(1)] * 3)
        assert weights[source] > 0


def config(*sizes: int, **changes: object) -> DataConfig:
    weights = changes.pop("weights", [1] * len(sizes))
    assert isinstance(weights, list)
    parts = [
        {"weight": w, "source": "tests.test_mixture.of_source", "args": {"k": k, "n": n}}
        for k, (n, w) in enumerate(zip(sizes, weights, strict=True))
    ]
    return DataConfig(sources=parts, **changes)  # type: ignore[arg-type]


def test_mixed_samples_are_each_source_once_an_epoch_by_weight() -> None:
    samples = build_samples(config(4 * 100 + 1, 4 * 300 + 1, weights=[0.25, 0.75], holdout=0.1), 4, 0)
    assert samples.train_windows == 90 + 270 and samples.source.vocab == 3
    starts = [int(window[0]) for window in samples.batch(range(360)).numpy()]
    assert len(set(starts)) == 360 and sum(start < 1_000_000 for start in starts) == 90
    held = [int(samples.heldout(i)[0]) for i in range(samples.heldout_windows)]
    assert len(set(held)) == len(held) >= 39 and not set(held) & set(starts)
    assert abs(sum(start < 1_000_000 for start in held) - len(held) / 4) <= 1


def test_held_out_windows_are_spread_over_each_source_by_weight() -> None:
    """However many: each source has its share, of windows from all of what it holds out."""
    samples = build_samples(config(4 * 400 + 1, 4 * 400 + 1, 4 * 400 + 1, weights=[1, 1, 2], holdout=0.25), 4, 0)
    for n in (1, 8, 50, samples.heldout_windows):
        starts = sorted(int(samples.heldout(i, n)[0]) for i in range(n))
        assert len(set(starts)) == n
        for k, share in enumerate((0.25, 0.25, 0.5)):
            places = [start - k * 1_000_000 for start in starts if start // 1_000_000 == k]
            assert abs(len(places) - n * share) <= 1.5
            gaps = [b - a for a, b in pairwise([0, *places, 1600])]
            assert n < 8 or max(gaps) <= 1600 / len(places) + 16
    with pytest.raises(IndexError):
        samples.heldout(0, samples.heldout_windows + 1)


def test_bytes_per_token_of_evaluations_are_of_what_is_held_out(tmp_path: Path) -> None:
    """Weights 1/4, 1/4, 1/2; the last holds nothing out."""
    tokens = np.arange(41, dtype="u1")
    parts = []
    for k, (size, weight, splits) in enumerate([(2, 1, 2), (6, 1, 2), (30, 2, 1)]):
        shards = {name: [tokens] for name in ("train", "heldout")[:splits]}
        folder = write_folder(tmp_path / str(k), shards, 256, size)
        parts.append({"weight": weight, "source": "diloco.corpus.source.prepared", "path": str(folder)})
    samples = build_samples(DataConfig(holdout=0.0, sources=parts), 4, 0)
    assert samples.source.bytes_per_token == 17 and samples.heldout_bytes_per_token == 4
    alone = build_samples(DataConfig(holdout=0.0, sources=parts[:1]), 4, 0)
    assert alone.heldout_bytes_per_token == alone.source.bytes_per_token == 2
    without = build_samples(DataConfig(holdout=0.0, sources=parts[2:]), 4, 0)
    assert without.heldout_windows == 0 and without.heldout_bytes_per_token == 30


def test_the_digest_tells_weights_phases_and_data_apart() -> None:
    def digest(*sizes: int, **changes: object) -> str:
        return build_samples(config(*sizes, **changes), 4, 0).source.digest

    phase = {"phases": [{"tokens": 1000, "weights": [1, 3]}]}
    all_of_them = [
        digest(401, 401, holdout=0.0),
        digest(401, 402, holdout=0.0),
        digest(401, 401, holdout=0.1),
        digest(401, 401, holdout=0.0, weights=[1, 2]),
        digest(401, 401, holdout=0.0, **phase),
    ]
    assert len(set(all_of_them)) == 5 and all_of_them[3] == digest(401, 401, holdout=0.0, weights=[0.5, 1.0])


def test_a_phase_begins_at_its_token() -> None:
    samples = build_samples(config(401, 401, holdout=0.0, phases=[{"tokens": 41, "weights": [0, 1]}]), 4, 0)
    sources = [int(start) // 1_000_000 for start in samples.batch(range(30))[:, 0]]
    assert set(sources[:11]) == {0, 1} and set(sources[11:]) == {1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": [{"path": "x"}]}, r"data\.sources\[0\].*no weight"),
        ({"sources": [{"path": "nowhere", "weight": 1}]}, r"data\.sources\[0\]: data\.path=nowhere does not exist"),
        ({"sources": [{"weight": 1, "pth": "x"}]}, r"data\.sources\[0\]\.pth is not known"),
        ({"sources": [{"weight": 1, "holdout": "abc"}]}, r"data\.sources\[0\]\.holdout='abc' is not of the type float"),
        ({"sources": [{"weight": 1, "shuffle": 1e8}]}, r"\[0\]\.shuffle=100000000\.0 is not of the type int"),
        ({"sources": [{"weight": 1, "patience": None}]}, r"\[0\]\.patience=None is not of the type float"),
        ({"sources": [{"weight": -1}]}, r"weights \[-1\]"),
        ({"sources": [{"weight": "much"}]}, r"weights \['much'\]"),
        ({"sources": [{"weight": 1}], "phases": [{"tokens": 0, "weights": [1]}]}, r"data\.phases\[0\]\.tokens=0"),
        ({"sources": [{"weight": 1}], "phases": [{"tokens": 9, "weights": [1, 2]}]}, r"data\.phases\[0\]\.weights"),
        ({"sources": [{"weight": 1}], "phases": [{"at": 9}]}, r"data\.phases\[0\]"),
        ({"phases": [{"tokens": 9, "weights": [1]}]}, r"no data\.sources"),
    ],
)
def test_a_wrong_mixture_is_one_sentence(changes: dict[str, list[object]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_samples(DataConfig(**changes), 8, 0)


def test_intellect1_and_every_other_option_compose() -> None:
    own = {"text": ["data.path=x"], "prepared": ["data.path=x"], "mixture": ["data.sources=[{path: x, weight: 1}]"]}
    own["intellect1"] = ["data.args.root=s3://bucket"]
    options = sorted(path.stem for path in (Path(__file__).parent.parent / "configs" / "data").glob("*.yaml"))
    configs = {name: compose_config(["region.name=eu", f"data={name}", *own.get(name, ())]).data for name in options}
    assert [part["path"] for part in configs["intellect1"].sources][:2] == [
        "s3://bucket/fineweb-edu",
        "s3://bucket/fineweb",
    ]
    assert {name: config.holdout for name, config in configs.items() if config.holdout} == {
        "stdlib": 0.02,
        "text": 0.02,
    }
    for name, missing in {"text": "path", "prepared": "path", "mixture": "sources", "intellect1": "args.root"}.items():
        with pytest.raises(ConfigError, match=rf"data\.{missing} is not set"):
            compose_config(["region.name=eu", f"data={name}"])
    assert all(config.cache_bytes == DataConfig().cache_bytes for config in configs.values())
