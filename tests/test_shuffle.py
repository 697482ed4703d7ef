"""The order of samples: a permutation, of which a reader needs a part at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.shuffle import Order, permute

GOLDEN = [17, 2, 1, 0, 16, 6, 7, 8, 15, 5, 9, 4, 14, 10, 13, 3, 12, 11, 20, 18, 19]


@given(st.integers(1, 800), st.integers(1, 50), st.integers(0, 20), st.integers(0, 1 << 64))
def test_an_order_is_a_bijection(windows: int, block: int, blocks: int, seed: int) -> None:
    order = Order(windows, block, block * blocks)
    assert sorted(order.window(i, seed) for i in range(windows)) == list(range(windows))


@given(st.integers(1, 1 << 61), st.integers(1, 50), st.integers(0, 20), st.integers(0, 1 << 64), st.data())
def test_many_at_once_are_the_same(windows: int, block: int, blocks: int, seed: int, data: st.DataObject) -> None:
    order = Order(windows, block, block * blocks)
    i = data.draw(st.lists(st.integers(0, windows - 1), max_size=20))
    assert order.windows_of(np.array(i, dtype=np.int64), seed).tolist() == [order.window(k, seed) for k in i]
    with pytest.raises(ValueError, match="range"):
        order.windows_of(np.array([*i, windows]), seed)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 800), st.integers(0, 99))
def test_a_group_is_whole_blocks_from_anywhere(block: int, blocks: int, more: int, seed: int) -> None:
    group = block * blocks
    order = Order(group + more, block, group)
    for start in range(0, order.windows, group):
        windows = [order.window(i, seed) for i in range(start, min(start + group, order.windows))]
        assert len({w // block for w in windows}) <= blocks


def test_small_data_has_one_permutation_of_all() -> None:
    order = Order(100, 10, 100)
    assert [order.window(i, 7) for i in range(100)] == [permute(i, 100, 7) for i in range(100)]
    assert [Order(100).window(i, 7) for i in range(100)] == [permute(i, 100, 7) for i in range(100)]


def test_the_order_is_the_same_for_ever() -> None:
    """A run that was begun with one version must go on with the next: these values may never change."""
    assert [Order(21, 3, 9).window(i, 5) for i in range(21)] == GOLDEN


def test_blocks_and_windows_look_random() -> None:
    order = Order(1 << 16, 64, 1 << 12)
    windows = np.array([order.window(i, 3) for i in range(order.windows)])
    blocks = windows // 64
    first = blocks[: order.group]
    assert abs(np.corrcoef(np.arange(order.windows), windows)[0, 1]) < 0.2
    assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 0.2
    assert len(np.unique(first)) == 64 and np.ptp(first) > 900, "a group is from all over the data"
    assert np.mean(blocks[:-1] == blocks[1:]) < 0.03, "neighbours are not read one after the other"


@pytest.mark.parametrize("i", [-1, 21])
def test_an_order_refuses_what_is_outside(i: int) -> None:
    with pytest.raises(ValueError, match="range"):
        Order(21, 3, 9).window(i, 0)
