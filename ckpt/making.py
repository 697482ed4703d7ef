"""Checkpoints that no run has saved: averages of others, and models from elsewhere. θ, momentum of zeros, no rounds."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckpt.catalog import ROOT, Named, one, prefixes
from ckpt.checkpoint import Piece, commit_manifest, save_shard
from ckpt.errors import RequestError
from ckpt.layout import Slot, Theta, ThetaDigest, encode_layout, runs
from ckpt.pieces import cut, groups
from ckpt.reading import verify
from ckpt.store import Store

REPORT = 16
"""Shards (of 64 MiB) between two lines of progress."""

Blocks = Callable[[str], Iterator[Tensor]]
"""A parameter's name -> its elements in order, flat fp32 on the CPU."""


@dataclass(frozen=True)
class Model:
    """What is to be written: a manifest's `model`, and the parameters (name, shape) of each fragment."""

    model: dict[str, Any]
    fragments: Sequence[Sequence[tuple[str, tuple[int, ...]]]]


def check_new(store: Store, out: str) -> None:
    """RequestError if there is a checkpoint already."""
    if there := prefixes(store):
        raise RequestError(f"OUT={out} has the checkpoint {there[0][0]}: name a directory or URL without any")


def make(store: Store, made: dict[str, Any], what: Model, blocks: Blocks) -> Iterator[str]:
    """Write <ROOT>/<made["by"]>/0, which is committed last. Yields lines of progress, at last the digest of θ."""
    prefix, digest, attempt = f"{ROOT}/{made['by']}/0", ThetaDigest(), secrets.token_hex(4)
    records, written = list[dict[str, Any]](), 0
    for i, group in enumerate(groups(_pieces(what, blocks, digest))):
        # An attempt that was killed leaves shards, which must not be in the way of the next one.
        records.append(save_shard(store, prefix, f"{attempt}-{i}", group))
        written += records[-1]["bytes"]
        if i % REPORT == REPORT - 1:
            yield f"{written / 1e6:,.1f} MB written"
    start = {"seq": 0, "counters": {"rounds": 0, "applied": 0}}
    body = {**start, "made": made, "model": what.model, "layout": encode_layout(what.fragments)}
    commit_manifest(store, prefix, body, records)
    yield f"{prefix} · {written / 1e6:,.1f} MB in {len(records)} shards"
    yield f"θ {digest.hexdigest()}"


def _pieces(what: Model, blocks: Blocks, digest: ThetaDigest) -> Iterator[Piece]:
    for f, parameters in enumerate(what.fragments):
        start = 0
        for name, shape in parameters:
            for flat in blocks(name):
                digest.update(name, shape, flat)
                stop = start + flat.numel()
                yield from cut("theta", f, start, stop, flat)
                yield from cut("momentum", f, start, stop, torch.zeros_like(flat))
                start = stop


def average(sources: Sequence[Named], weights: Sequence[float], store: Store) -> Iterator[str]:
    """The weighted mean of θ, accumulated in fp64 and rounded to fp32 once; fragments as in the first source.

    Yields what `make` does. RequestError if the models differ, DamagedError if a byte of a source is not right.
    """
    manifests = [one(source) for source in sources]
    thetas = [Theta(source.store, manifest) for source, manifest in zip(sources, manifests, strict=True)]
    _check_alike(sources, manifests, thetas)
    for source, manifest in zip(sources, manifests, strict=True):
        verify(source.store, manifest)
    whole = math.fsum(weights)
    of = [
        {"url": source.store.url, "prefix": manifest["prefix"], "digest": manifest["digest"], "weight": weight}
        for source, manifest, weight in zip(sources, manifests, weights, strict=True)
    ]
    made = {"by": "average", "of": of}

    def blocks(name: str) -> Iterator[Tensor]:
        for start, stop in runs(math.prod(thetas[0].slots[name].shape)):
            total = torch.zeros(stop - start, dtype=torch.float64)
            for theta, weight in zip(thetas, weights, strict=True):
                # Two roundings, not one: whether `add_(alpha=...)` fuses them depends on the CPU and on the block.
                total += theta.read(name, start, stop).double() * weight
            yield (total / whole).float()

    yield from make(store, made, Model(manifests[0]["model"], _fragments(thetas[0].slots.values())), blocks)


def _fragments(slots: Iterable[Slot]) -> list[list[tuple[str, tuple[int, ...]]]]:
    found: list[list[tuple[str, tuple[int, ...]]]] = []
    for slot in slots:
        while len(found) <= slot.fragment:
            found.append([])
        found[slot.fragment].append((slot.name, slot.shape))
    return found


def _check_alike(sources: Sequence[Named], manifests: Sequence[dict[str, Any]], thetas: Sequence[Theta]) -> None:
    """Sizes alone do not tell: two values of rope_theta make two models of the same shapes."""

    def kind(i: int) -> Any:
        return [manifests[i]["model"]["target"], manifests[i]["model"]["args"], _shapes(thetas[i].slots)]

    for i in range(1, len(sources)):
        if kind(i) != kind(0):
            raise RequestError(
                f"URL={sources[i].text} and URL={sources[0].text} are of different models: average those of one model.args"
            )


def _shapes(slots: dict[str, Slot]) -> dict[str, tuple[int, ...]]:
    return {name: slot.shape for name, slot in slots.items()}
