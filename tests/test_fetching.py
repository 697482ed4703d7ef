"""θ and moments from several members at once, over real sockets: what goes wrong at one of them costs nothing but its share."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import elastic.fetching
from diloco import fetching
from diloco.agreeing import Agreed, Roots, agree, prove, roots_of
from diloco.bits import serve_blocks
from diloco.fetching import Fetch
from diloco.fold import FragmentState, JournalError
from diloco.fragments import Fragment, Slot
from diloco.parallel import Region
from diloco.planes import Bits, Planes
from elastic import recovery
from elastic.node import Identity, Node
from elastic.plan import rank_blocks
from elastic.recovery import Donor, Unavailable
from tests.exchange_cluster import until

BLOCK = 64
FRAGMENTS = tuple(Fragment(f, (Slot("w", (size,), 0),), BLOCK) for f, size in enumerate((8000, 4321)))
ALONE = Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)
BASE = 1
Hook = Callable[[int, int, Tensor], Tensor]
"""(number of the read, fragment, what was read) -> what is sent."""


def state(f: int) -> list[Tensor]:
    return [torch.randn(FRAGMENTS[f].elements, generator=torch.Generator().manual_seed(10 * f + i)) for i in range(2)]


def gradient(f: int) -> Tensor:
    return torch.randn(FRAGMENTS[f].elements, generator=torch.Generator().manual_seed(100 + f))


def no_bits(f: int) -> Bits:
    return Bits(f, 1, torch.empty(0, dtype=torch.uint8))


class Member:
    """Ranks of one member that serve what they have, by the product's own code. hook: looks at what rank 0 serves."""

    def __init__(self, name: str, world: int = 1, other: float = 0.0, hook: Hook | None = None) -> None:
        self.nodes, self.planes, self.reads, self.hook = list[Node](), list[Planes](), 0, hook
        self.lock = threading.Lock()
        for rank in range(world):
            planes = Planes(FRAGMENTS, [rank_blocks(f.blocks, rank, world) for f in FRAGMENTS])
            for f, fragment in enumerate(FRAGMENTS):
                start, stop = fragment.span(*planes.slices[f])
                planes.load(f, BASE, *(flat[start:stop] + other for flat in state(f)))
            node = Node("127.0.0.1")
            node.identity = Identity("run", "{}", name, rank)
            recovery.serve(node, lambda *ask, planes=planes: self.read(planes, *ask))
            self.nodes.append(node)
            self.planes.append(planes)
        self.donor = Donor(name, tuple(node.endpoint for node in self.nodes))

    def read(self, planes: Planes, plane: str, f: int, first: int, last: int) -> tuple[int, Tensor] | None:
        found = serve_blocks(SimpleNamespace(planes=planes, fragments=FRAGMENTS), plane, f, first, last)  # type: ignore[arg-type]
        if plane != "planes" or found is None:
            return found
        time.sleep(0.002)
        with self.lock:
            self.reads += 1
            reads = self.reads
        return found[0], self.hook(reads, f, found[1]) if self.hook else found[1]

    def commit(self, f: int, seq: int) -> None:
        for planes in self.planes:
            start, stop = FRAGMENTS[f].span(*planes.slices[f])
            planes.step(seq, no_bits(f), [gradient(f)[start:stop]], 0.7, 0.9)

    def close(self) -> None:
        for node in self.nodes:
            node.close()


class Joiner:
    def __init__(self, stack: ExitStack, rank: int = 0, world: int = 1) -> None:
        self.node = Node("127.0.0.1")
        self.node.identity = Identity("run", "{}", "joiner")
        stack.callback(self.node.close)
        self.planes = Planes(FRAGMENTS, [rank_blocks(f.blocks, rank, world) for f in FRAGMENTS])
        self.into = {f: [self.planes.theta[f], self.planes.momentum[f]] for f in range(len(FRAGMENTS))}
        self.bases, self.named = [BASE, BASE], list[dict[str, Any]]()

    def run(self, *members: Member) -> Fetch:
        fetch = Fetch(self.node, ALONE, self.planes, self.into)
        fetch.run([member.donor for member in members], self.look)
        assert until(lambda: not self.node._open), "a connection is left"
        return fetch

    def look(self) -> tuple[list[bytes], Any]:
        entries = [{"kind": "open"}, {"kind": "join"}, *self.named]
        fragments = [FragmentState(base) for base in self.bases]
        return [json.dumps(entry).encode() for entry in entries], SimpleNamespace(fragments=fragments)

    def commit(self, f: int, roots: Roots) -> int:
        """A round is in the journal. Returns its seq."""
        seq = 2 + len(self.named)
        said = {"theta": roots[0], "momentum": roots[1]}
        self.named.append({"kind": "round", "seq": seq, "fragment": f, "base": self.bases[f], **said})
        self.bases[f] = seq
        return seq

    def assert_has(self, expected: Sequence[Sequence[Tensor]]) -> None:
        for f, flats in enumerate(expected):
            start, stop = FRAGMENTS[f].span(*self.planes.slices[f])
            for mine, flat in zip((self.planes.theta[f], self.planes.momentum[f]), flats, strict=True):
                assert torch.equal(mine, flat[start:stop])


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(fetching, "RANGE", 2 * 2 * 4 * BLOCK)  # two blocks at a time: 97 ranges
    monkeypatch.setattr(elastic.fetching, "MOST_ASKS", 3)  # lest they are all asked for at once
    with ExitStack() as stack:
        yield stack


