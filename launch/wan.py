"""A WAN on one machine: every region in a network namespace of its own, with links as slow, far and lossy as asked for.

    with Lab(WanConfig(up=200e6, down=200e6, rtt=0.1), ["eu", "us"]) as lab:
        server = lab.popen("eu", ["iperf3", "-s"])
        lab.cut("eu", "us")

`python -m launch.wan RUN_DIR COMMAND` talks to the lab of a run that launch.local started with +wan=NAME:

    status              the links with their rates and counters
    cut eu us           the link between two regions, or `cut eu` all links of one; `hub` is the launcher's place
    restore eu us       undoes that; `restore eu` all of one region's, `restore` all
    slow eu 0.1         a region's up and down rate, or with `slow eu us 0.1` one link, at a tenth
    unslow eu us        undoes that; `unslow eu` all of one region's, `unslow` all

Linux, root and /dev/net/tun.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diloco.errors import ConfigError
from launch import child
from launch.forwarder import kill_inhabitants
from launch.links import HUB, WanConfig
from launch.process import Job, Lines, child_command
from launch.wanconfig import load_wan, parse_wan, split_wan

__all__ = ["HUB", "Lab", "LabError", "WanConfig", "load_wan", "parse_wan", "split_wan"]

START_SECONDS = 20.0
FILE = "wan.json"
"""In the run directory of a lab that runs: the name of its socket."""


class LabError(RuntimeError):
    """The lab cannot be reached; one sentence."""


class Lab:
    """The namespaces of a run's regions and the links between them, while the context lasts. Everything in them ends with
    it, and with the thread that entered it."""

    def __init__(
        self, config: WanConfig, regions: Sequence[str], run_dir: Path | None = None, lines: Lines | None = None
    ) -> None:
        """With run_dir, `python -m launch.wan` finds it there. lines: gets what the forwarder says after its start."""
        self.config, self.regions, self.run_dir = config, list(regions), run_dir
        self._lines: Lines = queue.Queue() if lines is None else lines
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Lab:
        """Raises ConfigError if this machine cannot have one."""
        spec = json.dumps({"regions": self.regions, "wan": dataclasses.asdict(self.config)})
        self.job = Job("wan", child_command("launch.forwarder", spec), os.environ, self._lines)
        try:
            told = self._first_line()
            self._addresses: dict[str, str] = told["addresses"]
            self._namespaces: dict[str, str] = told["namespaces"]
            self._inodes = [os.stat(path).st_ino for path in self._namespaces.values()]
            self.control = Control(told["socket"])
            if self.run_dir:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                (self.run_dir / FILE).write_text(json.dumps({"socket": told["socket"]}) + "\n")
        except BaseException:
            self.job.kill()
            raise
        return self

    def _first_line(self) -> dict[str, Any]:
        deadline = time.monotonic() + START_SECONDS
        while True:
            ended = self.job.code is not None
            with suppress(queue.Empty):
                line = self._lines.get(timeout=0.1)[1]
                if not line.startswith("{"):
                    raise LabError(f"the WAN lab did not start: its forwarder said {line}")
                told = json.loads(line)
                if "error" in told:
                    raise ConfigError(told["error"])
                return told
            if ended or time.monotonic() > deadline:
                raise LabError(f"the WAN lab did not start within {START_SECONDS:g} s (exit code {self.job.code})")

    def __exit__(self, *_: object) -> None:
        """Kills what still runs in it."""
        self.control.close()
        self.job.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self.job.process.wait(timeout=15)
        self.job.kill()
        kill_inhabitants(self._inodes)  # the forwarder did, unless it was killed itself
        for process in self._started:
            process.kill()
            process.wait()
        if self.run_dir:
            (self.run_dir / FILE).unlink(missing_ok=True)

    @property
    def hub(self) -> str:
        """The host's own address in the lab: what listens there can be reached from all regions, without limits."""
        return self._addresses[HUB]

    def address(self, region: str) -> str:
        return self._addresses[region]

    def namespace(self, region: str) -> str:
        """A file that stands for the region's network namespace while the lab runs."""
        return self._namespaces[region]

    def popen(self, region: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen of a command inside the region (or the hub). It ends with the lab, and with the thread that
        called this."""
        head = [sys.executable, "-I", "-S", child.__file__, str(os.getpid())]
        place = [] if region == HUB else ["--netns", self.namespace(region)]
        process = subprocess.Popen([*head, *place, "exec", *command], **options)
        self._started.append(process)
        return process

    def cut(self, *names: str) -> None:
        """The link between two regions, or all links of one: every packet is lost, those on the way included."""
        self.control.ask("cut", names)

    def restore(self, *names: str) -> None:
        """Undoes `cut` of the same; of one region: all its cuts; without names: every cut."""
        self.control.ask("restore", names)

    def slow(self, *names_and_share: Any) -> None:
        """lab.slow("eu", 0.1): up- and downlink of a region at a share of their rates; lab.slow("eu", "us", 0.1): the
        link between two, at that share of the slower of the up- and the downlink it joins."""
        *names, share = names_and_share
        self.control.ask("slow", names, share)

    def unslow(self, *names: str) -> None:
        """Undoes `slow`, as `restore` does `cut`."""
        self.control.ask("unslow", names)

    def counters(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{from: {to: fields of launch.links.Counts}}."""
        links: dict[str, dict[str, dict[str, Any]]] = self.control.ask("status")["links"]
        return links

    def status(self) -> dict[str, Any]:
        """What launch.links.Network.status says, and addresses, seconds and cpu_seconds of the forwarder."""
        return self.control.ask("status")


class Control:
    """A connection to a forwarder. Any thread."""

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10.0)
        try:
            self._socket.connect("\0" + name)
        except OSError as error:
            self._socket.close()
            raise LabError(f"no WAN lab answers at @{name}: {error}") from error
        self._answers = self._socket.makefile("rb")

    def ask(self, do: str, names: Sequence[str] = (), share: float = 1.0) -> dict[str, Any]:
        """The lab's status after the command. Raises ConfigError if the lab refuses it, LabError if it is gone."""
        with self._lock:
            try:
                self._socket.sendall(json.dumps({"do": do, "names": list(names), "share": share}).encode() + b"\n")
                line = self._answers.readline()
            except OSError as error:
                raise LabError(f"the WAN lab has ended, or is stuck: {error}") from error
        if not line:
            raise LabError("the WAN lab has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"])
        status: dict[str, Any] = answer["ok"]
        return status

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


