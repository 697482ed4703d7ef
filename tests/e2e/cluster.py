"""Real regions for tests: processes started, watched with deadlines, and ended, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpt.store import Store
from diloco.fold import State
from diloco.journal import Journal
from tests.ports import free_port

SHORT = [
    "inner.batch=4",
    "inner.seq_len=32",
    "run.report_every=4",
    "run.eval_sequences=4",
    "outer.lr=0.9",
    "outer.momentum=0.3",
    "ckpt.make_up_after=1",
]
SMALL = ["model.args={vocab: 256, dim: 64, layers: 4, heads: 4, kv_heads: 2, ffn: 128, tied: true}", *SHORT]
"""Overrides for a run that costs milliseconds a step: 118,016 parameters, 2 blocks."""

SLOW_STEPS = "model.loss=tests.e2e.own_model.slow_loss"
"""A save is done before the next round is, or nearly always."""


@contextmanager
def gateway(port: int, *options: str) -> Iterator[str]:
    """A gateway in a process of its own; its address."""
    command = [sys.executable, "-m", "elastic.gateway", "--bind", f"127.0.0.1:{port}", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[1]
    finally:
        process.kill()
        process.wait()


class RegionProcess:
    """One region: `python -m MODULE` for one rank, torchrun for more."""

    def __init__(self, name: str, arguments: list[str], log: Path, nproc: int, module: str, env: dict[str, str]):
        self.name, self.log = name, log
        head = [sys.executable, "-m"]
        if nproc > 1:
            head += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), "-m"]
        full = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*head, module, f"region.name={name}", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=full,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        """To every process of the region."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """The exit code. Raises AssertionError with the region's output when the deadline passes."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end in {timeout} s:\n{self.text()[-3000:]}") from None


def send(number: int, *regions: RegionProcess) -> None:
    """To every process of the regions. torchrun's workers are in sessions of their own and are found by their parent."""
    signal_all(number, pids(*regions))


def pids(*regions: RegionProcess) -> list[int]:
    return [pid for region in regions for pid in (region.process.pid, *children(region.process.pid))]


def signal_all(number: int, found: list[int]) -> None:
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(*regions: RegionProcess, spare: str = "") -> None:
    """kill -9 of whole regions at one instant: all are stopped before the first one is killed, so that nobody notices. spare:
    those stay that have this in their command line."""
    send(signal.SIGSTOP, *regions)
    found = pids(*regions)
    spared = [pid for pid in found if spare and spare.encode() in command(pid)]
    signal_all(signal.SIGKILL, [pid for pid in found if pid not in spared])
    signal_all(signal.SIGCONT, spared)
    for region in regions:
        region.process.wait()


def children(pid: int) -> list[int]:
    """Processes below `pid`, from /proc."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def parent(pid: int) -> int:
    """0 if it has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def command(pid: int) -> bytes:
    """What a process runs, its arguments apart by zeros; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def exchanges(rank: int) -> list[int]:
    """The process of a rank's exchanges: a copy of it, unlike the others that it has started. Empty if it has none yet."""
    mine = command(rank)
    return [pid for pid in children(rank) if mine and parent(pid) == rank and command(pid) == mine]


def uploaders(pid: int) -> list[int]:
    """The processes that upload checkpoints, of a rank or of a region's torchrun. Ranks survive their end."""
    return [each for each in children(pid) if b"\0ckpt.uploader\0" in command(each)]


class Cluster:
    """Regions of one run in a directory, with a lighthouse port of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.regions: list[RegionProcess] = []

    @property
    def run(self) -> Path:
        return self.directory / "run"

    def start(
        self,
        name: str,
        *overrides: str,
        nproc: int = 1,
        module: str = "diloco.train",
        env: dict[str, str] | None = None,
        base: list[str] = SMALL,
    ) -> RegionProcess:
        arguments = [
            f"run.dir={self.run}",
            f"elastic.lighthouse=http://127.0.0.1:{self.port}",
            "ckpt.linger=0",  # a machine that is gone, memory and all, unless a test says otherwise
            *base,
            *overrides,
        ]
        log = self.directory / f"{name}-{len(self.regions)}.log"
        region = RegionProcess(name, arguments, log, nproc, module, env or {})
        self.regions.append(region)
        return region

    def state(self) -> State | None:
        """The run's state, folded from its journal now."""
        journal = Journal(Store(str(self.run / "store")))
        journal.read()
        return journal.state

    def until(self, what: Callable[[], object], timeout: float = 300) -> None:
        """Polls until `what()` is true; fails with every region's output at the deadline, or when a region failed."""
        deadline = time.monotonic() + timeout
        while not what():
            assert time.monotonic() < deadline, self.logs()
            assert all(r.process.poll() in (None, 0, -9) for r in self.regions), self.logs()
            time.sleep(0.05)

    def kill_when(self, what: Callable[[], object], *regions: RegionProcess, spare: str = "") -> None:
        """kill -9 of the regions at a moment at which `what()` holds: they are stopped to look. spare: as `kill` has it."""

        def holds() -> bool:
            if what():
                send(signal.SIGSTOP, *regions)
                if what():
                    return True
                send(signal.SIGCONT, *regions)
            return False

        self.until(holds)
        kill(*regions, spare=spare)

    def inner_states_saved(self, *regions: str) -> bool:
        """Every region has stored its own planes for the newest committed round."""
        state = self.state()
        assert state is not None
        seq = max(fragment.base for fragment in state.fragments)
        return all((self.run / f"store/regions/{state.run}/{r}/{seq}/manifest.json").exists() for r in regions)

    def rounds(self) -> int:
        state = self.state()
        return 0 if state is None else state.rounds

    def records(self, region: str, kind: str) -> list[dict]:
        path = self.run / region / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def logs(self) -> str:
        return "\n".join(f"--- {r.name} ({r.process.poll()})\n{r.text()[-3000:]}" for r in self.regions)

    def finish(self, timeout: float = 300) -> None:
        """Waits until every region has ended by itself, all with exit code 0 but the killed ones."""
        codes = {r.name: r.wait(timeout) for r in self.regions}
        assert all(code in (0, -9) for code in codes.values()), self.logs()

    def settle(self) -> None:
        """Waits for the uploaders, which clean up when their regions have ended."""
        store = str(self.run).encode()

        def working() -> list[str]:
            commands = {pid: command(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()}
            return [pid for pid, line in commands.items() if b"ckpt.uploader" in line and store in line]

        self.until(lambda: not working())

    def close(self) -> None:
        kill(*self.regions)
