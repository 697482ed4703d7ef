"""When a peer in an exchange is late: by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.links import EARLY, Link
from elastic.side import LATE, PATIENCE, STUCK, Side

STALL, CHUNK = 30.0, 100_000


def side(**more: Any) -> Side:
    """Of an attempt that began at 100 s, on a link that has carried 1 MB/s."""
    made = Side(0, CHUNK, STALL, begun=100.0, expected=1000, allowed=1000, progress_at=100.0, **more)
    made.link = link()
    return made


def link() -> Link:
    made = Link(("us_1", 0), "x", lambda *_: None, lambda *_: None)
    made.rate, made.heard = 1e6, 0.0
    return made


def test_patience_is_of_the_measured_rate() -> None:
    one = side()
    assert one.patience() == pytest.approx(PATIENCE + LATE * 0.1)
    assert not one.late(103.0, one.patience()) and one.late(104.0, one.patience())
    assert one.link is not None
    one.link.heard = 102.0
    assert not one.late(105.0, one.patience())
    one.link.rate = 100.0
    assert one.patience() == STALL, "never more than the stall time"


def test_who_has_not_begun_or_is_not_known_gets_the_stall_time() -> None:
    one = side()
    one.progress_at = 0.0
    assert one.patience() == STALL
    one.progress_at, one.link = 101.0, None
    assert one.patience() == STALL
    assert not one.late(100 + 2 * STALL, STALL) and one.late(101 + 2 * STALL, STALL), "a link takes time, too"


def test_who_may_not_send_is_not_late_and_has_time_from_when_it_may() -> None:
    one = side()
    one.came = one.allowed
    assert not one.may_send
    one.allowed, one.allowed_at = 1001, 200.0
    assert one.may_send and not one.late(203.0, one.patience()) and one.late(204.0, one.patience())


def test_a_link_that_is_alive_with_later_attempts_hides_a_stuck_one_for_so_long_only() -> None:
    one = side()
    assert one.link is not None
    now = 101 + STUCK * STALL
    one.link.heard = now
    assert not one.late(now, one.patience()), "it may queue behind older ones"
    one.link.newest = 105.0
    assert one.late(now, one.patience()) and not one.late(now - 2, one.patience())


def test_who_does_not_take_what_is_sent_is_blocked() -> None:
    one = side()
    assert not one.blocked(1000.0), "nothing to take"
    one.unsent, one.moved_at = 3, 120.0
    assert not one.blocked(120 + STALL) and one.blocked(121 + STALL)


def test_early_parts_of_all_attempts_on_a_link_share_what_the_peer_keeps() -> None:
    shared, sides = link(), [side(parts=[(0, 1)] * 1000) for _ in range(3)]
    for one in sides:
        one.open(shared)
    assert [one.granted for one in sides] == [EARLY // CHUNK, 0, 0]
    sides[0].pay_back()
    late = side(parts=[(0, 1)] * 7)
    late.open(shared)
    assert late.granted == 7
    late.close()
    assert shared._lent == 0 and late.link is None