def find_lab(run_dir: Path) -> Control:
    """The lab of a run. Raises LabError."""
    try:
        name = json.loads((run_dir / FILE).read_text())["socket"]
        return Control(name)
    except (OSError, LabError) as error:
        raise LabError(
            f"no WAN lab runs in {run_dir}: name the run.dir of a launch.local +wan=NAME that is running"
        ) from error


# ---- command line ----


def introduce(lab: Lab) -> list[str]:
    """What the lab is like, a line a fact."""
    config, names, found = lab.config, lab.regions, []
    for name in names:
        up, down = (config.rate(name, direction) for direction in ("up", "down"))
        queues = (f"{config.limit(name, names, rate) * 1e3:.0f} ms" for rate in (up, down))
        found.append(f"{name} {lab.address(name)}: up {_mbit(up)}, down {_mbit(down)}, queues {', '.join(queues)}")
    for a, b in itertools.combinations(names, 2):
        pair = config.pair(a, b)
        times = f"{pair['rtt'] * 1e3:g} ± {pair['jitter'] * 1e3:g} ms"
        found.append(f"{a} – {b}: RTT {times}, loss {pair['loss'] * 100:g} % each way")
    found.append(f"{HUB} {lab.hub}: the host, without limits; MTU {config.mtu}")
    return [*found, f"to look and to change: python -m launch.wan {lab.run_dir} status|cut|restore|slow|unslow ..."]


def _mbit(bits: float) -> str:
    return f"{bits / 1e6:g} Mbit/s"


def describe(status: dict[str, Any]) -> str:
    """A table of the links, for people."""
    regions, links = status["regions"], status["links"]
    head = ["link", "up", "down", "RTT", "state", "sent", "delivered", "dropped", "lost", "cut"]
    rows = [head]
    for a, targets in links.items():
        for b, link in targets.items():
            if HUB in (a, b) and not (link["sent"] or link["cut"]):
                continue
            up, down = (_mbit(regions[n][d]) if n in regions else "-" for n, d in ((a, "up"), (b, "down")))
            state = "cut" if link["cut_now"] else "ok" if link["slowed"] == 1.0 else f"at {link['slowed']:g}"
            counts = [f"{link['sent']:,}", *(f"{link[k]:,}" for k in ("delivered", "dropped", "lost", "cut"))]
            rows.append([f"{a} → {b}", up, down, f"{link['rtt'] * 1e3:g} ms", state, *counts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    share = status["cpu_seconds"] / max(status["seconds"], 1e-9)
    return "\n".join([*lines, f"forwarder: {share:.0%} of one core over {status['seconds']:.0f} s; counts are packets"])


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv) or len(argv) < 2:
        print(__doc__)
        return 0 if len(argv) != 1 or argv[0].startswith("-") else 2
    run_dir, do, *names = argv
    try:
        share = _share(names) if do == "slow" else 1.0
        status = find_lab(Path(run_dir)).ask(do, names, share)
    except (ConfigError, LabError) as error:
        print(error, file=sys.stderr)
        return 2
    print(describe(status))
    return 0


def _share(names: list[str]) -> float:
    """Takes the last word off, a number."""
    try:
        return float(names.pop())
    except (IndexError, ValueError) as error:
        raise ConfigError("slow needs a share of the rate at its end: write slow eu 0.1, or slow eu us 0.1") from error


if __name__ == "__main__":
    sys.exit(main())
