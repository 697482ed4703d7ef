"""Prepared folders without text: any tokens, in any shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ckpt.store import Store
from diloco.corpus.folder import ENDINGS, SPLITS, ChunkSums, Index, Split

BYTES_PER_TOKEN = 4


def write_folder(
    folder: Path,
    shards: Mapping[str, Sequence[np.ndarray]],
    vocab: int = 50257,
    bytes_per_token: int = BYTES_PER_TOKEN,
    end: int | None = None,
) -> Path:
    """shards: of each split, arrays of one dtype; each is one document."""
    folder.mkdir(parents=True)
    splits = {
        name: Split.of([_shard(folder / f"{name}-{k:05d}", array, bytes_per_token) for k, array in enumerate(arrays)])
        for name, arrays in shards.items()
    }
    dtype = shards[SPLITS[0]][0].dtype.str.replace("|", "<")
    (folder / "index.json").write_bytes(Index(dtype, vocab, end, {}, 0.0, 0, 0, **splits).encode())
    return folder


def _shard(path: Path, tokens: np.ndarray, bytes_per_token: int) -> dict[str, object]:
    data, ends, sums = tokens.tobytes(), np.asarray([len(tokens)], dtype="<u8").tobytes(), ChunkSums()
    sums.update(data)
    checksum = sums.hexdigest()
    for ending, content in {"tokens": data, "sums": sums.sums, "ends": ends}.items():
        path.with_suffix(f".{ending}").write_bytes(content)
    return {
        "names": path.name,
        "tokens": len(tokens),
        "documents": 1,
        "bytes": bytes_per_token * len(tokens),
        "sha256": checksum,
        "ends_sha256": hashlib.sha256(ends).hexdigest(),
    }


def texts_of(folder: Path, split: str) -> list[bytes]:
    """The documents of a folder that was made of bytes, by its shards' own ends."""
    found: list[bytes] = []
    for ends in sorted(folder.glob(f"{split}-*.ends")):
        data, begin = ends.with_suffix(".tokens").read_bytes(), 0
        for end in np.fromfile(ends, dtype="<u8"):
            assert data[end - 1] == 0
            found.append(data[begin : end - 1])
            begin = int(end)
        assert begin == len(data)
    return found


def upload(folder: Path, url: str) -> str:
    store = Store(url)
    for path in sorted(folder.iterdir()):
        store.write(path.name, path.read_bytes())
    return url


BIG = """
import resource, sys, time
from diloco.corpus.source import prepared
from diloco.data import DataConfig, Dataset
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
prepared(DataConfig(path=sys.argv[2])).digest  # what is imported and compiled once
before, begin = memory(), time.process_time()
data = Dataset(prepared(DataConfig(path=sys.argv[1])), 2048, 0.0, 0)
sample = data.sample(0)
print(time.process_time() - begin, memory() - before, data.train_windows)
"""
"""Says what opening the folder at argv[1] takes, once that at argv[2] was opened: CPU seconds, bytes, samples."""


def big_index(folder: Path) -> None:
    """`big`: 4 TB of tokens, 10^9 samples of 2,048, in 4,096 sparse shards; `small`: one of these."""
    shards, tokens = 4096, 10**9 * 2048 // 4096 + 1
    checksum = hashlib.sha256(b"").hexdigest()
    for name, count in (("big", shards), ("small", 1)):
        (folder / name).mkdir()
        names = [f"train-{k:05d}" for k in range(count)]
        row = {"tokens": tokens, "documents": 10**6, "bytes": 4 * tokens, "sha256": checksum, "ends_sha256": checksum}
        split = Split.of([{"names": n, **row} for n in names])
        (folder / name / "index.json").write_bytes(Index("<u2", 50257, 50256, {}, 0.0, 0, 0, split).encode())
        for shard in names:
            for ending in ENDINGS:
                (folder / name / f"{shard}.{ending}").touch()
            os.truncate(folder / name / f"{shard}.tokens", 2 * tokens)
