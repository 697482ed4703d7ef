"""Flat-space checkpoints: safetensors shards, then one JSON manifest that makes them a checkpoint.

A checkpoint holds *planes* ("theta", "momentum", "x", "exp_avg", ...), each cut into *fragments*, each a flat
fp32 vector of which every rank writes the contiguous element range [start, stop) that it holds. The layout of
ranks is nowhere in it, so any other mesh reads any range back. Objects, all created and never overwritten:

    <prefix>/<shard name>.safetensors     tensors "plane/fragment/start"
    <prefix>/manifest.json                written last: without it there is no checkpoint

Whatever is damaged raises DamagedError; a store that fails raises StoreError, which is not the same: an
outage must not make a run fall back to an older checkpoint. Digests find damage; they do not authenticate a
writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ckpt import format
from ckpt.format import FormatError, Piece, require
from ckpt.store import Store, StoreError

__all__ = ["MANIFEST", "DamagedError", "Piece", "commit_manifest", "load_manifest", "naming", "save_shard", "shard_key"]

MANIFEST = "manifest.json"


class DamagedError(ValueError):
    """A checkpoint that must not be loaded; one sentence that names the object and what is wrong."""


@contextmanager
def naming(store: Store, key: str) -> Iterator[None]:
    """Turn a finding about the object at `key` into a whole sentence."""
    try:
        yield
    except FormatError as error:
        raise DamagedError(f"{store.url}: {key} is damaged: it {error}") from error


def save_shard(store: Store, prefix: str, shard_name: str, pieces: list[Piece]) -> dict[str, Any]:
    """Write one rank's pieces as `<prefix>/<shard_name>.safetensors` and return its record for the manifest.

    The record is that of format.shard_record; empty pieces are left out.
    Saving the same bytes again is fine; StoreError if the shard exists with others, ValueError for a bad name
    or piece.
    """
    if not format.is_name(shard_name):
        raise ValueError(f"shard name {shard_name!r} is not made of letters, digits and _.=+@-")
    full = [piece for piece in pieces if piece.stop != piece.start]
    data = format.encode_shard(full)
    key = shard_key(prefix, shard_name)
    if not store.create(key, data):
        raise StoreError(f"{store.url}: {key} exists with other contents: save under another name")
    return format.shard_record(shard_name, data, full)


def commit_manifest(store: Store, prefix: str, body: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Create `<prefix>/manifest.json`, which makes the shards a checkpoint. Call it when all are stored.

    `body` is anything JSON. Returns what load_manifest will return: the body's keys and `format`, `shards`,
    `digest` (sha256 of the rest, hex) and `prefix` (where it was found; not stored). DamagedError if the
    shards' pieces overlap or leave a gap, StoreError if another manifest is there, ValueError if the body
    uses one of these keys.
    """
    key = f"{prefix}/{MANIFEST}"
    manifest = format.seal(body, shards)
    with naming(store, key):
        format.spans_of(manifest)
    if not store.create(key, format.encode_json(manifest)):
        raise StoreError(f"{store.url}: {key} exists with other contents: a checkpoint is never overwritten")
    return {**manifest, "prefix": prefix}


def load_manifest(store: Store, prefix: str) -> dict[str, Any]:
    """Read and check `<prefix>/manifest.json`; see commit_manifest for what it returns.

    Checks format version, digest, and that shards and pieces are well formed, without overlaps or gaps. It
    does not look at the shards: ckpt.reading does. DamagedError if anything is wrong, MissingError
    if there is none.
    """
    key = f"{prefix}/{MANIFEST}"
    with naming(store, key):
        size = store.size(key)
        require(size <= format.MAX_MANIFEST, f"has {size} bytes, more than any manifest ({format.MAX_MANIFEST})")
        manifest = format.open_manifest(store.read(key, 0, size))
    return {**manifest, "prefix": prefix}


def shard_key(prefix: str, name: str) -> str:
    return f"{prefix}/{name}.safetensors"
