"""Uploaders while they are killed, stopped and refused: real processes with arenas, a real S3 server behind a faulting proxy."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pytest
import torch

from ckpt.arena import Arena
from ckpt.checkpoint import load_manifest
from ckpt.parts import Attempt, Held
from ckpt.reading import Reader, verify
from ckpt.store import Store
from ckpt.uploads import Uploads
from tests.s3_proxy import Proxy, Rule
from tests.s3_server import BUCKET, Server

BLOCK = 1024
ELEMENTS = 300_000
PLANES = ("theta", "momentum")
PATIENCE, STAGGER = 1.0, 0.3


class Member:
    """One of `members`, with a rank that holds everything, and its uploader."""

    def __init__(self, url: str, members: tuple[str, ...], me: int, seed: int = 0) -> None:
        self.members, self.me = members, me
        self.state = torch.randn(len(PLANES), ELEMENTS, generator=torch.Generator().manual_seed(seed))
        arena = Arena.create(self.state.nbytes)
        arena.bytes[:] = memoryview(self.state.numpy()).cast("B")
        self.uploads = Uploads(arena, url)

    def submit(self, seq: int, seconds: float = 60) -> None:
        held = tuple(Held(plane, 0, 0, ELEMENTS, ELEMENTS, 4 * ELEMENTS * n) for n, plane in enumerate(PLANES))
        who, compare = (self.members[self.me], 0, 1, self.members, self.me), len(self.members) > 1
        attempt = Attempt(f"c/{seq}", {"seq": seq}, *who, compare, BLOCK, PATIENCE, STAGGER, held)
        job = {"id": seq, "since": time.monotonic(), "until": time.monotonic() + seconds, "rules": {}, "bits": {}}
        self.uploads.submit({**job, "attempts": [asdict(attempt)]})

    def answer(self) -> dict[str, Any]:
        """To the attempt; what it says of dead uploaders is left out."""
        assert self.uploads.wait(90), "no answer"
        return next(each for each in self.uploads.answers() if "prefix" in each)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if (pid := self.uploads.pid) is not None:
            os.kill(pid, number)


Start = Callable[..., list[Member]]


@pytest.fixture
def direct(weed: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Past the proxy."""
    for name, value in weed.environment.items():
        monkeypatch.setenv(name, value)
    store = Store(f"s3://{BUCKET}/{request.node.name.translate(str.maketrans('[] ', '---')).strip('-')}")
    store.exists("connect")
    return store


