"""Rank 0's control thread, with real connections and a journal that can be taken away."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from elastic import coordinator, rounds
from elastic.coordinator import Coordinator
from elastic.exchange import Exchanger
from elastic.journaling import Standing
from elastic.node import Identity, Node
from elastic.pulse import STEP, Pulse, step_aside
from elastic.ranks import Ranks
from elastic.rounds import Rounds
from elastic.timing import Timing


def until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


class Log:
    """A journal of one fragment that all members of a test share: `entries`, and how much of it this member has read."""

    def __init__(self, entries: list[dict[str, Any]], endpoints: dict[str, tuple[str, ...]]) -> None:
        self.entries, self.members = entries, endpoints
        self.seen = len(entries)
        self.away = False
        self.answers = threading.Event()
        """Cleared: the store takes its time."""
        self.answers.set()
        self.stop: dict[str, Any] | None = None
        self.tries = 0

    def read(self) -> list[bytes]:
        assert self.answers.wait(20)
        if self.away:
            raise OSError("the store is away")
        new = self.entries[self.seen :]
        self.seen = len(self.entries)
        return [json.dumps(entry).encode() for entry in new]

    def append(self, fields: dict[str, Any]) -> bool:
        self.tries += 1
        if self.away or fields.get("kind") == "stop":
            raise OSError("the store is away")
        if self.seen < len(self.entries):
            return False
        self.entries.append(fields)
        return True

    def standing(self) -> Standing:
        bases = [n for n, entry in enumerate(self.entries[: self.seen], start=1) if entry["kind"] == "round"]
        view = rounds.View(self.seen, 0, (max(bases, default=0),), tuple(sorted(self.members)))
        endpoints = {member: endpoints[0] for member, endpoints in self.members.items()}
        return Standing(view, endpoints, dict(self.members), lambda _, answers: [float(a["tokens"]) for a in answers])

    def closing(self) -> dict[str, Any] | None:
        return self.stop


def both_see(a: Coordinator, b: Coordinator) -> bool:
    return all(one.machine.view is not None and one.machine.connected() == ("a", "b") for one in (a, b))


class Net:
    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.members: dict[str, tuple[str, ...]] = {}
        self.all: dict[str, Coordinator] = {}

    def add(self, name: str, wanted: int = 1) -> Coordinator:
        node = Node("127.0.0.1")
        node.identity = Identity("run", "{}", name)
        self.members[name] = (node.endpoint,)
        ranks = Ranks(node, Exchanger(node, None, 0, 5.0), [node.endpoint])  # type: ignore[arg-type]
        log = Log(self.entries, self.members)
        machine = Rounds(name, wanted, wanted)
        self.all[name] = Coordinator(node, ranks, log, machine, Timing(2.0, 5.0), lambda digests: "d")
        return self.all[name]


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    monkeypatch.setattr(coordinator, "POLL", 0.05)
    net = Net()
    yield net
    for one in net.all.values():
        if one.ident is not None:
            one.close()
            assert not one.is_alive()
        one.node.close()


def test_what_was_read_reaches_the_main_loop_whatever_fails_next(net: Net) -> None:
    one = net.add("a")
    log: Any = one.journal.ledger
    one.start()
    log.stop = {"kind": "stop"}  # whose append fails
    net.entries.append({"kind": "round"})
    assert until(lambda: log.tries > 2)
    assert [json.loads(entry)["kind"] for entry in one.take(5).entries] == ["round"]


def test_a_store_that_is_away_at_the_start_costs_nothing(net: Net) -> None:
    one = net.add("a")
    log: Any = one.journal.ledger
    log.away = True
    one.post(rounds.Due(0))
    one.start()
    assert one.take(5).asks == [rounds.Ask(0, 0, 0)]


def test_a_store_that_takes_its_time_holds_up_no_message(net: Net) -> None:
    a, b = net.add("a", 2), net.add("b", 2)
    log: Any = a.journal.ledger
    a.start()
    b.start()
    assert until(lambda: both_see(a, b))
    log.answers.clear()
    silent = time.monotonic() + 2 * a.timing.peer_timeout
    assert not until(lambda: "a" not in b.peers, silent - time.monotonic()), "it was taken for dead"
    b.post(rounds.Due(0))
    assert a.take(5).asks == b.take(5).asks == [rounds.Ask(0, 0, 0)]
    net.entries.append({"kind": "round"})
    log.answers.set()
    assert [json.loads(entry)["kind"] for entry in a.take(5).entries] == ["round"]


def test_alarms_do_not_multiply(net: Net) -> None:
    """With the store away, a commit that is due asks for one retry at a time, however long that takes."""
    one = net.add("a")
    alarm = rounds.Alarm("append", 0, "x")
    for _ in range(50):
        one._set_alarm(alarm, "retry")
        one._set_alarm(alarm, "patience")
    assert len(one._alarms) == 1
    one._set_alarm(rounds.Alarm("again", 0, "x"), "jitter")
    assert len(one._alarms) == 2


def test_an_exchange_with_a_member_that_ended_is_given_up(net: Net) -> None:
    one = net.add("a")
    answers = ({"member": "a", "tokens": 1}, {"member": "gone", "tokens": 1})
    assert one._perform(rounds.Exchange("x", 0, 0, 0, answers)) == rounds.ExchangeFailed("x", frozenset())


def test_members_meet_by_the_journal_alone_and_again_after_a_break(net: Net) -> None:
    """No lighthouse, no new entry, and too few members for a round while they are apart."""
    a, b = net.add("a", 2), net.add("b", 2)
    a.start()
    b.start()

    assert until(lambda: both_see(a, b))
    for _ in range(3):
        old = a.peers["b"].connection
        old.close()
        assert until(lambda old=old: "b" in a.peers and a.peers["b"].connection is not old)
        assert until(lambda: both_see(a, b))
    a.post(rounds.Due(0))
    assert a.take(5).asks and b.take(5).asks == [rounds.Ask(0, 0, 0)]


def test_a_goodbye_is_known_at_once(net: Net) -> None:
    a, b = net.add("a"), net.add("b")
    a.start()
    b.start()
    assert until(lambda: "b" in a.peers and "a" in b.peers)
    del net.members["b"]  # it has left: nobody dials it any more
    begin = time.monotonic()
    b.close()
    b.node.close()
    assert until(lambda: "b" not in a.peers) and time.monotonic() - begin < 1.0


@pytest.mark.parametrize(
    "message", [{}, {"type": "propose"}, {"type": "sees", "members": 3}, {"type": "start", "head": 10**9}]
)
def test_nonsense_costs_the_sender_its_connection_and_nothing_else(net: Net, message: dict[str, Any]) -> None:
    one = net.add("a")
    one.start()
    stranger = Node("127.0.0.1")
    stranger.identity = Identity("run", "{}", "z")
    try:
        connection, _ = stranger.dial(one.node.endpoint, "control", 5)
        assert until(lambda: "z" in one.peers)
        connection.send(message)
        with pytest.raises(ConnectionError):
            while True:
                connection.receive()
        assert until(lambda: "z" not in one.peers) and one.is_alive() and one.take().halt is None
    finally:
        stranger.close()


def test_a_member_whose_main_loop_hangs_is_not_waited_for_until_it_is_back(net: Net, capfd: Any) -> None:
    """Its threads and its connections are as alive as ever."""
    a, b = net.add("a"), net.add("b")
    pulse = Pulse(0.2)
    b.watch = partial(step_aside, b, pulse)
    for _ in range(2):
        pulse.back()
        pulse.out(STEP)
    ticking = threading.Event()

    def tick() -> None:
        while not ticking.wait(0.02):
            pulse.back()
            pulse.out(STEP)

    loop = threading.Thread(target=tick, daemon=True)
    loop.start()
    a.start()
    b.start()

    assert until(lambda: both_see(a, b))
    a.post(rounds.Due(0))
    assert a.take(5).asks and b.take(5).asks == [rounds.Ask(0, 0, 0)]
    ticking.set()  # it never answers
    answer = {"tokens": 1, "leases": [], "theta": "t", "momentum": "m"}
    a.post(rounds.Answered(0, 0, 0, answer))
    assert until(lambda: a.machine.flight(0).best is not None and a.machine.flight(0).best.members == ("a",))
    assert "b" not in a.peers and b.is_alive()
    assert "b: its main loop hangs (an inner step for" in capfd.readouterr().out
    ticking.clear()
    threading.Thread(target=tick, daemon=True).start()
    assert until(lambda: both_see(a, b))
    b.watch = lambda: None
    ticking.set()
