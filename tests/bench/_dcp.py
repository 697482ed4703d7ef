"""torch.distributed.checkpoint on the same state and server, a process of its own: what tests.bench.ckpt compares with.

`python -m tests.bench._dcp URL ELEMENTS REPEAT` saves fp32 tensors of ELEMENTS in all with FsspecWriter, blocking, as often as
told, and loads the last with FsspecReader as often. Prints the seconds as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

TENSOR = 8_000_000
"""Elements of one, the last one's may be fewer: a matrix of a model of some hundred million parameters."""


def state(elements: int, fill: bool) -> dict[str, torch.Tensor]:
    sizes = [min(TENSOR, elements - at) for at in range(0, elements, TENSOR)]
    return {f"layers.{n}.weight": (torch.randn if fill else torch.zeros)(size) for n, size in enumerate(sizes)}


def save(url: str, elements: int, repeat: int) -> list[float]:
    tensors, taken = state(elements, True), []
    for turn in range(repeat):
        begin = time.monotonic()
        checkpoint.save(tensors, storage_writer=FsspecWriter(f"{url}/{turn}"), no_dist=True)
        taken.append(time.monotonic() - begin)
    return taken


def load(url: str, elements: int, repeat: int) -> list[float]:
    tensors, taken = state(elements, False), []
    for _ in range(repeat):
        begin = time.monotonic()
        checkpoint.load(tensors, storage_reader=FsspecReader(f"{url}/{repeat - 1}"), no_dist=True)
        taken.append(time.monotonic() - begin)
    assert all(tensor.any() for tensor in tensors.values()), "it loaded nothing"
    return taken


def main(url: str, elements: int, repeat: int) -> None:
    warnings.simplefilter("ignore")
    print(json.dumps({"save": save(url, elements, repeat), "load": load(url, elements, repeat)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
