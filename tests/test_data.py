"""Data: files to tokens, windows, the held-out split and the permutation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.data import DataConfig, Dataset, FileTokens, build_source, text_bytes
from diloco.errors import ConfigError
from diloco.shuffle import permute

GOLDEN_10 = [0, 2, 4, 9, 1, 3, 6, 7, 5, 8]
GOLDEN_1M = [416303, 920774, 439952, 812996]


@dataclass(frozen=True)
class Counting:
    """Token i is i: a window shows where it came from."""

    tokens: np.ndarray
    vocab: int = 1 << 30
    bytes_per_token: float = 1.0
    digest: str = ""


def counting(n: int) -> Counting:
    return Counting(np.arange(n))


@given(st.integers(1, 3000), st.integers(-5, 1 << 65))
def test_permute_is_a_bijection(n: int, seed: int) -> None:
    assert sorted(permute(i, n, seed) for i in range(n)) == list(range(n))


@given(st.integers(2, 1 << 70), st.integers(0, 1 << 64), st.data())
def test_permute_stays_in_range_and_keeps_numbers_apart(n: int, seed: int, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, n - 1))
    j = data.draw(st.integers(0, n - 1).filter(lambda j: j != i))
    a, b = permute(i, n, seed), permute(j, n, seed)
    assert 0 <= a < n and 0 <= b < n and a != b


def test_permute_is_the_same_for_ever() -> None:
    """A run that was begun with one version must go on with the next: these values may never change."""
    assert [permute(i, 10, 1) for i in range(10)] == GOLDEN_10
    assert [permute(i, 1_000_003, 7) for i in (0, 1, 2, 1_000_002)] == GOLDEN_1M


def test_permute_looks_random() -> None:
    n = 4096
    order = np.array([permute(i, n, 3) for i in range(n)])
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.005  # 2/n is expected
    assert np.mean(order == [permute(i, n, 4) for i in range(n)]) < 0.005


@pytest.mark.parametrize("i", [-1, 5])
def test_permute_refuses_what_is_outside(i: int) -> None:
    with pytest.raises(ValueError, match="range"):
        permute(i, 5, 0)


@given(st.integers(1, 40), st.integers(2, 60), st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5]), st.integers(0, 99))
def test_an_epoch_and_the_held_out_windows_are_every_window_once(
    seq_len: int, windows: int, holdout: float, seed: int
) -> None:
    windows += round(1 / holdout) if holdout else 0
    data = Dataset(counting(seq_len * windows + 1 + seed % seq_len), seq_len, holdout, seed)
    assert data.train_windows + data.heldout_windows == windows
    epoch = [data.sample(i) for i in range(data.train_windows)]
    held_out = [data.heldout(i) for i in range(data.heldout_windows)]
    starts = {int(window[0]) // seq_len for window in epoch}
    kept = {int(window[0]) // seq_len for window in held_out}
    assert starts | kept == set(range(windows)) and not starts & kept
    for window in epoch + held_out:
        assert window.dtype == np.int64 and (window == window[0] + np.arange(seq_len + 1)).all()
    if holdout:
        k = round(1 / holdout)
        assert kept == {w for w in range(windows) if w % k == k - 1}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        data = Dataset(counting(401), 4, 0.1, seed)
        return [int(data.sample(epoch * data.train_windows + i)[0]) for i in range(data.train_windows)]

    orders = [order(0, 0), order(0, 1), order(0, 1_000_000), order(1, 0)]
    assert len({tuple(o) for o in orders}) == 4 and len({tuple(sorted(o)) for o in orders}) == 1
    assert order(0, 1) == order(0, 1)


def test_batch_is_its_samples() -> None:
    data = Dataset(counting(401), 4, 0.1, 0)
    batch = data.batch([7, 0, 1_000])
    assert batch.shape == (3, 5) and str(batch.dtype) == "torch.int32"
    assert (batch[2].numpy() == data.sample(1_000)).all()
    shuffled = Dataset(counting(4001), 4, 0.1, 0, shuffle=200)
    assert shuffled.order.group == 50 and shuffled.shuffle == [50] and data.shuffle == [0]
    indices = [3, 10**12, *range(800, 1000)]
    assert (shuffled.batch(indices).numpy() == np.stack([shuffled.sample(i) for i in indices])).all()
    assert len(set(shuffled.batch(range(900))[:, 0].tolist())) == shuffled.train_windows == 900
    with pytest.raises(IndexError):
        data.heldout(data.heldout_windows)
    with pytest.raises(IndexError):
        data.heldout(3, 3)


@pytest.mark.parametrize(
    ("tokens", "seq_len", "holdout", "words"),
    [
        (256, 256, 0.0, ["inner.seq_len=256", "256 tokens"]),
        (2561, 256, 0.02, ["inner.seq_len=256", "10 windows", "data.holdout=0.02", "50"]),
        (1000, 10, 0.6, ["data.holdout=0.6"]),
        (1000, 10, -0.1, ["data.holdout=-0.1"]),
    ],
)
def test_data_that_does_not_suffice_is_one_sentence(
    tokens: int, seq_len: int, holdout: float, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        Dataset(counting(tokens), seq_len, holdout, 0)
    assert all(word in str(error.value) for word in words), error.value
    assert Dataset(counting(257), 256, 0.0, 0).train_windows == 1


@pytest.mark.parametrize(
    ("tokens", "left"), [(41, ""), (42, ", 1 token at the end in none"), (50, ", 9 tokens at the end in none")]
)
def test_tokens_that_no_sequence_has_are_told(tokens: int, left: str) -> None:
    data = Dataset(counting(tokens), 10, 0.25, 0)
    assert data.describe() == "3 training sequences, 1 held out" + left
    read = {t for i in range(3) for t in data.sample(i).tolist()} | set(data.heldout(0).tolist())
    assert len(read) == 41


def test_text_bytes_joins_sorted_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in {"b/x.txt": "dead", "a.txt": "beef", "b.txt": "", "z.md": "!", ".hidden": "no"}.items():
        (tmp_path / name).write_text(text)
    source = text_bytes(DataConfig(path=str(tmp_path)))
    assert source.tokens[0 : len(source.tokens)].tobytes() == b"beefdead!"
    assert source.tokens[2:6].tobytes() == b"efde" and source.tokens[8:99].tobytes() == b"!"
    assert len(source.tokens[5:5]) == 0
    assert source.digest == hashlib.sha256(b"beefdead!").hexdigest() and source.vocab == 256
    only = text_bytes(DataConfig(path=[str(tmp_path / "z.md"), str(tmp_path / "b")], pattern="**/*.txt"))
    assert only.tokens[0:99].tobytes() == b"!dead"


@pytest.mark.parametrize("left", [0, 6, 7])
def test_a_file_that_was_cut_off_is_an_oserror(tmp_path: Path, left: int) -> None:
    """At a token, inside of one, or to nothing."""
    path = tmp_path / "train-00000.tokens"
    path.write_bytes(bytes(left))
    with pytest.raises(OSError, match=r"train-00000\.tokens .*: copy it again"):
        FileTokens([path], [5], "<u2")[0:5]


def test_a_missing_or_empty_path_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=r"data\.path=.*nowhere does not exist"):
        text_bytes(DataConfig(path=[str(tmp_path / "nowhere")]))
    for path in (str(tmp_path), [], [str(tmp_path / "empty.txt")]):
        with pytest.raises(ConfigError, match=r"data\.path=.* holds no text"):
            text_bytes(DataConfig(path=path))


def test_the_standard_library_is_the_default() -> None:
    source = build_source(DataConfig())
    again = build_source(DataConfig())
    assert len(source.tokens) > 4_000_000 and source.digest == again.digest
    window = Dataset(source, 256, 0.02, 0).sample(12)
    assert window.shape == (257,) and window.min() >= 0 and window.max() < 256


@pytest.mark.parametrize("name", ["diloco.data.nothing", "no.such.module", "bare"])
def test_a_source_that_cannot_be_loaded_names_the_key(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.source={name} cannot be loaded"):
        build_source(DataConfig(source=name))
