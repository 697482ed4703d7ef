"""`python -m tests.bench.exchange [--only NAME ...] [--repeat N]`: one exchange over the WAN lab, as a multiple of what its
bytes need at the rate that a raw TCP stream reaches on the same link in the same run, plus one round trip. Needs root."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from elastic.plan import ownership
from elastic.security import ENVIRONMENT
from launch.wan import Lab, WanConfig
from tests.bench._table import Row, at_least, at_most, number, show

NAMES = ["eu", "us", "asia", "africa"]
RTT = 0.1
WARM = 6
"""Exchanges until the streams of four regions have found their windows, and pacing the rate; fewer regions need two or three."""
MTU = 30_000
"""Two such packets travel together, which is what a network card with segmentation offload takes from TCP at once. At 9000 the
lab's own work on packets fills the cores that four regions and their links share here; a row tells what that costs."""
USUAL_MTU = 9000


class Wan:
    """Region processes in a lab. up: Mbit/s of single regions where they differ."""

    def __init__(self, lab: Lab, names: Sequence[str], module: str = "tests.bench._region") -> None:
        self.lab, self.names = lab, names
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = {**os.environ, "OMP_NUM_THREADS": "1", ENVIRONMENT: secrets.token_hex()}
        command = [sys.executable, "-m", module]
        self.processes = [
            lab.popen(name, [*command, str(k), lab.address(name)], env=env, **pipes) for k, name in enumerate(names)
        ]
        self.endpoints = [self.answer(k)["endpoint"] for k in range(len(names))]
        self.rates: list[float] = [0.0] * len(names)

    def answer(self, k: int) -> dict[str, Any]:
        line = self.processes[k].stdout.readline()  # type: ignore[union-attr]
        assert line, f"{self.names[k]} ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, k: int, do: str, **more: Any) -> None:
        pipe = self.processes[k].stdin
        assert pipe is not None
        pipe.write(json.dumps({"do": do, **more}) + "\n")
        pipe.flush()

    def all(self, do: str, **more: Any) -> list[dict[str, Any]]:
        for k in range(len(self.names)):
            self.tell(k, do, **more)
        return [self.answer(k) for k in range(len(self.names))]

    def raw(self, source: int, target: int) -> float:
        """bytes/s of one TCP stream."""
        self.tell(target, "listen")
        port = self.answer(target)["port"]
        self.tell(source, "raw", address=self.lab.address(self.names[target]), port=port)
        return float(self.answer(source)["rate"])

    def ours(self, shares: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """One exchange; shares: by the rates seen so far unless given."""
        outcomes = self.all("ours", endpoints=self.endpoints, shares=list(shares or ownership(self.rates)))
        assert not any(outcome["reason"] for outcome in outcomes), outcomes
        self.rates = [min(outcome["up"], outcome["down"]) for outcome in outcomes]
        return outcomes

    def times(self, repeat: int, what: str = "ours", **more: Any) -> list[float]:
        runs = [self.ours(**more) if what == "ours" else self.all(what) for _ in range(repeat)]
        return [max(outcome["seconds"] for outcome in run) for run in runs]


@contextmanager
def wan(members: int, **config: Any) -> Iterator[Wan]:
    names = NAMES[:members]
    with Lab(WanConfig(**{"rtt": RTT, "mtu": MTU, **config}), names) as lab:
        yield Wan(lab, names)


def floor(nbytes: float, members: int, rate: float, rtt: float = RTT) -> float:
    """Equal ownership: 2 (K - 1) / K of a contribution each way."""
    return 2 * (members - 1) / members * nbytes / rate + rtt


def sizes(repeat: int, regions: Sequence[int] = (2, 3, 4)) -> Iterator[Row]:
    """Figure 1."""
    for members in regions:
        with wan(members) as w:
            raw = max(w.raw(0, 1) for _ in range(3))
            yield Row(f"{members} regions: raw TCP stream", raw * 8e-6, "Mbit/s")
            w.all("group", address=w.lab.address("eu"), port=29555, world=members)
            for millions, limit in ((25, 1.10), (50, 1.15)):
                nbytes = w.all("load", elements=millions * 10**6, codec="int8")[0]["bytes"]
                best = floor(nbytes, members, raw)
                name = f"{members} regions, {millions}M int8"
                cold = w.times(1)[0]
                w.times(WARM)
                ours = statistics.median(times := w.times(repeat))
                print(f"# {name}: {[f'{t / best:.3f}' for t in times]}", file=sys.stderr, flush=True)
                yield at_most(f"{name}: exchange ÷ floor", ours / best, "x", limit)
                if millions == 25:
                    yield Row(f"{name}, the first of all, which opens the links: ÷ floor", cold / best, "x")
                    time.sleep(10)
                    yield at_most(f"{name}, first after 10 s idle: ÷ floor", w.times(1)[0] / best, "x", 1.3)
                    peers = {what: statistics.median(w.times(max(repeat // 2, 3), what)) for what in ("ring", "gloo")}
                    yield at_least(f"{name}: int8 ring over Gloo ÷ ours", peers["ring"] / ours, "x", 1.4)
                    yield at_least(f"{name}: Gloo fp32 all-reduce ÷ ours", peers["gloo"] / ours, "x", 5)
                    w.all("load", elements=millions * 10**6, codec="int4")
                    w.times(WARM)
                    yield at_most(f"{name}: int4 ÷ int8", statistics.median(w.times(repeat)) / ours, "x", 0.6)


def usual_packets(repeat: int) -> Iterator[Row]:
    """Figure 1 of four regions with usual packets: what these cores make of it."""
    with wan(4, mtu=USUAL_MTU) as w:
        raw = max(w.raw(0, 1) for _ in range(3))
        nbytes = w.all("load", elements=25 * 10**6, codec="int8")[0]["bytes"]
        w.times(1 + WARM)
        seconds = statistics.median(w.times(repeat))
        yield at_most(f"4 regions, 25M int8, MTU {USUAL_MTU}: ÷ floor", seconds / floor(nbytes, 4, raw), "x", 1.10)


def slow_uplink(repeat: int) -> Iterator[Row]:
    """Figure 2."""
    with wan(3, regions={"asia": {"up": 50e6}}, mtu=USUAL_MTU) as w:
        raw = max(w.raw(2, 0) for _ in range(3))
        nbytes = w.all("load", elements=25 * 10**6, codec="int8")[0]["bytes"]
        best = nbytes / raw + RTT  # who owns nothing sends its contribution once, and receives the result once
        equal = ownership([1.0, 1.0, 1.0])
        w.times(1 + WARM, shares=equal)
        equal_time = statistics.median(w.times(max(repeat // 2, 3), shares=equal))
        w.times(1)
        chosen = statistics.median(w.times(repeat))
        print(
            f"# shares by measured rates {[f'{r * 8e-6:.0f} Mbit/s' for r in w.rates]}: {ownership(w.rates)}",
            flush=True,
        )
        yield at_most("3 regions, one at 50 Mbit/s up: ÷ floor of the best ownership", chosen / best, "x", 1.15)
        yield at_least("the same: equal ownership ÷ ours", equal_time / chosen, "x", 1.25)


def losses(repeat: int) -> Iterator[Row]:
    """Figure 3."""
    for loss, limit in ((0.001, 1.3), (0.01, 2.5)):
        with wan(2, up=50e6, down=50e6, loss=loss, mtu=1500) as w:
            raw = max(w.raw(0, 1) for _ in range(3))
            nbytes = w.all("load", elements=10 * 10**6, codec="int8")[0]["bytes"]
            w.times(1 + WARM)
            outcomes = [w.ours() for _ in range(repeat)]
            ours = statistics.median(max(o["seconds"] for o in run) for run in outcomes)
            name = f"MTU 1500, 50 Mbit/s, {loss:.1%} loss"
            yield Row(f"{name}: raw TCP stream", raw * 8e-6, "Mbit/s")
            yield at_most(f"{name}: ÷ floor", ours / floor(nbytes, 2, raw), "x", limit)
            yield Row(f"{name}: ÷ floor of the link's own rate", ours / floor(nbytes, 2, 50e6 / 8), "x")


def main() -> int:
    figures = {"sizes": sizes, "packets": usual_packets, "slow": slow_uplink, "loss": losses}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(figures), default=list(figures))
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    rows = []
    for row in (row for name in given.only for row in figures[name](given.repeat)):
        rows.append(row)
        print(f"# {row.case}: {number(row.value)} {row.unit}", file=sys.stderr, flush=True)
    return show("exchange", rows)


if __name__ == "__main__":
    sys.exit(main())
