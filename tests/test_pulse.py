"""When a main loop counts as hung: by a clock of the test's own."""

from __future__ import annotations

import pytest

from elastic.pulse import ENTRIES, PATIENCE, SNAPSHOT, STEP, TIMES, Pulse


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def pulse(*done: tuple[str, float]) -> tuple[Pulse, Clock]:
    """Of a loop that has done this, each for so many seconds."""
    clock = Clock()
    made = Pulse(5.0, clock)
    for doing, seconds in done:
        made.back()
        made.out(doing)
        clock.now += seconds
    made.back()
    return made, clock


def late_after(made: Pulse, clock: Clock, doing: str) -> float:
    """Seconds until the loop counts as hung, in steps of a tenth."""
    made.out(doing)
    begin = clock.now
    while not made.late():
        clock.now += 0.1
    return clock.now - begin


def test_a_hang_is_noticed_after_the_timeout_or_several_usual_times() -> None:
    assert late_after(*pulse((STEP, 0.1)), STEP) == pytest.approx(5.1, abs=0.11)
    assert late_after(*pulse((STEP, 3.0), (STEP, 1.0)), STEP) == pytest.approx(TIMES * 2.7, abs=0.2)
    assert late_after(*pulse((STEP, 40.0), *[(STEP, 1.0)] * 60), STEP) == pytest.approx(5.1, abs=0.2), "compiling"
    assert late_after(*pulse((STEP, 1.0)), "") == pytest.approx(5.1, abs=0.11), "it looks twice a second"


def test_what_was_never_done_or_may_save_has_more_time() -> None:
    for doing in (STEP, SNAPSHOT, ENTRIES):
        assert late_after(*pulse(), doing) == pytest.approx(PATIENCE, abs=0.2)
    assert late_after(*pulse((ENTRIES, 0.1), (ENTRIES, 0.1)), ENTRIES) == pytest.approx(PATIENCE, abs=0.2)
    assert late_after(*pulse((ENTRIES, 100.0)), ENTRIES) == pytest.approx(400, abs=0.2)


def test_a_hang_does_not_hide_the_next_one() -> None:
    assert late_after(*pulse((STEP, 1.0), (STEP, 10_000.0)), STEP) == pytest.approx(TIMES * 5.0, abs=0.2)