@pytest.fixture
def start(direct: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Members whose uploaders use the proxy; seeds: of their states, as many as there are members."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    started: list[Member] = []

    def all_of(*seeds: int) -> list[Member]:
        names = tuple(f"m{k}_{k}" for k in range(len(seeds)))
        started[:] = [Member(direct.url, names, k, seed) for k, seed in enumerate(seeds)]
        return started

    yield all_of
    for member in started:
        member.uploads.close()
        with suppress(ProcessLookupError):  # it has ended by itself
            member.kill(signal.SIGCONT)
            member.kill()


def until(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def committed(store: Store, seq: int, member: Member) -> dict[str, Any]:
    """The manifest, after a look that all of it is as it was in the arena."""
    manifest = load_manifest(store, f"c/{seq}")
    verify(store, manifest)
    reader = Reader(store, manifest)
    for plane, flat in zip(PLANES, member.state, strict=True):
        assert torch.equal(reader.read(plane, 0, 0, ELEMENTS), flat)
    return manifest


def copies(store: Store, seq: int) -> float:
    """Bytes of the shards at an entry, as multiples of the state."""
    keys = [key for key in store.list(f"c/{seq}") if key.endswith(".safetensors")]
    return sum(map(store.size, keys)) / (4 * ELEMENTS * len(PLANES))


STAGES = {"shard": r"\.safetensors", "part": "/parts/", "manifest": r"manifest\.json"}


@pytest.mark.parametrize("do", ["hang", "lose"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_uploader_is_killed_at_a_stage(start: Start, direct: Store, proxy: Proxy, stage: str, do: Any) -> None:
    """Before the server has heard of it, and after it has done it: the next uploader goes on from the arena."""
    (alone,) = start(0)
    first = alone.uploads.pid
    with proxy.fault(Rule(do, "PUT", STAGES[stage])) as rule:
        alone.submit(1)
        until(lambda: rule.hits >= 1)
        alone.kill()
        until(lambda: alone.uploads.pid not in (None, first) or not alone.uploads.busy())  # it may have been faster
    assert alone.answer()["kind"] == "stored"
    committed(direct, 1, alone)
    assert copies(direct, 1) < 1.01, "and what was there is not uploaded under another name"
    alone.submit(2)
    assert alone.answer()["kind"] == "stored" and committed(direct, 2, alone)


def test_members_share_and_one_commits(start: Start, direct: Store) -> None:
    members = start(0, 0, 0, 0)
    for seq in (1, 2, 3):
        for member in members:
            member.submit(seq)
        answers = [member.answer() for member in members]
        assert [a["kind"] for a in answers] == ["stored"] * 4 and sum(a["mine"] for a in answers) == 1
        committed(direct, seq, members[0])
        assert copies(direct, seq) < 1.01


@pytest.mark.parametrize("stage", ["never there", "shard", "part"])
def test_a_member_that_is_lost_is_made_up_for(start: Start, direct: Store, proxy: Proxy, stage: str) -> None:
    lost, *others = start(0, 0, 0)
    if stage != "never there":
        with proxy.fault(Rule("hang", "PUT", f"m0_0.*{STAGES[stage]}|{STAGES[stage]}m0_0")) as rule:
            lost.submit(1)
            until(lambda: rule.hits >= 1)
            lost.uploads._job = None  # nobody replaces it
            lost.kill()
    for member in others:
        member.submit(1)
    answers = [member.answer() for member in others]
    assert [a["kind"] for a in answers] == ["stored"] * 2 and sum(a["mine"] for a in answers) == 1
    committed(direct, 1, lost)


def test_a_zombie_finishes_late(start: Start, direct: Store, proxy: Proxy) -> None:
    """Stopped in the middle of its upload, it goes on when the others have made up for it and committed."""
    zombie, other = start(0, 0)
    with proxy.fault(Rule("hang", "PUT", r"m0_0.*safetensors")) as rule:
        zombie.submit(1)
        until(lambda: rule.hits >= 1)
        zombie.kill(signal.SIGSTOP)
    other.submit(1)
    assert other.answer()["mine"]
    before = direct.read("c/1/manifest.json")
    zombie.kill(signal.SIGCONT)
    said = zombie.answer()
    assert said["kind"] == "stored" and not said["mine"]
    assert direct.read("c/1/manifest.json") == before
    committed(direct, 1, zombie)


def test_states_that_differ_are_no_checkpoint(start: Start, direct: Store) -> None:
    """One bit of one member: all say so, and who has what."""
    members = start(0, 0, 0)
    odd = bytearray(members[1].uploads.arena.bytes[:4])
    odd[0] ^= 1
    members[1].uploads.arena.bytes[:4] = odd
    for member in members:
        member.submit(1)
    for member in members:
        said = member.answer()
        # By who was there when it looked: two, or all.
        sides = said["reason"].removeprefix("theta/0: ").split(" against ")
        assert said["kind"] == "differ" and len(sides) == 2 and "m1_1" in sides, said
    assert not direct.exists("c/1/manifest.json")


PASSING = {
    "503 storm": Rule("status"),
    "refused": Rule("status", status=403),
    "full": Rule("status", "PUT", status=507),
    "answers lost": Rule("lose", "PUT"),
    "breaking": Rule("cut", "PUT", at=1000),
    "hanging": Rule("hang"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for(start: Start, direct: Store, proxy: Proxy, name: str) -> None:
    members = start(0, 0)
    with proxy.fault(PASSING[name]) as rule:
        rule.hits = 0
        for member in members:
            member.submit(1)
        until(lambda: rule.hits >= (2 if rule.do == "hang" else 4))
    assert [member.answer()["kind"] for member in members] == ["stored"] * 2
    committed(direct, 1, members[0])


def test_what_does_not_pass_is_given_up_at_the_deadline(start: Start, direct: Store, proxy: Proxy) -> None:
    """With what the store said, in one sentence; the next save is as if nothing had been."""
    (alone,) = start(0)
    with proxy.fault(Rule("status", status=403)):
        alone.submit(1, seconds=3)
        said = alone.answer()
    assert said["kind"] == "failed" and "deadline" in said["reason"] and "\n" not in said["reason"], said
    assert direct.list("c/1") == []
    alone.submit(2)
    assert alone.answer()["kind"] == "stored" and committed(direct, 2, alone)


def test_a_server_that_is_killed_during_uploads(start: Start, direct: Store, proxy: Proxy, weed: Server) -> None:
    members = start(0, 0)
    with proxy.fault(Rule("slow", "PUT", "safetensors", rate=2e6)) as rule:
        for member in members:
            member.submit(1)
        until(lambda: rule.hits >= 2)
        weed.kill()
    weed.start()
    assert [member.answer()["kind"] for member in members] == ["stored"] * 2
    committed(direct, 1, members[0])
