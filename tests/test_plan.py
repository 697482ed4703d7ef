"""Ownership of blocks: what is owed adds up, nobody waits longer than need be, and it is the same for everyone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.plan import WHOLE, cells, exchange_seconds, ownership

rates = st.lists(st.floats(1.0, 1000.0), min_size=2, max_size=8)


@pytest.mark.parametrize(
    ("given", "percent"),
    [
        ([25], [100]),
        ([25, 1], [50, 50]),  # between two, sharing changes nothing
        ([25, 25, 25, 25], [25, 25, 25, 25]),
        ([25, 25, 6.25], [50, 50, 0]),  # the slow one sends its contribution, and that takes longest anyway
        ([25, 25, 23.5], [33, 33, 33]),  # noise
        ([10, 5, 1, 1], [83, 17, 0, 0]),
        ([0, 0, 0], [33, 33, 33]),
        ([0, 20, 20], [33, 33, 33]),
    ],
)
def test_golden(given: list[float], percent: list[int]) -> None:
    assert [round(100 * share / WHOLE) for share in ownership(given)] == percent


@settings(deadline=None)
@given(rates)
def test_shares_are_whole_and_no_other_ones_are_much_faster(given: list[float]) -> None:
    shares = ownership(given)
    assert sum(shares) == WHOLE and min(shares) >= 0
    time = exchange_seconds(1.0, given, shares)
    members = len(given)
    bound = max(max(1 / rate for rate in given), (2 * members - 2) / sum(given))  # alone, and all together
    assert time >= bound * (1 - 1e-4) or members == 2
    assert time <= bound / 0.7  # what takes noise for equality costs at most this
    assert time <= exchange_seconds(1.0, given, [WHOLE // members] * members) * 1.35
    for k in range(members):
        moved = list(shares)
        part = min(moved[k], WHOLE // 50)
        moved[k] -= part
        moved[(k + 1) % members] += part
        assert exchange_seconds(1.0, given, moved) >= bound * (1 - 1e-3)


@settings(deadline=None)
@given(rates, st.integers(1, 60), st.data())
def test_every_block_has_one_owner(given: list[float], blocks: int, data: st.DataObject) -> None:
    worlds = data.draw(st.lists(st.integers(1, 5), min_size=len(given), max_size=len(given)))
    owned = [cell.owned(k) for cell in cells(blocks, worlds, ownership(given)) for k in range(len(given))]
    assert [block for first, last in owned for block in range(first, last)] == list(range(blocks))
