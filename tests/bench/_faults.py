"""One fault in a run of three regions, of the product or of stock torchft, and what it cost the two that survive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ckpt.store import Store
from diloco.journal import Journal
from diloco.metrics import read_metrics
from tests.e2e.cluster import RegionProcess, kill, send
from tests.ports import free_port

REGIONS = ("asia", "eu", "us")
VICTIM, SURVIVORS = "asia", ("eu", "us")
"""The lowest member: the one that appends, and stores what is appended."""
PACE, SYNC_EVERY = 0.15, 50
"""Overlap may take a whole round, 7.5 s: longer than detection, and than regions that never wait drift apart."""
OUTAGE = 5.0
WARM, AFTER = 2, 2
"""Rounds before the fault, and that the survivors have to commit after it."""
LATE = 0.9
"""Of the way to the boundary: when a fault between syncs comes, for nearly all of its detection to be waited for."""
DEADLINE = 90.0
OVERRIDES = [
    "inner.batch=2",
    "inner.seq_len=32",
    f"outer.sync_every={SYNC_EVERY}",
    "run.rounds=1000",
    "run.report_every=1",
    "run.eval_every=0",
    "ckpt.every=1000000",
    "elastic.start_regions=3",
]


@dataclass(frozen=True)
class System:
    name: str
    module: str
    join: int
    """Milliseconds for which the lighthouse waits for those that have not asked yet."""
    more: tuple[str, ...] = ()


BLOCKING = System("blocking", "tests.bench._failing", 1000)
OVERLAPPED = System("overlapped", "tests.bench._failing", 1000, (f"outer.max_overlap_steps={SYNC_EVERY}",))
TORCHFT = System("torchft", "tests.bench._torchft", 5000)


class Run:
    """Three regions under way, and a lighthouse that can be taken away."""

    def __init__(self, system: System, directory: Path) -> None:
        self.system, self.directory, self.port = system, directory, free_port()
        self.hold = directory / "hold"
        self.regions: dict[str, RegionProcess] = {}
        self.lighthouse, self.spare = self.open_lighthouse(), self.open_lighthouse()
        serve(self.lighthouse)

    def open_lighthouse(self) -> subprocess.Popen[str]:
        """One that waits for the word."""
        command = [sys.executable, "-m", "tests.bench._lighthouse", str(self.port), str(self.system.join)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self) -> None:
        for name in REGIONS:
            arguments = [
                f"run.dir={self.directory}",
                f"elastic.lighthouse=http://127.0.0.1:{self.port}",
                *OVERRIDES,
                *self.system.more,
            ]
            env = {"PACE": str(PACE), "HOLD": str(self.hold) if name == VICTIM else ""}
            env["DILOCO_SECRET"] = ""  # the lighthouse has no tunnel: torchft's regions talk to it, too
            log = self.directory / f"{name}.log"
            self.regions[name] = RegionProcess(name, arguments, log, 1, self.system.module, env)

    @property
    def victim(self) -> RegionProcess:
        return self.regions[VICTIM]

    def records(self, name: str, kind: str) -> list[dict[str, Any]]:
        return list(read_metrics(self.directory / name / "metrics.jsonl", kind))

    def committed(self, name: str) -> list[dict[str, Any]]:
        return [record for record in self.records(name, "round") if record.get("committed", True)]

    def crashed(self) -> list[str]:
        return [name for name in SURVIVORS if self.regions[name].process.poll() is not None]

    def until(self, what: Callable[[], bool], look: Callable[[], None] = lambda: None) -> bool:
        """Whether it came to be before the deadline, and before all survivors had crashed."""
        deadline = time.monotonic() + DEADLINE
        while not what():
            if time.monotonic() > deadline or len(self.crashed()) == len(SURVIVORS):
                return False
            look()
            time.sleep(0.02)
        return True

    def demand(self, what: Callable[[], bool]) -> None:
        if not self.until(what):
            logs = "\n".join(f"--- {r.name}\n{r.text()[-3000:]}" for r in self.regions.values())
            raise RuntimeError(f"{self.system.name} did not get as far as the fault:\n{logs}")

    def close(self) -> None:
        kill(*self.regions.values())
        for process in (self.lighthouse, self.spare):
            process.kill()
            process.communicate()


def serve(lighthouse: subprocess.Popen[str]) -> None:
    """Returns when it does."""
    assert lighthouse.stdin is not None and lighthouse.stdout is not None
    lighthouse.stdin.write("\n")
    lighthouse.stdin.flush()
    assert lighthouse.stdout.readline() == "serving\n", "the lighthouse does not begin"


@contextmanager
def running(system: System, directory: Path) -> Iterator[Run]:
    directory.mkdir()
    run = Run(system, directory)
    try:
        run.start()
        yield run
    finally:
        run.close()


# ---- faults ----


def between_syncs(run: Run) -> None:
    """Returns shortly before a boundary after the warm-up."""

    def near() -> bool:
        steps = [record["step"] for record in run.records(VICTIM, "step")[-1:]]
        return len(run.committed(VICTIM)) >= WARM and bool(steps) and steps[0] % SYNC_EVERY >= LATE * SYNC_EVERY

    run.demand(near)


def mid_exchange(run: Run) -> None:
    between_syncs(run)
    run.hold.touch()
    run.demand(lambda: run.hold.with_name("hold.reached").exists())


def kill_between(run: Run) -> float:
    between_syncs(run)
    begin = time.time()
    kill(run.victim)
    return begin


def kill_mid(run: Run) -> float:
    mid_exchange(run)
    begin = time.time()
    kill(run.victim)
    return begin


def stop_mid(run: Run) -> float:
    mid_exchange(run)
    begin = time.time()
    send(signal.SIGSTOP, run.victim)
    return begin


def hang(run: Run) -> float:
    between_syncs(run)
    begin = time.time()
    os.kill(run.victim.process.pid, signal.SIGUSR1)
    return begin


def part(run: Run) -> float:
    between_syncs(run)
    begin = time.time()
    os.kill(run.victim.process.pid, signal.SIGTERM)
    return begin


def outage(run: Run) -> float:
    between_syncs(run)
    begin = time.time()
    run.lighthouse.kill()
    run.lighthouse.wait()
    run.until(lambda: time.time() - begin > OUTAGE)
    serve(run.spare)
    return begin


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Run], float]
    """Brings it about; returns when it began, in seconds since 1970."""
    detection: float
    """Seconds that survivors may take to notice, besides the exchange that they do anyway."""


FAULTS = (
    Fault("kill -9 between syncs", kill_between, 0.5),
    Fault("kill -9 mid-exchange", kill_mid, 0.5),
    Fault("SIGSTOP mid-exchange", stop_mid, 5.0),
    Fault("hang, live heartbeats", hang, 5.0),
    Fault("clean leave", part, 0.2),
    Fault("lighthouse gone 5 s", outage, 0.2),
)


# ---- what it cost ----


@dataclass(frozen=True)
class Cost:
    lost: int
    """Inner steps of both survivors that are in no round and never will be."""
    still: float
    """Seconds of the longest pause between two inner steps of a survivor, less what a step takes."""
    usual: float
    """The same of the round before the fault: one exchange, and what goes with it."""
    detected: float | None
    """Seconds until both survivors said that the victim is gone."""
    equal: bool
    """Survivors' parameters after every round that both have seen; some after the fault among them."""
    crashed: int


