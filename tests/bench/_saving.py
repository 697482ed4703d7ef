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

from ckpt.store import Store
from ckpt.uploader import UPLOADS
from diloco.averaging import Averaging
from diloco.checkpointing import CkptConfig
from diloco.checkpoints import MOMENTS, Checkpoints, save_bits
from diloco.codec import CodecConfig, build_codec
from diloco.fragments import group_parameters
from diloco.inner import Inner, InnerConfig
from diloco.parallel import Region
from diloco.planes import Planes
from diloco.saving import Among, Saver
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
        self.layers = torch.nn.ParameterList(torch.empty(elements // LAYERS) for _ in range(LAYERS))


def member(index: int) -> str:
    return f"m{index}_{index}"


class Bench:
    """Θ, momentum, local parameters and AdamW's moments of one rank, and the product's saver of it."""

    endpoint = ""

    def hold(self, url: str, elements: int, me: int, members: int) -> dict[str, Any]:
        """elements: of each of the planes, the same numbers in every region."""
        torch.set_num_threads(1)
        self.store, self.members = Store(url), tuple(member(k) for k in range(members))
        model = Rows(elements)
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        fragments = group_parameters(shapes, {name: n for n, (name, _) in enumerate(shapes)}, count=FRAGMENTS)
        region = Region(0, 1, 1, 1, 0, 0, torch.device("cpu"), None)
        self.planes = Planes(fragments, [(0, f.blocks) for f in fragments], zeros=shared_zeros)
        inner = Inner(InnerConfig(batch=1), model, lambda model, tokens: (model, tokens), region)
        inner.materialise()
        self.state = list(model.parameters())
        self.state += [inner.optimizer.state[p][name] for p in model.parameters() for name in MOMENTS]
        for f in range(FRAGMENTS):
            self.state += [getattr(self.planes, name)[f] for name in self.planes.names]
            self.planes._set_base(f, 0)
        torch.manual_seed(0)
        with torch.no_grad():
            for tensor in self.state:
                tensor.normal_()
        self.points = Checkpoints(self.store, RUN, region, Shards(model, fragments, region), CkptConfig(keep=100), {})
        self.saver = Saver(self.points, self.planes, inner, member(me), f"m{me}")
        self.log = Log(opening(FRAGMENTS), *(joining(name) for name in self.members))
        self.averaging = Averaging(fragments, build_codec(CodecConfig(name="int8")))
        self.matrix = torch.randn(MATRIX, MATRIX)
        common = sum(t.nbytes for name in self.planes.names for t in getattr(self.planes, name))
        return {"bytes": sum(t.nbytes for t in self.state), "common": common}

    def memcpy(self) -> dict[str, Any]:
        """Seconds of copying the state once, into memory that is there."""
        pairs = [(t.detach(), torch.ones_like(t)) for t in self.state]
        taken = []
        for _ in range(5):
            begin = time.monotonic()
            for source, target in pairs:
                target.detach().copy_(source)
            taken.append(time.monotonic() - begin)
        return {"seconds": median(taken)}

    def save(self) -> dict[str, Any]:
        """After one more round. Seconds that training waits."""
        self.log.add(self.log.round(*(answer(name) for name in self.members)))
        begin = time.monotonic()
        assert self.saver.free()
        self.saver.save(self.log.state, Among(self.members), {}, {})
        return {"seconds": time.monotonic() - begin}

    def wait(self) -> dict[str, Any]:
        """Until what is saved is committed, all of it: seconds since the save, and the prefixes."""
        while self.saver.uploads.busy():
            self.saver.uploads.wait(0.5)
        answers = [each for each in self.saver.answers() if "prefix" in each]
        assert len(answers) == 2 and all(each["kind"] == "stored" for each in answers), answers
        return {"seconds": max(a["seconds"] for a in answers), "prefixes": sorted(a["prefix"] for a in answers)}

    def steps(self, seconds: float) -> dict[str, Any]:
        """Matrix products a second, for so long; 0: until what is saved is committed."""
        count, begin = 0, time.monotonic()
        while self.saver.uploads.busy() if not seconds else time.monotonic() < begin + seconds:
            self.matrix @ self.matrix
            count += 1
        return {"rate": count / (time.monotonic() - begin)}

    def raw(self, folder: str, sizes: list[int]) -> dict[str, Any]:
        """Seconds of uploading objects of these sizes and nothing else, from memory that is there, as many at a time as the
        uploader does."""
        flat = memoryview(self.planes.theta[0].numpy()).cast("B")
        data = [bytes(flat[:size]) for size in sizes[:UPLOADS]]
        work = [(f"{folder}/{n}", data[n % len(data)][:size]) for n, size in enumerate(sizes)]
        begin = time.monotonic()
        with ThreadPoolExecutor(UPLOADS) as pool:
            for _ in pool.map(lambda one: self.store.create(*one), work):
                pass
        return {"seconds": time.monotonic() - begin}

    def bits(self) -> dict[str, Any]:
        """Stores those of one round of every fragment, as they are before a commit."""
        total = 0
        for f, fragment in enumerate(self.planes.fragments):
            data = self.averaging.encode(f, self.planes.momentum[f])
            save_bits(self.store, RUN, f"{f:032x}", 0, fragment.blocks, data)
            total += self.store.size(f"{self.points.bits_root}/{f:032x}/0-{fragment.blocks}")
        return {"bytes": total}


class Remote:
    """A `Bench` in a process of its own, from the outside."""

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
            if line.startswith("{"):  # else it is something that the product says
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
    obey(Bench())
