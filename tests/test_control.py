"""What a region does next: steps, snapshots and waiting, from where its loop stands."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from diloco.control import Control, Limits, Order, RunLedger, Status
from diloco.fold import State
from elastic import rounds
from elastic.coordinator import Commands
from tests.test_journal import Log, answer, joining, opening


class Peers:
    """The coordinator's side of the conversation."""

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.commands = Commands()
        self.alone = self.away = False
        self.waits = 0

    def post(self, event: Any) -> None:
        self.posted.append(event)

    def take(self, timeout: float) -> Commands:
        self.waits += timeout > 0
        commands, self.commands = self.commands, Commands()
        return commands

    def lonely(self) -> bool:
        return self.alone

    def connected(self) -> list[str]:
        return []

    @property
    def machine(self) -> rounds.Rounds:
        return rounds.Rounds("eu_1")


def region(overlap: int = 0) -> tuple[Control, Peers]:
    peers = Peers()
    return Control(peers, peers, "eu_1", Limits(batch=2, overlap=overlap, local=8)), peers  # type: ignore[arg-type]


def run(fragments: int = 1, **settings: Any) -> Log:
    """Four steps between boundaries; two samples a step, of which the leases hold 30."""
    return Log(opening(fragments=fragments, sync_every=4 * fragments, ahead=30, **settings), joining("eu_1"))


def doing(
    control: Control,
    state: State,
    since: int,
    ages: dict[int, int] | None = None,
    samples: int = 40,
    overdue: int = 0,
    work: tuple[int, ...] = (9, 9, 9),
) -> str | int:
    """step, wait, or the fragment that is snapshotted."""
    order = control.next(state, Status(since, overdue, ages or {}, samples, work))
    if order.ask:
        assert order == Order(ask=(order.ask[0], state.epoch, state.fragments[order.ask[0]].base))
        return order.ask[0]
    return "step" if order.step else "wait"


def test_without_overlap_a_region_waits_at_its_boundary() -> None:
    (control, peers), state = region(), run().state
    assert [doing(control, state, since) for since in (0, 3, 4)] == ["step", "step", 0]
    assert peers.posted == [rounds.Due(0, 0)] and peers.waits == 0
    assert doing(control, state, 0, {0: 0}) == "wait" and peers.waits == 1
    assert control.waited > 0


def test_with_overlap_it_waits_for_a_snapshot_that_is_too_old() -> None:
    (control, peers), state = region(overlap=3), run(fragments=3).state
    assert doing(control, state, 4) == 0
    assert [doing(control, state, age, {0: age}) for age in range(4)] == ["step", "step", "step", "wait"]
    (control, peers), state = region(overlap=9), run(fragments=3).state
    assert doing(control, state, 4, {0: 4}) == 1
    assert doing(control, state, 4, {0: 8, 1: 4}) == 2
    assert doing(control, state, 1, {0: 9, 1: 5, 2: 1}) == "wait"
    assert peers.posted == [rounds.Due(1, 0), rounds.Due(2, 0)], "each boundary is announced once"


def test_a_fragment_is_in_flight_once() -> None:
    """The boundary of one whose round is under way waits for it, however much overlap is allowed."""
    (control, peers), state = region(overlap=99), run(fragments=2).state
    assert doing(control, state, 4, {0: 8, 1: 4}) == "wait" and peers.posted == []
    assert doing(control, state, 3, {0: 7, 1: 3}) == "step"


def test_a_boundary_is_announced_once_until_the_round_is_there() -> None:
    (control, peers), log = region(), run()
    peers.alone = True
    assert [doing(control, log.state, 4) for _ in range(3)] == ["wait"] * 3
    assert peers.posted == [rounds.Due(0, 0)]
    log.add(log.round(answer("eu_1", (0, 8))))
    assert doing(control, log.state, 4) == "wait" and peers.posted[1:] == [rounds.Due(0, 2)]


@pytest.mark.parametrize("why", ["alone", "away"])
def test_cut_off_it_goes_on_up_to_max_local_steps(why: str) -> None:
    (control, peers), state = region(overlap=1), run().state
    setattr(peers, why, True)
    snapshot = (
        "step" if why == "alone" else 0
    )  # with peers it can go into a round; who is alone contributes it all later
    assert doing(control, state, 4) == snapshot
    assert [doing(control, state, 5, {0: age}) for age in (1, 7, 8)] == ["step", "step", "wait"]
    assert doing(control, state, 12, {0: 7}) == "wait", "8 steps beyond the boundary"
    (control, peers), state = region(), run().state
    setattr(peers, why, True)
    assert doing(control, state, 0, {0: 0}) == "wait", "exactly H steps, and reproducible"
    (control, peers), state = region(), run(boundary="first").state
    setattr(peers, why, True)
    assert doing(control, state, 0, {0: 0}) == "step"


def test_leases_bound_everything() -> None:
    (control, peers), state = region(overlap=9), run(fragments=2).state
    peers.alone = True
    assert doing(control, state, 1, {0: 1}, samples=1) == "wait"
    peers.alone = False
    assert doing(control, state, 1, {}, samples=1) == 0, (
        "used up, as by one that was left out: what there is goes into a round"
    )
    assert doing(control, state, 1, {0: 1}, samples=1) == "wait"


