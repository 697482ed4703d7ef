"""AdamW's moments from a peer: copied by its main loop a part at a time, fetched whole, and never garbage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco import lending
from diloco.bits import serve_blocks
from diloco.checkpoints import MOMENTS
from diloco.fragments import group_parameters
from diloco.inner import Inner, InnerConfig
from diloco.lending import FRESH, KEPT, PARTS, Lender, ask_for_moments, take_moments
from diloco.model import build_llama, next_token_loss
from diloco.parallel import Region, layer_of
from diloco.shards import Shards
from elastic import recovery
from elastic.node import Identity, Node
from elastic.recovery import Donor

ALONE = Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)


class Member:
    """What lending needs of a Trainer."""

    def __init__(self, stack: ExitStack, name: str, steps: int) -> None:
        torch.manual_seed(len(name))
        model = build_llama(vocab=32, dim=16, layers=3, heads=2, kv_heads=1, ffn=32)
        shapes = [(key, tuple(p.shape)) for key, p in model.named_parameters()]
        self.fragments, self.region = group_parameters(shapes, layer_of(model), 2, block=100), ALONE
        self.inner = Inner(InnerConfig(batch=2, seq_len=8), model, next_token_loss, ALONE)
        self.shards = Shards(model, self.fragments, ALONE)
        self.planes = SimpleNamespace(slices=[self.shards.blocks(f.index) for f in self.fragments])
        self.lender = Lender(self.shards, self.inner)
        node = Node("127.0.0.1")
        stack.callback(node.close)
        node.identity = Identity("run", "{}", name)
        recovery.serve(node, partial(serve_blocks, self))  # type: ignore[arg-type]
        self.links = SimpleNamespace(node=node, member=name)
        self.donor = Donor(name, (node.endpoint,))
        self.step(steps)
        self.loop()

    def step(self, count: int) -> None:
        for _ in range(count):
            self.inner.step(torch.randint(0, 32, (2, 9)), 0.5)

    def loop(self) -> bool:
        """One turn of the main loop. Whether it copied a part."""
        if (part := self.lender.due()) >= 0:
            self.lender.copy(part)
        return part >= 0

    def moments(self) -> list[Tensor]:
        self.inner.materialise()
        selects = [partial(lambda name, p: self.inner.optimizer.state[p][name], name) for name in MOMENTS]
        return [self.shards.read(f.index, select) for f in self.fragments for select in selects]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def take(joiner: Member, donor: Member, turns: int = 10**6) -> bool:
    """Meanwhile the donor's loop makes its turns."""
    chosen = ask_for_moments(joiner, [Donor("gone", ("127.0.0.1:1",)), donor.donor])  # type: ignore[arg-type]
    assert chosen is not None and chosen.donor == donor.donor
    over = threading.Event()

    def loop() -> None:
        for _ in range(turns):
            donor.loop()
            if over.wait(0.001):
                return

    thread = threading.Thread(target=loop)
    thread.start()
    took = take_moments(joiner, chosen)  # type: ignore[arg-type]
    over.set()
    thread.join()
    return took


def test_a_joiner_has_the_moments_of_the_member(stack: ExitStack) -> None:
    donor, joiner = Member(stack, "eu_1", steps=5), Member(stack, "joiner", steps=0)
    joiner.inner.materialise()
    assert take(joiner, donor)
    for mine, theirs in zip(joiner.moments(), donor.moments(), strict=True):
        assert torch.equal(mine, theirs) and mine.abs().sum() > 0
    assert joiner.inner.updates == 5


def test_parts_are_small_and_nothing_is_copied_unasked(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = Member(stack, "eu_1", steps=1)
    lender, elements = donor.lender, sum(f.elements for f in donor.fragments)
    largest = max(slot.stop - slot.start for f in donor.fragments for slot in f.slots)
    assert not donor.loop() and lender.read(0, 0, 1)[0] == 0  # type: ignore[index]
    assert not donor.loop() and lender.read(0, 0, 0)[0] == 1, "the number to wait for"  # type: ignore[index]
    for part in range(PARTS):
        parts = lender._names(part)
        copied = [s for f in donor.fragments for s in f.slots if s.name in parts.get(f.index, ())]
        assert sum(slot.stop - slot.start for slot in copied) <= elements / PARTS + largest
        donor.step(1)
        assert donor.loop()
    assert lender.read(0, 0, 1)[0] == 1 and lender.updates()[0] == 1 + PARTS  # type: ignore[index]
    assert not donor.loop() and lender.read(0, 0, 10**6) is None
    assert lender.read(0, 0, 0)[0] == 1 and not donor.loop(), "it is fresh enough for the next one"  # type: ignore[index]
    later = time.monotonic() + KEPT + 1
    monkeypatch.setattr(lending.time, "monotonic", lambda: later)
    assert donor.loop() and lender.read(0, 0, 1)[0] == 0, "what nobody looks at is not kept"  # type: ignore[index]


def test_who_has_not_stepped_lends_nothing(stack: ExitStack) -> None:
    donor, joiner = Member(stack, "eu_1", steps=0), Member(stack, "joiner", steps=0)
    assert not donor.loop() and ask_for_moments(joiner, [donor.donor]) is None  # type: ignore[arg-type]
    donor.step(1)
    assert not donor.loop() and ask_for_moments(joiner, [donor.donor])  # type: ignore[arg-type]
    donor.lender.copy(donor.lender.due(), idle=True)
    assert not donor.loop() and donor.lender.read(0, 0, 1)[0] == 1, "all at once"  # type: ignore[index]


def test_an_old_copy_is_not_for_who_comes_now(stack: ExitStack) -> None:
    """As when all regions have just joined each other: then somebody else joins."""
    donor, first, second = (
        Member(stack, "eu_1", steps=1),
        Member(stack, "us_2", steps=0),
        Member(stack, "asia_3", steps=0),
    )
    for joiner, steps in ((first, 1), (second, FRESH + 3)):
        joiner.inner.materialise()
        assert take(joiner, donor) and joiner.inner.updates == steps
        donor.step(FRESH + 2)
        for _ in range(FRESH + 1):
            donor.loop()


@pytest.mark.parametrize(("moment", "value"), [("exp_avg", torch.inf), ("exp_avg_sq", -1.0), ("exp_avg_sq", torch.nan)])
def test_garbage_is_not_taken(stack: ExitStack, capsys: pytest.CaptureFixture[str], moment: str, value: float) -> None:
    donor, joiner = Member(stack, "eu_1", steps=2), Member(stack, "joiner", steps=0)
    joiner.inner.materialise()
    state: Any = donor.inner.optimizer.state[donor.inner.params[-1]]
    state[moment].view(-1)[-1] = value
    assert not take(joiner, donor)
    assert all(flat.count_nonzero() == 0 for flat in joiner.moments()) and joiner.inner.updates == 0
    assert "joiner: no inner state from a peer" in capsys.readouterr().out


def test_a_member_that_does_not_get_on_is_not_waited_for(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "PATIENCE", 0.5)
    donor, joiner = Member(stack, "eu_1", steps=2), Member(stack, "joiner", steps=0)
    joiner.inner.materialise()
    assert not take(joiner, donor, turns=PARTS // 2) and joiner.inner.updates == 0
