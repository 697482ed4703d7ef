"""A rank's share of the samples of each inner step, read ahead of time.

What comes next is a function of the leases alone: a loader has a guess of it, made from a copy of the lease reader, and
looks at each step whether it was right. So it can be thrown away at any moment, and starts anywhere at once.
"""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from diloco.errors import ConfigError
from diloco.reading import Reader
from diloco.regional import Regional

PLANNED = 256
"""Steps that are planned at once."""
THREADS = 4
"""That fetch what is streamed, 16 MiB at once."""
LOOKS = 2
"""Times that the readahead hears what comes next, while as much is read as it looks ahead."""
RESTARTS = 3
PREFETCH = 4
"""Steps that each worker has ready or works at."""

Batch = list[Any]
"""Global indices."""
Upcoming = Callable[[], list[Batch]]


class Loader:
    """Of one rank. `waited`: seconds that training has spent in `next`."""

    def __init__(self, samples: Regional, workers: int, batch: int, rank: int, ranks: int) -> None:
        """batch: samples of the region's inner step, of which each of `ranks` takes its part."""
        self.waited = 0.0
        self._samples, self._workers, self._batch = samples, workers, batch
        self._share = slice(rank * (batch // ranks), (rank + 1) * (batch // ranks))
        self._plan: deque[Batch] = deque()
        self._loader: StatefulDataLoader[Any] | None = None
        self._batches: Iterator[Any] | None = None
        """Those of the plan; None: not begun."""
        self._ahead = Readahead(samples, samples.readahead) if samples.readahead else None
        self._unlooked = 0
        """Samples of the region's steps since it was told to the readahead what comes next."""
        if workers:
            self._begin()  # they take seconds to start, which no step is to wait for

    def next(self, reader: Reader) -> Tensor:
        """int32 [batch / ranks, seq_len + 1]: this rank's part of the next samples of the leases. Raises OSError if they cannot
        be read, ValueError if the leases hold too few."""
        begin = time.monotonic()
        if not self._plan:
            self._plan, self._batches = deque(self._upcoming(copy.deepcopy(reader), PLANNED)), None
        wanted = reader.take(self._batch)[self._share]
        if self._plan[0] != wanted:
            self._plan, self._batches = deque([wanted, *self._upcoming(copy.deepcopy(reader), PLANNED)]), None
        tokens = self._read()
        self._plan.popleft()
        if self._ahead is not None:
            self._unlooked += self._batch
            if self._unlooked >= self._ahead.depth // LOOKS:
                self.granted(reader)
        self.waited += time.monotonic() - begin
        return tokens

    def granted(self, reader: Reader) -> None:
        """The leases are others, or some of them are used up: what they hold next is fetched ahead."""
        if self._ahead is not None:
            self._unlooked = 0
            steps = self._ahead.depth // self._batch + 1
            self._ahead.follow(partial(self._upcoming, copy.deepcopy(reader), steps))

    def close(self) -> None:
        """Ends its processes and threads."""
        self._batches = self._loader = None
        if self._ahead is not None:
            self._ahead.close()

    def _upcoming(self, ahead: Reader, steps: int) -> list[Batch]:
        """This rank's part of each of the next steps, as far as the leases go. They are taken from it."""
        found = list[Batch]()
        while len(found) < steps and ahead.available() >= self._batch:
            found.append(ahead.take(self._batch)[self._share])
        return found

    def _begin(self) -> Iterator[Any]:
        if self._loader is None:
            self._loader = self._build()
        on_child = signal.getsignal(signal.SIGCHLD)
        batches: Iterator[Any] = iter(self._loader)
        if self._workers and threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises in the middle of whatever the main thread does, a collective for one, when a worker dies.
            signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
        return batches

    def _build(self) -> StatefulDataLoader[Any]:
        """Workers start from nothing: clients of object stores, and locks, do not survive a fork."""
        processes: dict[str, Any] = {}
        if self._workers:
            processes = {"multiprocessing_context": "spawn", "persistent_workers": True, "prefetch_factor": PREFETCH}
        return StatefulDataLoader(
            _Batches(self._samples),
            batch_sampler=_Sampler(self),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # its own: nobody else's random numbers depend on it
            snapshot_every_n_steps=None,  # leases say where it is
            **processes,
        )

    def _read(self) -> Tensor:
        for _ in range(RESTARTS):
            try:
                if self._batches is None:
                    self._batches = self._begin()
                found = next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:  # OSError: of a pipe whose other end is gone
                if not self._workers:
                    raise
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"data: {failure}: starting other workers", flush=True)
                self._batches = self._loader = None
            else:
                if isinstance(found, OSError):
                    raise found
                return found
        raise OSError(f"data.workers={self._workers} end again and again ({failure}): set it to 0 to see why")


def check(samples: Regional, workers: int) -> None:
    """Raises ConfigError unless so many processes can read these samples."""
    if workers < 0:
        raise ConfigError(f"data.workers={workers} is not a number of processes: set it to 0 or more")
    if workers:
        try:
            ForkingPickler.dumps(samples)
        except Exception as error:  # whatever an object of somebody else's raises
            raise ConfigError(
                f"data.workers={workers} cannot take data.source along ({error}): set it to 0, or make the source one that "
                "multiprocessing can send"
            ) from error


class _Sampler:
    """What the loader plans at the moment."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(list(self._loader._plan))


class _Batches:
    """Samples as PyTorch's loaders want them. What cannot be read is an item, too: raised in a worker, it would reach the rank as
    a text about a traceback."""

    def __init__(self, samples: Regional) -> None:
        self._samples = samples

    def __getitems__(self, indices: Batch) -> Tensor | OSError:
        try:
            return self._samples.batch(indices)
        except OSError as error:
            return error


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach all processes; the rank decides, and its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Readahead:
    """Threads that fetch what samples need before they are read, at most `depth` of them ahead. To find out which these are takes
    a second where they are a million: no step waits for that, either."""

    def __init__(self, samples: Regional, depth: int) -> None:
        self.depth = depth
        self._samples = samples
        self._upcoming: Upcoming | None = None
        """What nobody has looked at yet."""
        self._todo: deque[Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._closed = False
        for _ in range(THREADS):
            threading.Thread(target=self._run, name="readahead", daemon=True).start()

    def follow(self, upcoming: Upcoming) -> None:
        """The samples of these steps come next, in this order."""
        with self._change:
            self._upcoming = upcoming
            self._change.notify()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()

    def _run(self) -> None:
        while (task := self._next()) is not None:
            with suppress(OSError):  # whoever needs the sample will see for himself
                task()

    def _next(self) -> Callable[[], None] | None:
        with self._change:
            while not self._closed and not self._todo and self._upcoming is None:
                self._change.wait()
            if self._closed:
                return None
            if self._upcoming is not None:
                upcoming, self._upcoming = self._upcoming, None
                return partial(self._look, upcoming)
            return self._todo.popleft()

    def _look(self, upcoming: Upcoming) -> None:
        todo = deque(self._samples.fetches(i for step in upcoming() for i in step))
        with self._change:
            self._todo = todo
            self._change.notify_all()
