"""The save side of tests.bench.ckpt: one region of one rank, a process of its own, which holds planes and saves them as a
trainer does. Commands are JSON lines; see tests.bench._worker."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch

from ckpt.checkpoint import MANIFEST
from ckpt.reading import READERS
from ckpt.store import Store
from diloco.averaging import Averaging
from diloco.checkpointing import CkptConfig
from diloco.checkpoints import Checkpoints, save_bits
from diloco.codec import CodecConfig, build_codec
from diloco.fold import State
from diloco.fragments import group_parameters
from diloco.parallel import Region
from diloco.planes import Planes
from diloco.shards import Shards
from elastic.memory import shared_zeros
from tests.bench._worker import obey
from tests.test_journal import Log, answer, joining, opening

RUN = "run"
FRAGMENTS = 4
LAYERS = 8
MATRIX = 512
"""Of the loop of matrix products whose rate tells what an upload costs."""


class Rows(torch.nn.Module):
    """A model whose parameters are all in as many layers as there are."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.empty(elements // LAYERS, device="meta") for _ in range(LAYERS))


def member(index: int) -> str:
    return f"m{index}_{index}"


class Saver:
    endpoint = ""

    def hold(self, url: str, elements: int, me: int, members: int) -> dict[str, Any]:
        """θ and momentum of so many elements, the same in every region."""
        torch.set_num_threads(1)
        self.store, self.me = Store(url), me
        model = Rows(elements)
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        fragments = group_parameters(shapes, {name: n for n, (name, _) in enumerate(shapes)}, count=FRAGMENTS)
        region = Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)
        self.planes = Planes(fragments, [(0, f.blocks) for f in fragments], zeros=shared_zeros)
        for f in range(FRAGMENTS):
            torch.manual_seed(f)
            for plane in self.tensors(f):
                plane.normal_()
            self.planes._set_base(f, 0)
        self.points = Checkpoints(self.store, RUN, region, Shards(model, fragments, region), CkptConfig(keep=100), {})
        self.log = Log(opening(FRAGMENTS), *(joining(member(k)) for k in range(members)))
        self.averaging = Averaging(fragments, build_codec(CodecConfig(name="int8")))
        self.matrix = torch.randn(MATRIX, MATRIX)
        return {"root": self.points.root, "bytes": sum(t.nbytes for f in range(FRAGMENTS) for t in self.tensors(f))}

    def tensors(self, f: int) -> list[torch.Tensor]:
        return [getattr(self.planes, name)[f] for name in self.planes.names]

    def memcpy(self) -> float:
        """Seconds of copying the state once, into memory that is there."""
        pairs = [(t, torch.ones_like(t)) for f in range(FRAGMENTS) for t in self.tensors(f)]
        taken = []
        for _ in range(5):
            begin = time.monotonic()
            for source, target in pairs:
                target.copy_(source)
            taken.append(time.monotonic() - begin)
        return median(taken)

    def round(self, members: int) -> int:
        """One more, so that there is something to save. Returns its seq."""
        self.log.add(self.log.round(*(answer(member(k)) for k in range(members))))
        return self.state.seq

    @property
    def state(self) -> State:
        return self.log.state

    def save(self) -> float:
        """Seconds that training waits."""
        self.began = time.monotonic()
        self.points.save(self.planes, self.state, member(self.me))
        return time.monotonic() - self.began

    def wait(self) -> float:
        """Until it is committed: seconds since it began."""
        key = f"{self.points.root}/{self.state.seq}/{MANIFEST}"
        while not self.store.exists(key):
            time.sleep(0.02)
        return time.monotonic() - self.began

    def steps(self, seconds: float) -> float:
        """Matrix products a second, for so long; 0: until what is saved is committed."""
        count, begin, looked = 0, time.monotonic(), time.monotonic()
        key = f"{self.points.root}/{self.state.seq}/{MANIFEST}"
        while True:
            self.matrix @ self.matrix
            count, now = count + 1, time.monotonic()
            if seconds and now - begin > seconds:
                return count / (now - begin)
            if not seconds and now - looked > 0.5:
                looked = now
                if self.store.exists(key):
                    return count / (now - begin)

    def raw(self, folder: str, sizes: list[int], threads: int = READERS) -> float:
        """Seconds of uploading objects of these sizes, and nothing else, from memory that is there."""
        flat = memoryview(self.planes.theta[0].numpy()).cast("B")
        data = [bytes(flat[:size]) for size in sizes[:threads]]  # as many different ones as are under way
        begin = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            for future in [
                pool.submit(self.store.write, f"{folder}/{n}", data[n % len(data)][:size])
                for n, size in enumerate(sizes)
            ]:
                future.result()
        return time.monotonic() - begin

    def bits(self) -> int:
        """Stores those of one round of every fragment, as they are before a commit. Returns their bytes."""
        total = 0
        for f, fragment in enumerate(self.planes.fragments):
            data = self.averaging.encode(f, self.planes.momentum[f])
            save_bits(self.store, RUN, f"{f:032x}", 0, fragment.blocks, data)
            total += self.store.size(f"{self.points.bits_root}/{f:032x}/0-{fragment.blocks}")
        return total


class Remote:
    """A `Saver` in a process of its own, from the outside."""

    def __init__(self, env: dict[str, str]) -> None:
        command, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        self.answer()

    def tell(self, do: str, **more: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line[0] in '{[0123456789"n':  # else it is something that the product says
                return json.loads(line)
        raise RuntimeError(f"a process of the benchmark ended with {self.process.wait()}")

    def ask(self, do: str, **more: Any) -> Any:
        self.tell(do, **more)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    obey(Saver())
