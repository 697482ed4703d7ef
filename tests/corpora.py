"""Prepared folders without text: any tokens, in any shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ckpt.store import Store
from diloco.corpus.folder import SPLITS, ChunkSums, Index, Split

BYTES_PER_TOKEN = 4


def write_folder(
    folder: Path, shards: Mapping[str, Sequence[np.ndarray]], vocab: int = 50257, bytes_per_token: int = BYTES_PER_TOKEN
) -> Path:
    """shards: of each split, arrays of one dtype; each is one document."""
    folder.mkdir(parents=True)
    splits = {
        name: Split.of([_shard(folder / f"{name}-{k:05d}", array, bytes_per_token) for k, array in enumerate(arrays)])
        for name, arrays in shards.items()
    }
    dtype = shards[SPLITS[0]][0].dtype.str
    (folder / "index.json").write_bytes(Index(dtype, vocab, None, {}, 0.0, 0, 0, **splits).encode())
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


def upload(folder: Path, url: str) -> str:
    store = Store(url)
    for path in sorted(folder.iterdir()):
        store.write(path.name, path.read_bytes())
    return url
