"""The exchange over real sockets: members of unequal shape, each rank with a node and an exchanger of its own."""

from __future__ import annotations

import socket

import pytest
import torch

from diloco.fragments import block_digests
from elastic import attempt, links, side, tcp
from elastic.exchange import PACE
from elastic.order import Outcome
from elastic.plan import CHUNK, WHOLE, cells, chunks, ownership, rank_blocks
from elastic.ranks import Ranks, follow
from tests.exchange_cluster import BLOCK, KEY, Make, until
from tests.exchange_cluster import cluster as cluster


@pytest.mark.parametrize("codec", ["int8", "none"])
@pytest.mark.parametrize(
    ("worlds", "elements"),
    [
        ((1,), 5 * BLOCK),
        ((3,), 5 * BLOCK + 1),
        ((1, 1), 37 * BLOCK + 17),
        ((4, 1), 50 * BLOCK + 300),
        ((2, 3, 1), 61 * BLOCK + 5),
        ((4, 4), 16 * BLOCK),
        ((2, 3, 1), 1),
        ((4, 1), 2 * BLOCK + 1),
        ((3, 5), 2 * BLOCK),
        ((1, 2, 1, 3), 4 * BLOCK + 9),
    ],
)
def test_equal_to_the_reference_bit_for_bit(cluster: Make, worlds: tuple[int, ...], elements: int, codec: str) -> None:
    c = cluster(worlds, elements, codec)
    everyone = range(len(worlds))
    c.start("a", everyone)
    c.assert_result("a", everyone)
    assert c.idle()


def test_bytes_on_the_wire_are_twice_the_share_of_the_others(cluster: Make) -> None:
    c = cluster((1, 1, 1), 96 * BLOCK, "none")
    c.start("a", range(3))
    c.assert_result("a", range(3))
    total = len(c.encoded[0])
    for member in c.members:
        outcome = member[0].outcomes["a"]
        block = c.averaging.size(0, 0, 1)  # shares are of whole blocks
        assert 4 / 3 * total - block <= outcome.sent <= 4 / 3 * total + block + 20_000
        assert abs(outcome.received - 4 / 3 * total) <= block


def test_a_start_that_comes_late_finds_its_data_waiting(cluster: Make) -> None:
    c = cluster((2, 1), 40 * BLOCK)
    c.start("a", range(2), only=[0])
    assert until(lambda: sum("a" in link.early for link in c.members[1][0].exchanger.links.all()) == 2)
    c.start("a", range(2), only=[1])
    c.assert_result("a", range(2))


def test_many_attempts_side_by_side_and_twice_started(cluster: Make) -> None:
    c = cluster((2, 1), 20 * BLOCK)
    for n in range(8):
        c.start(f"a{n}", range(2))
        c.start(f"a{n}", range(2))
    for n in range(8):
        c.assert_result(f"a{n}", range(2))
    c.start("a0", range(2))  # once more, after its end
    assert c.idle()


