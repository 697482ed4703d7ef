"""Real inner steps on these cores while an exchange fills the link: the second half of tests.bench.overlap.

Four pieces follow each other, again and again: steps alone; with an exchange as the product does it, in a process of its own;
with the same exchange of another rank, in the place of the first; and alone once more. What the third costs is the cores.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any

from launch.wan import Lab, WanConfig
from tests.bench._table import Row

ELEMENTS = 20_000_000
ATTEMPTS = 3
"""Exchanges in a piece."""
REPEAT = 5
MODELS = {
    "tiny, 512 tokens": ["model=tiny", "inner.batch=8", "inner.seq_len=64"],
    "22.7M, 256 tokens": [
        "model.args={vocab: 256, dim: 512, layers: 8, heads: 8, kv_heads: 2, ffn: 1408, tied: true}",
        "inner.batch=2",
        "inner.seq_len=128",
    ],
}


class Remote:
    """A `_stepping` process."""

    def __init__(self, lab: Lab, region: str, me: int) -> None:
        command = [sys.executable, "-m", "tests.bench._stepping", str(me), lab.address(region), str(ELEMENTS)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = lab.popen(region, command, stdin=pipe, stdout=pipe, text=True, env=env)
        self.member = [me, self.answer()["endpoint"]]

    def tell(self, do: str, **more: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        self.tell(do, **more)
        return self.answer()


class Trio:
    """`stepping` and `other` in one region, `peer` in the other one."""

    def __init__(self, lab: Lab) -> None:
        self.stepping, self.other = Remote(lab, "eu", 0), Remote(lab, "eu", 2)
        self.peer = Remote(lab, "us", 1)
        self.attempt = itertools.count(1)

    def names(self) -> list[str]:
        return [str(next(self.attempt)) for _ in range(ATTEMPTS)]

    def inside(self) -> dict[str, Any]:
        names, members = self.names(), [self.stepping.member, self.peer.member]
        self.peer.tell("exchanges", members=members, names=names)
        found = self.stepping.ask("both", members=members, names=names)
        return {**found, "peer": self.peer.answer()}

    def beside(self, seconds: float) -> dict[str, Any]:
        names, members = self.names(), [self.other.member, self.peer.member]
        self.peer.tell("exchanges", members=members, names=names)
        self.other.tell("exchanges", members=members, names=names)
        found = self.stepping.ask("steps", seconds=seconds)
        return {**found, "exchange": self.other.answer(), "peer": self.peer.answer()}

    def alone(self) -> float:
        """Steps a second."""
        return float(self.stepping.ask("steps", seconds=2.0)["rate"])


def slowdown(wan: dict[str, Any]) -> Iterator[Row]:
    with Lab(WanConfig(**wan), ("eu", "us")) as lab:
        trio = Trio(lab)
        for name, overrides in MODELS.items():
            print(f"slowdown: {name} …", flush=True)
            trio.stepping.ask("build", overrides=overrides)
            trio.inside(), trio.beside(0.1)  # the first ones open links
            yield from pieces(trio, name)


def pieces(trio: Trio, name: str) -> Iterator[Row]:
    alone, inside, beside, rates = list[float](), list[float](), list[float](), list[list[float]]()
    costs = list[float]()
    for _ in range(REPEAT):
        before, a = trio.alone(), trio.inside()
        middle, b = trio.alone(), trio.beside(0.9 * a["exchange"]["seconds"])
        after = trio.alone()
        alone += [before, middle]
        inside.append(2 * a["rate"] / (before + middle))
        beside.append(2 * b["rate"] / (middle + after))
        rates.append([8e-6 * x["exchange"]["sent"] / x["exchange"]["seconds"] for x in (a, b)])
        costs.append(1e9 * b["exchange"]["cpu"] / b["exchange"]["sent"])
    yield Row(f"{name}: steps alone", median(alone), "1/s")
    yield Row(f"{name}: with an exchange", 100 * median(inside), "%")
    yield Row(f"{name}: with an exchange of another rank", 100 * median(beside), "%")
    for case, which in (("", 0), (" of another rank", 1)):
        yield Row(f"{name}: meanwhile sent by the exchange{case}", median(r[which] for r in rates), "Mbit/s")
    yield Row(f"{name}: the exchange's own CPU per GB sent, and as much received", median(costs), "s/GB")
