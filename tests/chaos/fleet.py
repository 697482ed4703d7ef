"""The regions of a run under fire: one place each in a WAN lab, kept alive as a service manager would keep them.

A region of several ranks runs under torchrun, which restarts its ranks; whatever ends by itself or is killed is started again
after a second, with the same command. Nothing else is ever done for a region.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

from launch.wan import HUB, Lab
from tests.e2e.cluster import children, exchanges, parent, uploaders
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
RESTART_SECONDS = 1.0
LEAVE_SECONDS = 30.0
"""How long a clean leave may take, and the end of a rank whose exchanges were killed."""
LEAVING = "asked to leave"
CLEAN, KILLED, TERMINATED = 0, -signal.SIGKILL, (-signal.SIGTERM, 128 + signal.SIGTERM)


class Unit:
    """A place and what runs there: a command that is started again whenever it has ended, unless it is asked to rest."""

    def __init__(self, lab: Lab, place: str, log: Path, command: Callable[[Unit], list[str]], ranks: int = 1) -> None:
        self.lab, self.place, self.log, self.command, self.ranks = lab, place, log, command, ranks
        self.name, self.next_name = place, place
        self.process: subprocess.Popen[bytes] | None = None
        self.start_at = time.monotonic()
        self.starts = 0
        self.frozen = False
        self.doomed = ""
        """Why its end is no surprise."""
        self.end_by: float | None = None
        """Until when that excuses it."""

    def tend(self, now: float) -> str:
        """Starts what is due, and looks after what has ended. Returns what is wrong about its end, if something is."""
        if self.process is None:
            if now >= self.start_at:
                self._start()
            return ""
        code = self.process.poll()
        if code is None:
            if self.end_by is not None and now > self.end_by:
                why, self.end_by = self.doomed, None
                self.kill()
                return f"{self.name} was {why}, and did not end within {LEAVE_SECONDS:g} s: {self.tail()}"
            return ""
        doomed = self.doomed
        self._rest(max(self.start_at, now + RESTART_SECONDS))
        if doomed == LEAVING and code != CLEAN and code not in TERMINATED:
            return f"{self.name} was asked to leave and ended with exit code {code}: {self.tail()}"
        return "" if doomed else f"{self.name} ended by itself, with exit code {code}: {self.tail()}"

    def _start(self) -> None:
        self.starts, self.name = self.starts + 1, self.next_name
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with self.log.open("ab") as file:
            file.write(f"--- start {self.starts} of {self.name}\n".encode())
            file.flush()
            self.process = self.lab.popen(
                self.place, self.command(self), stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT
            )

    def _rest(self, until: float) -> None:
        self.process, self.start_at, self.frozen, self.doomed, self.end_by = None, until, False, "", None

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def pids(self) -> list[int]:
        return [] if self.process is None else [self.process.pid, *children(self.process.pid)]

    def signal(self, number: int, pids: Sequence[int] | None = None) -> None:
        for pid in self.pids() if pids is None else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze(self, pids: Sequence[int]) -> None:
        """pids: looked up before, so that it is done at once."""
        self.frozen = True
        self.signal(signal.SIGSTOP, pids)

    def thaw(self) -> None:
        self.frozen = False
        self.signal(signal.SIGCONT)

    def kill(self, lasts: float = 0.0, pids: Sequence[int] | None = None) -> None:
        """kill -9 of all its processes at one instant; it begins again `lasts` seconds after the usual."""
        self.doomed = "killed"
        pids = self.pids() if pids is None else pids
        self.signal(signal.SIGSTOP, pids)
        self.signal(signal.SIGKILL, pids)
        self.start_at = time.monotonic() + RESTART_SECONDS + lasts

    def kill_one(self, random: Random) -> bool:
        """kill -9 of one rank. Where there is only one, of the process of its exchanges, with which the rank ends. False: there
        was none yet."""
        ranks = self.rank_pids()
        found = ranks if self.ranks > 1 else [pid for rank in ranks for pid in exchanges(rank)]
        if found and self.ranks == 1:
            self.doomed, self.end_by = "bereft of its exchanges", time.monotonic() + LEAVE_SECONDS
        return self._kill_any(random, found)

    def kill_helper(self, random: Random) -> bool:
        """kill -9 of a process that uploads checkpoints: its rank goes on. False: there was none at that moment."""
        return self._kill_any(random, [pid for rank in self.rank_pids() for pid in uploaders(rank)])

    def _kill_any(self, random: Random, pids: Sequence[int]) -> bool:
        if pids:
            self.signal(signal.SIGKILL, [random.choice(pids)])
        return bool(pids)

    def rank_pids(self) -> list[int]:
        """Its ranks: what torchrun has started, or what was started itself."""
        if self.process is None or self.ranks == 1:
            return self.pids()[:1]
        return [pid for pid in self.pids() if parent(pid) == self.process.pid]

    def leave(self, lasts: float, renamed: bool = False) -> None:
        """SIGTERM, to the ranks themselves. `lasts` seconds later it comes back, renamed: as another region."""
        assert self.process is not None
        if renamed:
            self.next_name = f"{self.place}{self.starts + 1}"
        self.doomed, self.end_by = LEAVING, time.monotonic() + LEAVE_SECONDS
        self.signal(signal.SIGTERM, self.rank_pids() or [self.process.pid])
        self.start_at = time.monotonic() + lasts

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""


class Fleet:
    """All places of a run, and its lighthouse in the hub."""

    def __init__(
        self,
        lab: Lab,
        directory: Path,
        places: Sequence[str],
        ranks: Sequence[int],
        overrides: list[str],
        module: str = "diloco.train",
    ) -> None:
        self.lab, self.directory, self.module = lab, directory, module
        os.environ.setdefault("DILOCO_SECRET", secrets.token_hex(16))  # the lab's addresses are not loopback
        self.address = f"{lab.hub}:{free_port()}"
        self.overrides = [f"run.dir={self.run}", f"elastic.lighthouse=http://{self.address}", *overrides]
        self.lighthouse = Unit(lab, HUB, directory / "lighthouse.log", self._lighthouse)
        self.units = {
            place: Unit(lab, place, directory / f"{place}.log", self._region, count)
            for place, count in zip(places, ranks, strict=True)
        }
        self.dark_until = 0.0
        """The lighthouse was down until then; a region that starts meanwhile may give up, and is started again."""

    @property
    def run(self) -> Path:
        return self.directory / "run"

    def _lighthouse(self, unit: Unit) -> list[str]:
        return [sys.executable, "-u", "-m", "elastic.lighthouse", "--bind", self.address]

    def _region(self, unit: Unit) -> list[str]:
        head = [sys.executable, "-u", "-m"]
        if unit.ranks > 1:
            head += ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--max-restarts=1000"]
            head += [f"--nproc-per-node={unit.ranks}", "-m"]
        host = f"elastic.host={self.lab.address(unit.place)}"
        return [*head, self.module, f"region.name={unit.name}", host, *self.overrides]

    def tend(self) -> list[str]:
        """Looks after everybody. Returns what is wrong."""
        now = time.monotonic()
        found = [self.lighthouse.tend(now)]
        if not self.lighthouse.up:
            self.dark_until = now + 15.0
        for unit in self.units.values():
            wrong = unit.tend(now)
            dark = now < self.dark_until and "elastic.lighthouse=" in unit.tail()[-600:]
            found.append("" if dark else wrong)
        return [text for text in found if text]