def member(stack: ExitStack, name: str, **how: Any) -> Member:
    made = Member(name, **how)
    stack.callback(made.close)
    return made


WHOLE = [state(0), state(1)]
NBYTES = sum(8 * fragment.elements for fragment in FRAGMENTS)


@pytest.mark.parametrize(("worlds", "mine"), [((1, 1), (0, 1)), ((2, 3), (1, 2)), ((1, 4), (2, 3))])
def test_all_members_serve_at_once(stack: ExitStack, worlds: tuple[int, ...], mine: tuple[int, int]) -> None:
    members = [member(stack, f"m{i}_0", world=world) for i, world in enumerate(worlds)]
    joiner = Joiner(stack, *mine)
    fetch = joiner.run(*members)
    joiner.assert_has(WHOLE)
    assert fetch.bases == {0: [BASE], 1: [BASE]} and fetch.words.keys() == {(0, BASE), (1, BASE)}
    size = sum(8 * flat.numel() for flat in joiner.planes.theta)
    assert size <= sum(fetch.served.values()) <= 1.1 * size
    assert len(fetch.served) == len(members) and min(fetch.served.values()) > 0.25 * size, fetch.served


def test_one_that_dies_half_way_costs_no_restart(stack: ExitStack) -> None:
    def die(reads: int, f: int, data: Tensor) -> Tensor:
        if reads == 20:
            dying.nodes[0].close()
        return data

    dying, living = member(stack, "eu_1", hook=die), member(stack, "us_2")
    joiner = Joiner(stack)
    fetch = joiner.run(dying, living)
    joiner.assert_has(WHOLE)
    assert 10 <= dying.reads <= 25 and fetch.served["eu_1"] >= 10 * 2 * 2 * 4 * BLOCK, "what had come stays"
    assert sum(fetch.served.values()) < 1.2 * NBYTES


def test_the_last_one_dies(stack: ExitStack) -> None:
    def die(reads: int, f: int, data: Tensor) -> Tensor:
        if reads == 20:
            dying.nodes[0].close()
        return data

    dying = member(stack, "eu_1", hook=die)
    with pytest.raises(Unavailable, match="no member has all of planes"):
        Joiner(stack).run(dying)


def test_one_that_stalls_is_not_waited_for(stack: ExitStack) -> None:
    release = threading.Event()
    stack.callback(release.set)

    def stall(reads: int, f: int, data: Tensor) -> Tensor:
        if reads == 20:
            release.wait(60)
        return data

    stalling, living = member(stack, "eu_1", hook=stall), member(stack, "us_2")
    joiner, begin = Joiner(stack), time.monotonic()
    joiner.run(stalling, living)
    joiner.assert_has(WHOLE)
    assert time.monotonic() - begin < recovery.STALL / 2


