"""A member's place in the leases of several sources."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.ledger import Lease
from diloco.reading import SOURCE, Reader

QUARTER = {"": Fraction(3, 4), "eu/own": Fraction(1, 4)}
LEASES = (Lease(0, 10, 22, 10), Lease(1, 0, 4, 0, source="eu/own"))


def reader() -> Reader:
    made = Reader(QUARTER)
    made.update(LEASES)
    return made


def split(ids: list[int]) -> tuple[list[int], list[int]]:
    """Indices in `data`, and in the region's own source."""
    return [i for i in ids if i < SOURCE], [i - SOURCE for i in ids if i >= SOURCE]


def test_sources_take_turns_and_each_is_read_in_order() -> None:
    mine = reader()
    ids = mine.take(4) + mine.take(8)
    assert split(ids) == ([10, 11, 12, 13, 14, 15, 16, 17, 18], [0, 1, 2])
    assert all(len(split(ids[i : i + 4])[1]) == 1 for i in (0, 4, 8)), "one in four"
    assert mine.claims() == [[0, 19], [1, 3]] and mine.pending == 12 and mine.pending_data == 9
    assert mine.ranges() == {"": [[10, 19]], "eu/own": [[0, 3]]}


def test_it_waits_for_the_source_whose_turn_it_is() -> None:
    mine = Reader(QUARTER)
    mine.update((Lease(0, 0, 100, 0), Lease(1, 0, 1, 0, source="eu/own")))
    count = mine.available()
    assert len(split(mine.take(count))[1]) == 1 and mine.available() == 0
    with pytest.raises(ValueError, match="1 samples asked of leases that hold 0"):
        mine.take(1)
    mine.update((Lease(0, 0, 100, 0), Lease(1, 0, 1, 0, source="eu/own"), Lease(2, 1, 2, 1, source="eu/own")))
    assert mine.available() >= 3


@pytest.mark.parametrize(
    ("ranges", "works"),
    [
        ({"": [[10, 13]], "eu/own": [[0, 1]]}, True),
        ({"": [[10, 13]]}, True),
        ({"": [], "eu/old": []}, True),
        ({"": [[10, 13]], "eu/own": [[1, 2]]}, False),
        ({"": [[11, 13]], "eu/own": [[0, 1]]}, False),
        ({"": [[10, 13]], "eu/old": [[0, 1]]}, False),
    ],
)
def test_after_a_restart_all_that_was_taken_comes_first_or_nothing_is_marked(ranges: dict, works: bool) -> None:
    mine = reader()
    assert mine.resume(ranges) is works
    assert mine.pending == (sum(b - a for there in ranges.values() for a, b in there) if works else 0)


def test_forgotten_work_is_taken_again_but_what_a_contribution_holds() -> None:
    mine = reader()
    mine.take(4)
    claims = mine.claims()
    mine.take(4)
    mine.forget(iter(claims))
    assert mine.claims() == claims and split(mine.take(4)) == ([13, 14, 15], [1])


@given(st.lists(st.integers(1, 9), max_size=20), st.fractions(0, 1, max_denominator=50))
def test_shares_are_kept_whatever_the_batches(batches: list[int], share: Fraction) -> None:
    mine = Reader({"": 1 - share, "eu/own": share})
    mine.update((Lease(0, 0, 200, 0), Lease(1, 0, 200, 0, source="eu/own")))
    ids = [i for batch in batches for i in mine.take(batch)]
    common, own = split(ids)
    assert abs(len(own) - share * len(ids)) <= 1.5
    assert common == list(range(len(common))) and own == list(range(len(own)))