def play(system: System, fault: Fault, directory: Path) -> Cost:
    with running(system, directory) as run:
        begin = fault.strike(run)
        heard: dict[str, float] = {}

        def listen() -> None:
            for name in SURVIVORS:
                if name not in heard and f"peer {VICTIM}_" in run.regions[name].text():
                    heard[name] = time.time() - begin

        def gone_on() -> bool:
            return all(sum(r["time"] > begin for r in run.committed(name)) >= AFTER for name in SURVIVORS)

        run.until(gone_on, listen)
        return cost(run, begin, max(heard.values()) if len(heard) == len(SURVIVORS) else None)


def cost(run: Run, begin: float, detected: float | None) -> Cost:
    still, usual = [], []
    for name in SURVIVORS:
        steps = [record["time"] for record in run.records(name, "step")]
        if name in run.crashed():
            steps.append(time.time())  # it stands still for good
        warm = run.committed(name)[WARM - 2]["time"]
        step = median(b - a for a, b in pairwise(steps))
        usual.append(max(b - a for a, b in pairwise(steps) if warm < a and b <= begin) - step)
        still.append(max(b - a for a, b in pairwise(steps) if b > begin) - step)
    lost = sum(lost_by_torchft(run, n) if run.system is TORCHFT else lost_by_us(run, n) for n in SURVIVORS)
    return Cost(lost, max(still), max(usual), detected, digests_equal(run, begin), len(run.crashed()))


def lost_by_us(run: Run, name: str) -> int:
    """Steps up to the newest snapshot that was used, less those that the journal's rounds hold."""
    (member,) = [record["member"] for record in run.records(name, "run")]
    mine = [record for record in run.records(name, "round") if member in record["members"]]
    entries = [json.loads(data) for data in Journal(Store(str(run.directory / "store"))).read()]
    answers = [a for e in entries if e["kind"] == "round" and e["seq"] <= mine[-1]["seq"] for a in e["answers"]]
    per_step = run.records(name, "run")[0]["tokens_per_step"]
    committed = sum(answer["tokens"] for answer in answers if answer["member"] == member)
    return mine[-1]["step"] - mine[-1]["overlap"] - committed // per_step


def lost_by_torchft(run: Run, name: str) -> int:
    """A sync that is not committed takes its steps with it, a crash those since the last one."""
    discarded = sum(SYNC_EVERY for record in run.records(name, "round") if not record["committed"])
    since = run.records(name, "step")[-1]["step"] % SYNC_EVERY if name in run.crashed() else 0
    return discarded + since


def digests_equal(run: Run, begin: float) -> bool:
    """Also False if no round followed."""
    one, other = ({r["seq"]: r["digest"] for r in run.committed(name)} for name in SURVIVORS)
    both = one.keys() & other.keys()
    after = [r["seq"] for r in run.committed(SURVIVORS[0]) if r["time"] > begin]
    return all(one[seq] == other[seq] for seq in both) and bool(both & set(after))
