"""Who is asked for which blocks: every range comes, each counts once, whatever sources do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastic.plan import rank_blocks
from elastic.ranges import PATIENCE, Range, Schedule, Source, split

WORLDS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(st.integers(1, 60), st.data(), WORLDS, st.integers(1, 7))
def test_ranges_cover_what_is_wanted_and_lie_in_one_slice_everywhere(blocks, data, worlds, size) -> None:
    first = data.draw(st.integers(0, blocks - 1))
    last = data.draw(st.integers(first + 1, blocks))
    ranges = list(split(3, blocks, first, last, worlds, size))
    assert [block for one in ranges for block in range(one.first, one.last)] == list(range(first, last))
    for one in ranges:
        assert one.fragment == 3 and one.last - one.first <= size
        for world in worlds:
            slices = [rank_blocks(blocks, rank, world) for rank in range(world)]
            assert any(a <= one.first and one.last <= b for a, b in slices)


def schedule(count: int, members: list[str]) -> Schedule:
    sources = frozenset((member, 0) for member in members)
    return Schedule({Range(i % 2, i, i + 1): sources for i in range(count)})


ACTIONS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["claim", "done", "back", "lose", "up", "wait"])))


@given(st.integers(1, 12), ACTIONS)
def test_nothing_is_lost_or_counted_twice(count: int, actions: list[tuple[str, str]]) -> None:
    s, now, came = schedule(count, ["a", "b", "c"]), 0.0, list[Range]()
    asked: dict[Source, list[Range]] = {(member, 0): [] for member in "abc"}
    wanted = list(s.sources)
    for member, action in actions:
        source = (member, 0)
        if action == "wait":
            now += PATIENCE
        elif action == "up" and member == "a":
            s.give_up(1)
        elif action == "lose":
            s.lose(source)
            asked[source].clear()
        elif source not in s.alive:
            continue
        elif action == "claim":
            one = s.claim(source, now)
            assert one not in asked[source], "nobody is asked for the same twice at a time"
            asked[source] += [one] if one else []
        elif asked[source]:
            one = asked[source].pop(0)
            if action == "done":
                came += [one] if s.done(one) else []
            else:
                s.give_back(source, one)
        assert sorted([*came, *s.missing]) == wanted or sorted(came + s.missing) == sorted(wanted)
    for source in sorted(s.alive):  # whoever is left brings the rest, but for what was given up
        while (one := (asked[source].pop(0) if asked[source] else s.claim(source, now := now + PATIENCE))) is not None:
            came += [one] if s.done(one) else []
    assert s.over and sorted([*came, *s.missing]) == sorted(wanted)
    assert not s.alive or {one.fragment for one in s.missing} <= {1}


def test_a_fast_source_serves_more() -> None:
    s, served = schedule(100, ["fast", "slow"]), {"fast": 0, "slow": 0}
    for tick in range(1000):
        for member, every in (("fast", 1), ("slow", 4)):
            if tick % every == 0 and (one := s.claim((member, 0), 0.0)):
                served[member] += s.done(one)
    assert s.over and served == {"fast": 80, "slow": 20}


def test_a_slow_tail_is_asked_once_more_of_who_is_free() -> None:
    s = schedule(2, ["a", "b", "c"])
    slow, other = s.claim(("a", 0), 0.0), s.claim(("b", 0), 0.0)
    assert slow and other and s.done(other)
    assert s.claim(("b", 0), PATIENCE / 2) is None, "it may come still"
    assert s.claim(("a", 0), PATIENCE) is None, "the same again would not help"
    assert s.claim(("b", 0), PATIENCE) == slow and s.claim(("c", 0), 9.0) is None, "two are enough"
    assert not s.over and s.done(slow) and not s.done(slow) and s.over
