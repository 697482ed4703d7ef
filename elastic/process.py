"""A rank's exchanges in a process of their own, so that encoding, summing and sockets do not share Python's lock with the
inner steps. Contributions and results are memory that both processes see; nothing else is copied between them."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from elastic.exchange import Exchanger
from elastic.memory import Pipe, pipes, shared_bytes
from elastic.order import Contribution, Key, Order, Outcome, parse_order, parse_outcome
from elastic.wire import Message


def fork(main: Callable[[Pipe], None]) -> Pipe:
    """Runs `main` in a copy of this process, which ends when `main` returns or this process ends; signals pass it by. Call it
    before this process has threads, and before it has used a device or several cores: these do not survive a fork."""
    here, there = pipes()
    if os.fork():
        return here
    code = 1
    try:
        del here  # else nobody would see its end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        main(there)
        code = 0
    except ConnectionError:
        code = 0  # the rank has ended
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Exchange:
    """The rank's own end: what an `Exchanger` is to its rank, and does in the process at the other end of `pipe`.
    on_lost: called if that process ends by itself, with which this rank has lost what it holds of rounds under way."""

    def __init__(self, pipe: Pipe, on_lost: Callable[[], None]) -> None:
        self.on_outcome: Callable[[Outcome], None] = lambda outcome: None
        self._pipe, self._on_lost, self._closed = pipe, on_lost, False
        self._lock = threading.Lock()
        self._offers: dict[Key, Contribution] = {}
        self._keys: dict[str, Key] = {}
        """Of the attempts under way."""
        self._results: dict[str, tuple[Key, Tensor]] = {}

    def open(self, setup: Message) -> Message:
        """Tells the process what it exchanges, once. Returns its answer."""
        self._pipe.send(setup)
        answer, _ = self._pipe.receive()
        if "endpoint" in answer:
            threading.Thread(target=self._listen, name="exchange", daemon=True).start()
        return answer

    def offer(self, key: Key, contribution: Contribution) -> None:
        """This rank's contribution to `key`; attempts reuse it until the round is decided."""
        with self._lock:
            self._offers[key] = contribution
        message, tensors = contribution.shared()
        self._pipe.send({"do": "offer", "key": key, "contribution": message}, tensors)

    def start(self, order: Order) -> None:
        """Runs the attempt; `on_outcome` hears of its end."""
        with self._lock:
            self._keys[order.attempt] = order.key
        self._tell("start", order=order.message())

    def cancel(self, attempt: str) -> None:
        """Ends the attempt if it is under way. A result that is held stays held."""
        self._tell("cancel", attempt=attempt)

    def drop(self, attempt: str) -> None:
        """Another rank of this region failed: the region does not hold the result, so it will not be committed."""
        with self._lock:
            self._results.pop(attempt, None)
        self._tell("drop", attempt=attempt)

    def result(self, attempt: str) -> Tensor | None:
        """This rank's slice of the encoded result (uint8), if held."""
        with self._lock:
            held = self._results.get(attempt)
        return None if held is None else held[1]

    def decided(self, key: Key) -> None:
        """The round that `key` was for is in the journal: its contribution and results are of no further use."""
        with self._lock:
            self._offers.pop(key, None)
            self._results = {a: held for a, held in self._results.items() if held[0] != key}
        self._tell("decided", key=key)

    def forget(self) -> None:
        """Nothing that was offered or held belongs to the run any more: it was rewound."""
        with self._lock:
            self._offers.clear()
            self._results.clear()
        self._tell("forget")

    def close(self) -> None:
        """Ends the process."""
        self._closed = True
        with suppress(OSError):
            self._pipe.close()

    def _tell(self, do: str, **what: object) -> None:
        self._pipe.send({"do": do, **what})

    def _listen(self) -> None:
        while True:
            try:
                message, tensors = self._pipe.receive()
            except OSError:
                return None if self._closed else self._on_lost()
            self._ended(message, tensors)

    def _ended(self, message: Message, tensors: list[Tensor]) -> None:
        digests = tensors[1].numpy().tobytes() if tensors else None
        outcome = parse_outcome(message, digests)
        with self._lock:
            key = self._keys.pop(outcome.attempt)
            if digests is not None and key in self._offers:
                self._results[outcome.attempt] = (key, tensors[0])
                self._offers[key].filled()
        self.on_outcome(outcome)


def serve(pipe: Pipe, exchanger: Exchanger, rebuild: Callable[[Message, list[Tensor]], Contribution]) -> None:
    """In the process: does what the rank's `Exchange` says. rebuild: makes a contribution of what its `shared` gave. Raises
    ConnectionError once the rank has ended."""

    def tell(outcome: Outcome) -> None:
        tensors = [] if outcome.digests is None else [_held(outcome.attempt), shared_bytes(outcome.digests)]
        with suppress(ConnectionError):  # the rank has ended: seen below
            pipe.send(outcome.message(), tensors)

    def _held(attempt: str) -> Tensor:
        """Empty if the round was decided meanwhile."""
        result = exchanger.result(attempt)
        return shared_bytes(b"") if result is None else result

    exchanger.on_outcome = tell
    while True:
        message, tensors = pipe.receive()
        do = message["do"]
        if do == "offer":
            exchanger.offer(tuple(message["key"]), rebuild(message["contribution"], tensors))
        elif do == "start":
            exchanger.start(parse_order(message["order"]))
        elif do == "decided":
            exchanger.decided(tuple(message["key"]))
        elif do == "forget":
            exchanger.forget()
        else:
            {"cancel": exchanger.cancel, "drop": exchanger.drop}[do](message["attempt"])