def test_what_a_restart_threw_away_is_due_at_once() -> None:
    (control, _), state = region(overlap=9), run(fragments=3).state
    assert doing(control, state, 1, overdue=2) == 0
    assert doing(control, state, 1, {0: 0}, overdue=1) == 1
    assert doing(control, state, 1, {0: 0, 1: 0}) == "step"


def test_a_boundary_without_work_is_none() -> None:
    """After a restart its fragment may have been in a round just now: one step more, or the round could have no weight."""
    (control, peers), state = region(overlap=9), run(fragments=2).state
    assert doing(control, state, 4, overdue=1, work=(0, 9)) == "step" and peers.posted == []
    assert doing(control, state, 5, overdue=1, work=(1, 10)) == 0


def test_no_more_rounds_begin_than_are_wanted() -> None:
    (control, peers), state = region(overlap=9), run(fragments=3, rounds=2).state
    assert doing(control, state, 4, {0: 8, 1: 4}) == "step" and peers.posted == []


def asked(peers: Peers, *fragments: int, base: int = 0) -> None:
    peers.commands = Commands(asks=[rounds.Ask(f, 0, base) for f in fragments])


def test_with_boundary_first_it_contributes_what_it_has_in_the_order_of_the_boundaries() -> None:
    (control, peers), state = region(overlap=9), run(fragments=3, boundary="first").state
    asked(peers, 2, 1, 0)
    assert doing(control, state, 0) == "step", "one step at least"
    assert doing(control, state, 1) == 0
    assert doing(control, state, 0, {0: 0}) == "step"
    assert doing(control, state, 1, {0: 1}) == 1
    assert doing(control, state, 1, {0: 1, 1: 0}) == 2


def test_asks_do_not_outlive_their_round() -> None:
    (control, peers), log = region(overlap=9), run(fragments=2, boundary="first")
    asked(peers, 0, 1)
    assert doing(control, log.state, 0) == "step"
    log.add(log.round(answer("eu_1", (0, 2)), fragment=0))
    assert doing(control, log.state, 1) == 1
    assert doing(control, log.state, 1, {1: 1}) == "step"


def test_with_boundary_steps_it_keeps_to_its_own() -> None:
    """Peers that are ahead wait; who waits for a round that it is asked for contributes even if it seems to be alone."""
    (control, peers), state = region(overlap=9), run(fragments=2).state
    asked(peers, 1, 0)
    assert doing(control, state, 1) == "step"
    assert doing(control, state, 3) == "step"
    peers.alone = True
    assert doing(control, state, 4) == 0


def test_entries_come_before_snapshots_and_steps() -> None:
    (control, peers), state = region(), run().state
    peers.commands = Commands(entries=[b"{}"])
    assert control.next(state, Status(4, 0, {}, 40, [4])) == Order(entries=["{}"])


def test_a_pause_is_waited_out_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    (control, peers), log = region(overlap=9), run()
    log.add({"kind": "set", "paused": True})
    peers.commands = Commands(asks=[rounds.Ask(0, 0, 0)])
    assert [doing(control, log.state, since) for since in (0, 4, 4)] == ["wait"] * 3
    assert peers.posted == [] and control.waited > 0
    log.add({"kind": "set", "paused": False})
    assert doing(control, log.state, 3) == "step" and doing(control, log.state, 4) == 0
    assert capsys.readouterr().out.splitlines() == ["eu_1: the run is paused, waiting", "eu_1: the run goes on"]


def test_who_is_expelled_ends_with_a_sentence_and_not_as_wanted() -> None:
    (control, _), log = region(), run()
    log.add({"kind": "set", "expel": "eu"})
    order = control.next(log.state, Status(0, 0, {}, 40, (9,)))
    assert "eu is expelled from this run" in order.end and "admit RUN eu" in order.end and not order.clean


def test_only_a_new_run_waits_for_its_regions_for_ever() -> None:
    """A region that goes on with a run gives those that start with it some time."""
    log = run(start_regions=1)
    journal = SimpleNamespace(state=log.state)

    def first(patience: float) -> bool:
        return RunLedger(journal, patience).standing().view.first  # type: ignore[arg-type]

    assert first(0.0) and first(60.0)
    journal.state = log.add(log.round(answer("eu_1", (0, 8))))
    assert first(60.0) and not first(0.0)
    patient = RunLedger(journal, 60.0)  # type: ignore[arg-type]
    journal.state = log.add(log.round(answer("eu_1", (0, 16))))
    assert not patient.standing().view.first, "a round has come"
    journal.state = replace(log.state, rounds=0, epoch=1)
    assert not first(0.0), "it was rewound"


def test_whose_leases_expired_ends_not_as_wanted_and_is_started_again() -> None:
    (control, _), log = region(), run(lease_rounds=1)
    log.add(joining("us_1"))
    for _ in range(2):
        log.add(log.round(answer("us_1", (1, log.state.members["us_1"].leases[0].applied + 2))))
    assert "eu_1" not in log.state.members
    order = control.next(log.state, Status(0, 0, {}, 40, (9,)))
    assert not order.clean and order.end == (
        "eu_1 is not a member any more: its leases expired, as more than elastic.lease_rounds=1 rounds were without it; "
        "a restart joins anew"
    )


def test_who_was_succeeded_ends_as_wanted() -> None:
    """Or both would be started again and again, each in place of the other."""
    (control, _), log = region(), run()
    log.add(joining("eu_2"))
    order = control.next(log.state, Status(0, 0, {}, 40, (9,)))
    assert order.end == "eu_1 is not a member any more: its region joined again, as eu_2" and order.clean