@pytest.mark.parametrize("worlds", [(1, 1, 1), (4, 1, 2)])
def test_a_member_may_own_nothing_or_everything(cluster: Make, worlds: tuple[int, ...]) -> None:
    c = cluster(worlds, 60 * BLOCK + 7)
    for n, shares in enumerate([(WHOLE, 0, 0), (0, WHOLE - 1, 1), (WHOLE // 2 - 9, 9, WHOLE // 2)]):
        c.shares = shares
        c.start(f"a{n}", range(3))
        c.assert_result(f"a{n}", range(3))
    assert c.idle()


def test_small_fragments_are_cut_finer(cluster: Make) -> None:
    """So that all streams have something to send until the end; a part is a block at least."""
    few, many = 3 * BLOCK, 2 * attempt.LEAST_CHUNKS * 4 * BLOCK
    for n, elements in enumerate((few, many)):
        c = cluster((1, 1), elements)
        c.start(f"a{n}", range(2), only=[0])
        (side,) = c.members[0][0].exchanger._attempts[f"a{n}"].sides.values()
        assert len(side.parts) == min(elements // BLOCK // 2, attempt.LEAST_CHUNKS)
        c.start(f"a{n}", range(2), only=[1])
        c.assert_result(f"a{n}", range(2))


def test_parts_that_wait_for_a_slow_member_fill_no_more_than_the_window(
    cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "CHUNK", 2_000)
    monkeypatch.setattr(attempt, "WINDOW", 20_000)
    for module in (links, side):
        monkeypatch.setattr(module, "EARLY", 5_000)
    c = cluster((1, 1, 1), 400 * BLOCK)
    c.shares = (WHOLE, 0, 0)
    c.start("a", range(3), only=[0, 1])
    under_way = c.members[0][0].exchanger._attempts["a"]
    assert until(lambda: under_way.held > 10_000)  # all of member 1's, none of member 2's
    c.start("a", range(3), only=[2])
    c.assert_result("a", range(3))
    assert under_way.peak <= 2 * 20_000 < len(c.encoded[1]) / 4


def test_a_rank_sends_no_faster_than_a_bit_more_than_its_uplink_was_seen_to_carry(
    cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: dict[socket.socket, float] = {}
    monkeypatch.setattr(tcp, "pace", lambda sock, rate: paces.update({sock: rate}))
    c = cluster((1, 1, 1), 40 * BLOCK, streams=2)
    c.start("a", range(3))
    c.assert_result("a", range(3))
    assert not any(paces.values())  # nothing is known yet
    ranks = [member[0].exchanger.links for member in c.members]
    assert until(lambda: all(len(link.streams) == 2 for rank in ranks for link in rank.all()))
    for rank in ranks:
        rank.meter.up, rank.meter.settled = 1e6, False
    c.start("still rising", range(3))
    c.assert_result("still rising", range(3))
    assert not any(paces.values())
    for rank in ranks:
        rank.meter.up, rank.meter.settled = 1e6, True
    c.shares = (WHOLE, 0, 0)
    c.start("b", range(3))
    c.assert_result("b", range(3))
    by_link = [[sum(paces.get(s.sock, 0) for s in link.streams) for link in rank.all()] for rank in ranks]
    # Member 1's parts and sums all go to and come from 0.
    assert [sum(rates) for rates in by_link] == pytest.approx([PACE * 1e6] * 3)
    assert sorted(by_link[1]) == pytest.approx([0, PACE * 1e6])
    monkeypatch.setattr(links.Link, "round_trip", lambda self: 10.0)
    c.start("c", range(3))
    c.assert_result("c", range(3))
    assert not any(paces.values())  # too short to be paced


def test_links_outlive_attempts_and_come_back(cluster: Make) -> None:
    c = cluster((2, 1), 40 * BLOCK)
    c.start("a", range(2))
    c.assert_result("a", range(2))
    links = c.members[1][0].exchanger.links.all()
    c.start("b", range(2))
    c.assert_result("b", range(2))
    assert c.members[1][0].exchanger.links.all() == links
    for link in links:
        link.close("a test")
    assert until(lambda: not any(r.exchanger.links.all() for m in c.members for r in m))
    c.start("c", range(2))
    c.assert_result("c", range(2))


def test_more_streams_are_opened_as_configured(cluster: Make) -> None:
    c = cluster((1, 1), 40 * BLOCK, streams=5)
    c.start("a", range(2))
    c.assert_result("a", range(2))
    c.start("b", range(2))
    c.assert_result("b", range(2))
    assert until(lambda: all(len(m[0].exchanger.links.all()[0].streams) == 5 for m in c.members))


@pytest.mark.parametrize("closed", [0, 1])
def test_who_cannot_be_dialled_dials(cluster: Make, closed: int) -> None:
    c = cluster((2, 3), 60 * BLOCK, closed={closed})
    c.start("a", range(2))
    c.assert_result("a", range(2))


def test_two_that_cannot_be_dialled_have_no_way(cluster: Make) -> None:
    c = cluster((1, 1), 9 * BLOCK, closed={0, 1})
    c.start("a", range(2))
    assert c.ended("a", range(2))
    assert "can be dialled" in c.members[0][0].outcomes["a"].reason


def test_every_block_has_one_owner_and_one_rank_per_member() -> None:
    for blocks in (1, 2, 3, 7, 16, 61):
        for worlds in ((1,), (1, 1), (4, 1), (2, 3, 1), (5, 7, 2)):
            plan = cells(blocks, worlds, ownership([1.0] * len(worlds)))
            assert [cell.first for cell in plan] == [0, *(cell.last for cell in plan[:-1])] and plan[-1].last == blocks
            for cell in plan:
                for k, rank in enumerate(cell.ranks):
                    first, last = rank_blocks(blocks, rank, worlds[k])
                    assert first <= cell.first < cell.last <= last
                owned = [cell.owned(k) for k in range(len(worlds))]
                assert [b for span in owned for b in range(*span)] == list(range(cell.first, cell.last))
                assert all(0 < b - a <= CHUNK for span in owned for a, b in chunks(*span))


# Rank 0's hand on its region


def test_a_region_of_several_ranks_is_led_by_its_first(cluster: Make) -> None:
    c = cluster((3, 1), 40 * BLOCK)
    for rank in c.members[0][1:]:
        follow(rank.node, rank.exchanger)
    heard: list[tuple[int, Outcome]] = []
    leader = c.members[0][0]
    ranks = Ranks(leader.node, leader.exchanger, [rank.node.endpoint for rank in c.members[0]])
    ranks.on_outcome = lambda rank, outcome: heard.append((rank, outcome))
    ranks.start(c.order("a", range(2), 0))
    assert ranks.complete("a") is None
    c.start("a", range(2), only=[1])
    assert until(lambda: len(heard) == 3) and c.ended("a", [1])
    done = ranks.complete("a")
    assert done is not None
    size = c.averaging.size(0, 0, 1)
    assert b"".join(o.digests or b"" for o in done) == block_digests(c.reference(range(2)), size)
    assert sum(o.received for o in done) == c.members[1][0].outcomes["a"].received
    assert not ranks._done  # told once, then forgotten

    ranks.start(c.order("b", range(2), 0))
    ranks.cancel("b")
    assert until(lambda: len(heard) == 6) and ranks.complete("b") is None
    assert {outcome.reason for _, outcome in heard[3:]} == {"cancelled"}

    for rank in c.members[0]:
        rank.exchanger.decided(KEY)
    ranks.start(c.order("late", range(2), 0))  # nothing is offered any more: it fails, and the leader's line lives
    assert until(lambda: len(heard) == 9)
    for rank in c.members[0]:
        rank.exchanger.offer((0, 0, 9), torch.zeros(0, dtype=torch.uint8))
    c.offer(0)
    heard.clear()
    ranks.start(c.order("c", range(2), 0))
    c.start("c", range(2), only=[1])
    assert until(lambda: len(heard) == 3) and ranks.complete("c") is not None


def test_only_the_own_region_may_lead(cluster: Make) -> None:
    c = cluster((2, 1), 9 * BLOCK)
    follower = c.members[0][1]
    follow(follower.node, follower.exchanger)
    connection, _ = c.members[1][0].node.dial(follower.node.endpoint, "leader", 5)
    with pytest.raises(ConnectionError):
        connection.send(c.order("a", range(2), 0).message())
        connection.receive()
    assert not follower.exchanger._attempts and not follower.outcomes