def test_a_flipped_byte_is_found_and_its_sender_dropped(stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    def flip(reads: int, f: int, data: Tensor) -> Tensor:
        if reads == 7:
            data.view(torch.uint8)[-3] ^= 1
        return data

    forger, honest = member(stack, "eu_1", hook=flip), member(stack, "us_2")
    joiner = Joiner(stack)
    fetch = joiner.run(forger, honest)
    joiner.assert_has(WHOLE)
    assert fetch.served["us_2"] > 0.8 * NBYTES
    lines = [line for line in capsys.readouterr().out.splitlines() if "eu_1" in line]
    assert len(lines) == 1 and "do not have their digests" in lines[0]


def test_a_round_is_committed_in_the_middle(stack: ExitStack) -> None:
    """Fragment 0 moves on at both members while it is fetched: what had come stays as it was, the rest is newer, and the
    round's bits bring the former up to the latter."""
    joiner, seqs = Joiner(stack), list[int]()

    def commit(reads: int, f: int, data: Tensor) -> Tensor:
        if reads == 20:
            planes = members[0].planes[0]
            seqs.append(joiner.commit(0, roots_of([planes.digests(name, 0) for name in planes.names])))
            for one in members:
                one.commit(0, seqs[0])
        return data

    members = [member(stack, "eu_1", hook=commit), member(stack, "us_2", world=2)]
    fetch = joiner.run(*members)
    assert seqs and fetch.bases == {0: [BASE, *seqs], 1: [BASE]}, "the test is about a mixture"
    assert sum(fetch.served.values()) < 1.2 * NBYTES, "nothing was fetched again"
    planes = joiner.planes
    for f, held in fetch.held.items():
        planes.arrived(f, fetch.bases[f][0], held)
    assert planes.read(0, 0, 2) is None and planes.read_digests(0, 0, 2) is None, "a mixture is nobody's state"
    prove(fetch.words, joiner.named[0])
    planes.step(seqs[0], no_bits(0), gradient(0).split(16 * BLOCK), 0.7, 0.9)
    joiner.assert_has([[members[0].planes[0].theta[0], members[0].planes[0].momentum[0]], state(1)])
    assert planes.bases == [*seqs, BASE] and planes.read(0, 0, 2) is not None


def test_one_that_has_not_merged_yet_is_waited_for(stack: ExitStack) -> None:
    late, early = member(stack, "eu_1"), member(stack, "us_2")
    joiner = Joiner(stack)
    planes = early.planes[0]
    seq = joiner.commit(0, roots_of([planes.digests(name, 0) for name in planes.names]))
    early.commit(0, seq)
    timer = threading.Timer(0.3, late.commit, (0, seq))
    timer.start()
    fetch = joiner.run(late, early)
    timer.join()
    assert fetch.bases == {0: [seq], 1: [BASE]} and fetch.served["eu_1"] > 0
    joiner.assert_has([[planes.theta[0], planes.momentum[0]], state(1)])


def test_the_majority_is_believed(stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = member(stack, "eu_1", other=1.0)
    joiner = Joiner(stack)
    fetch = joiner.run(wrong, member(stack, "us_2"), member(stack, "asia_3"))
    joiner.assert_has(WHOLE)
    assert "eu_1" not in fetch.served and "eu_1 has another fragment 0" in capsys.readouterr().out


def test_two_that_differ_need_the_journal(stack: ExitStack) -> None:
    wrong, right = member(stack, "eu_1", other=1.0), member(stack, "us_2")
    joiner = Joiner(stack)
    with pytest.raises(Unavailable, match="no agreement on fragment 0: eu_1 has entry 1, us_2 has entry 1"):
        joiner.run(wrong, right)
    for f in range(2):
        planes = right.planes[0]
        joiner.commit(f, roots_of([planes.digests(name, f) for name in planes.names]))
    joiner.run(wrong, right)  # they have not merged the rounds yet, which name what they have
    joiner.assert_has(WHOLE)


def test_a_lone_liar_is_found_by_the_next_entry(stack: ExitStack) -> None:
    fetch = Joiner(stack).run(member(stack, "eu_1", other=1.0))
    planes = Member("us_2").planes[0]
    theta, momentum = roots_of([planes.digests(name, 1) for name in planes.names])
    entry = {"seq": 9, "fragment": 1, "base": BASE, "theta": theta, "momentum": momentum}
    with pytest.raises(JournalError, match="fragment 1 as the members had it is not what journal entry 9 names"):
        prove(fetch.words, entry)
    prove(fetch.words, {**entry, "base": 0})  # of nothing that was fetched


A, B = ("a", "a"), ("b", "b")


@pytest.mark.parametrize(
    ("said", "known", "expected"),
    [
        ({"m": (4, A)}, {4: None}, (4, A, ("m",), (), False)),
        ({"m": (4, A), "n": (4, A), "o": (4, B)}, {4: None}, (4, A, ("m", "n"), ("o",), True)),
        ({"m": (4, A), "n": (4, B)}, {4: None}, None),
        ({"m": (4, A), "n": (4, B)}, {4: B}, (4, B, ("n",), ("m",), True)),
        ({"m": (4, A)}, {4: B}, None),
        ({"m": (9, A), "n": (4, B)}, {4: None}, (4, B, ("n",), (), False)),  # 9 is not of this run's path
        ({"m": (4, A), "n": (6, B)}, {4: A, 6: None}, (6, B, ("n",), (), False)),
        ({}, {4: None}, None),
    ],
)
def test_whom_a_joiner_believes(said: dict, known: dict, expected: tuple | None) -> None:
    assert agree(said, known) == (None if expected is None else Agreed(*expected))
