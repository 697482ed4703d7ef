"""The load side of tests.bench.ckpt, a process of its own.

`python -m tests.bench._loading URL ROOT REPEAT` loads the newest checkpoint of ROOT in the store at URL as often as told, and
reads the same ranges of the same objects as often without looking at what comes: what verification costs. Prints the seconds
as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

import torch

from ckpt import format
from ckpt.checkpoint import shard_key
from ckpt.format import CHUNK
from ckpt.reading import Reader, Want, newest, run_all
from ckpt.store import Store


def outputs(manifest: dict[str, Any], reader: Reader) -> list[Want]:
    """All of it, in memory that is there already."""
    names = sorted({(span.plane, span.fragment) for span in format.spans_of(manifest)})
    return [Want(plane, f, 0, torch.ones(reader.elements(plane, f))) for plane, f in names]


def verified(store: Store, root: str, wants: list[Want]) -> float:
    """From finding it to having it."""
    begin = time.monotonic()
    Reader(store, next(newest(store, root))).read_into(wants)
    return time.monotonic() - begin


def unverified(store: Store, root: str, out: memoryview) -> float:
    """As many threads, the same requests, and nothing looks at what they bring."""
    begin = time.monotonic()
    manifest, tasks, at = next(newest(store, root)), list[tuple[str, int, memoryview]](), 0
    for shard in format.shards_of(manifest):
        for first in range(0, shard.bytes, CHUNK):
            length = min(CHUNK, shard.bytes - first)
            tasks.append((shard_key(manifest["prefix"], shard.name), first, out[at : at + length]))
            at += length
    run_all(partial(_copy, store), tasks)
    return time.monotonic() - begin


def _copy(store: Store, key: str, first: int, out: memoryview) -> None:
    out[:] = store.view(key, first, first + len(out))


def main(url: str, root: str, repeat: int) -> None:
    store = Store(url)
    manifest = next(newest(store, root))
    reader = Reader(store, manifest)
    wants = outputs(manifest, reader)
    total = sum(shard.bytes for shard in format.shards_of(manifest))
    out = memoryview(torch.ones(total, dtype=torch.uint8).numpy()).cast("B")
    found: dict[str, list[float]] = {"verified": [], "unverified": []}
    for _ in range(repeat):
        found["unverified"].append(unverified(store, root, out))
        found["verified"].append(verified(store, root, wants))
    print(json.dumps({**found, "bytes": total}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
