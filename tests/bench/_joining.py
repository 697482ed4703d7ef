"""One side of the join benchmark, a process in a namespace of the WAN lab: a member that holds a state and serves it, or the
joiner that fetches it. Nodes, planes, serving, survey and fetch are the product's."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from diloco.averaging import Averaging
from diloco.bits import from_members, serve_blocks
from diloco.codec import CodecConfig, build_codec
from diloco.fetching import Fetch
from diloco.fold import FragmentState
from diloco.fragments import Fragment, Slot, digest
from diloco.parallel import Region
from diloco.planes import Bits, Planes
from elastic import recovery
from elastic.lighthouse import ElasticConfig
from elastic.recovery import Donor
from tests.bench import _region
from tests.bench._worker import cpu_seconds, obey

TICK = 0.005
"""Seconds between two looks at whether a donor's loop could go on."""
BASE = 1


class Site(_region.Region):
    def hold(self, elements: int, seed: int | None) -> dict[str, Any]:
        """seed: of the state that a donor has; None: an empty one, to be fetched."""
        self.fragment = Fragment(0, (Slot("w", (elements,), 0),))
        self.averaging = Averaging([self.fragment], build_codec(CodecConfig(name="int8")))
        self.planes = Planes([self.fragment], [(0, self.fragment.blocks)])
        self.waits: list[float] = []
        # What these parts of the product need of a Trainer.
        self.trainer: Any = SimpleNamespace(planes=self.planes, fragments=[self.fragment], averaging=self.averaging)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            self.planes.load(0, BASE, *(torch.randn(elements, generator=generator) for _ in self.planes.names))
            # Any thread: what the main loop computes once a round to answer with.
            digests = [self.planes.digests(name, 0) for name in self.planes.names]
            self.encoded = self.averaging.encode(0, torch.randn(elements, generator=generator))
            recovery.serve(self.node, partial(serve_blocks, self.trainer), ElasticConfig().congestion)
            threading.Thread(target=self._loop, daemon=True).start()
            return {"roots": [digest(digests[0]), digest(digest(digests[1]).encode())]}
        return {}

    def _loop(self) -> None:
        """What a main loop needs of the planes: the interpreter and their lock."""
        while True:
            begin = time.monotonic()
            self.planes.read(0, 0, 0)
            time.sleep(TICK)
            self.waits.append(time.monotonic() - begin - TICK)

    def spent(self) -> dict[str, float]:
        """CPU-seconds so far; seconds that the loop was held up since the last call, 99 % of the time and at most."""
        waits, self.waits = sorted(self.waits) or [0.0], []
        return {"cpu": cpu_seconds(), "usual": waits[len(waits) * 99 // 100], "longest": waits[-1]}

    def commit(self, seq: int) -> dict[str, Any]:
        """A round of the same pseudo-gradient everywhere."""
        begin = time.monotonic()
        gradients = self.averaging.decode_runs(0, 0, self.fragment.blocks, self.encoded)
        self.planes.step(seq, Bits(0, 1, self.encoded), gradients, 0.7, 0.9)
        seconds = time.monotonic() - begin
        return {"digest": digest(self.planes.digests("theta", 0)), "seconds": seconds}

    def fetch(self, donors: list[list[str]], journal: str) -> dict[str, Any]:
        """journal: a file with the rounds so far, one a line. Then the replay of what was committed meanwhile."""
        into = {0: [self.planes.theta[0], self.planes.momentum[0]]}
        self.planes.forget(0)

        def look() -> tuple[list[bytes], Any]:
            lines = Path(journal).read_text().splitlines()
            base = json.loads(lines[-1])["seq"] if lines else BASE
            entries = [b'{"kind":"open"}', b'{"kind":"join"}', *(line.encode() for line in lines)]
            return entries, SimpleNamespace(fragments=[FragmentState(base)])

        fetch = Fetch(self.node, Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None), self.planes, into)
        begin = time.monotonic()
        fetch.run([Donor(member, (endpoint,)) for member, endpoint in donors], look)
        seconds = time.monotonic() - begin
        self.planes.arrived(0, fetch.bases[0][0], fetch.held[0])
        return {"seconds": seconds, "served": dict(fetch.served), "bases": fetch.bases[0]}

    def replay(self, donors: list[list[str]], seq: int) -> dict[str, Any]:
        """The bits of round `seq` from all members, and the outer step where it is missing."""
        begin = time.monotonic()
        members = {member: SimpleNamespace(id=member, endpoints=(endpoint,)) for member, endpoint in donors}
        self.trainer.state, self.trainer.links = (
            SimpleNamespace(members=members),
            SimpleNamespace(node=self.node, member=""),
        )
        blocks = self.fragment.blocks
        data = from_members(self.trainer, {"fragment": 0, "seq": seq, "answers": [None]}, 0, blocks)
        self.planes.step(seq, Bits(0, 1, data), self.averaging.decode_runs(0, 0, blocks, data), 0.7, 0.9)
        seconds = time.monotonic() - begin
        return {"seconds": seconds, "digest": digest(self.planes.digests("theta", 0))}


def main() -> None:
    torch.set_num_threads(1)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    obey(Site(int(sys.argv[1]), sys.argv[2]))


if __name__ == "__main__":
    main()
