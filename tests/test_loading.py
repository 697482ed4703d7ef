"""Batches as the leases say, whoever reads them ahead."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from diloco import loading
from diloco.data import Dataset
from diloco.errors import ConfigError
from diloco.ledger import Lease
from diloco.loading import Loader, Readahead
from diloco.reading import Reader
from diloco.regional import Regional

BATCH, SEQ_LEN = 4, 8


@dataclass(frozen=True)
class Counting:
    """Token i is i; some cannot be read."""

    damaged: int = 1 << 40
    vocab: int = 1 << 30
    bytes_per_token: float = 1.0
    digest: str = ""

    @property
    def tokens(self) -> Counting:
        return self

    def __len__(self) -> int:
        return 100_001

    def __getitem__(self, where: slice) -> np.ndarray:
        if where.start <= self.damaged < where.stop:
            raise OSError("that shard is damaged")
        return np.arange(where.start, where.stop)


def dataset(**changes: int) -> Regional:
    return Regional(Dataset(Counting(**changes), SEQ_LEN, 0.0, 0), [])


def reader(*leases: tuple[int, int]) -> Reader:
    found = Reader({"": Fraction(1)})
    found.update(tuple(Lease(k, start, stop, start) for k, (start, stop) in enumerate(leases)))
    return found


def course(loader: Loader) -> Iterator[torch.Tensor]:
    """Leases that go on, leases that change under way, work that is taken back, and a place far off."""
    leases = reader((0, 22), (1000, 1010))
    for _ in range(7):
        yield loader.next(leases)
    leases.update((Lease(1, 1000, 1010, 1004), Lease(2, 40, 60, 40)))
    loader.granted(leases)
    for _ in range(3):
        yield loader.next(leases)
    leases.forget()
    for _ in range(2):
        yield loader.next(leases)
    yield loader.next(reader((10**12, 10**12 + BATCH)))


def expected() -> list[torch.Tensor]:
    taken = [*range(22), *range(1000, 1006), *range(1006, 1010), *range(40, 48), *range(1004, 1010), 40, 41]
    batches = [taken[at : at + BATCH] for at in range(0, 48, BATCH)] + [list(range(10**12, 10**12 + BATCH))]
    return [dataset().batch(batch) for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_same_batches_with_any_number_of_workers(workers: int) -> None:
    for rank in {0: (0, 1), 1: (0,), 2: (1,)}[workers]:
        loader = Loader(dataset(), workers, BATCH, rank, 2)
        got = list(course(loader))
        loader.close()
        assert len(got) == 13
        for batch, whole in zip(got, expected(), strict=True):
            assert torch.equal(batch, whole[2 * rank : 2 * rank + 2])


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="4 samples asked of leases that hold 3"):
        Loader(dataset(), 0, BATCH, 0, 1).next(reader((0, 3)))


def test_workers_that_die_or_find_damage(capfd: pytest.CaptureFixture[str]) -> None:
    """kill -9 costs nothing but a line; what cannot be read stops in one sentence, at its own step."""
    source = dataset()
    damaged = int(source.batch([43])[0, 1])
    before = signal.getsignal(signal.SIGCHLD)
    loader, leases = Loader(dataset(damaged=damaged), 1, BATCH, 0, 1), reader((0, 80))
    assert torch.equal(loader.next(leases), source.batch(range(4)))
    assert loader._loader is not None and signal.getsignal(signal.SIGCHLD) == before
    [worker] = loader._loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    for step in range(1, 10):
        assert torch.equal(loader.next(leases), source.batch(range(4 * step, 4 * step + 4)))
    assert "starting other workers" in capfd.readouterr().out
    with pytest.raises(OSError, match=r"^that shard is damaged$"):
        loader.next(leases)
    loader.close()


def test_a_source_that_cannot_be_sent_is_one_sentence() -> None:
    unsendable = dataset()
    unsendable.data.source = type("Local", (), {})()  # type: ignore[misc]
    loading.check(unsendable, 0)
    with pytest.raises(ConfigError, match=r"data\.workers=1 cannot take data\.source along"):
        loading.check(unsendable, 1)
    with pytest.raises(ConfigError, match=r"data\.workers=-1"):
        loading.check(unsendable, -1)


class Recording:
    """Samples that say what was fetched for them."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def fetches(self, indices: list[int]) -> list[Callable[[], None]]:
        return [partial(self.fetch, i) for i in indices]

    def fetch(self, i: int) -> None:
        self.fetched.append(i)
        if i == 5:
            raise OSError("whoever needs it will see")


def test_what_comes_next_is_fetched_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "THREADS", 1)
    samples = Recording()
    ahead = Readahead(samples, 100)  # type: ignore[arg-type]
    for expected in ([3, 4, 5, 6], [7, 8]):
        samples.fetched.clear()
        ahead.follow(lambda expected=expected: [expected[:1], expected[1:]])  # type: ignore[misc]
        deadline = time.monotonic() + 20
        while len(samples.fetched) < len(expected) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert samples.fetched == expected
    ahead.close()


class Streamed:
    """Samples that come from elsewhere, of which 16 may be ahead, in groups of 8."""

    readahead = 16

    def __init__(self) -> None:
        self.data, self.fetched = dataset(), Recording()
        self.fetches = self.fetched.fetches

    def batch(self, indices: list[int]) -> torch.Tensor:
        return self.data.batch(indices)


def test_a_lease_is_fetched_ahead_to_its_end_however_long_it_is() -> None:
    """Nobody grants anything meanwhile."""
    samples = Streamed()
    loader, leases = Loader(samples, 0, BATCH, 0, 1), reader((0, 200))  # type: ignore[arg-type]
    loader.granted(leases)
    for read in range(BATCH, 200, BATCH):
        loader.next(leases)
        deadline = time.monotonic() + 20
        while max(samples.fetched.fetched, default=0) < min(read + 8, 200) - 1:
            assert time.monotonic() < deadline, (
                f"{read} are read, and no more than {max(samples.fetched.fetched)} fetched"
            )
            time.sleep(0.001)
        assert max(samples.fetched.fetched) < read + 16 + BATCH
    loader.close()
