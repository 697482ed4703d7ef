"""The stored bits of rounds: `<prefix>/<first>-<last>`, the blocks [first, last) as some rank of some mesh had them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ckpt.store import Store


def spans(store: Store, prefix: str) -> list[tuple[int, int]]:
    """[first, last) of the slices that there are, sorted."""
    cuts = (key.split("/")[-1].split("-") for key in store.list(f"{prefix}/"))
    return sorted((int(first), int(last)) for first, last in cuts)


def load_slices(store: Store, prefix: str, first: int, last: int, size: Callable[[int, int], int]) -> Tensor | None:
    """uint8: blocks [first, last) from whatever slices there are; None if some are missing. size(a, b): bytes of [a, b)."""
    parts, at = [], first
    for a, b in spans(store, prefix):
        if a <= at < min(b, last):
            stop = min(b, last)
            data = store.read(f"{prefix}/{a}-{b}", size(a, at), size(a, stop))
            parts.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            at = stop
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts]) if at == last else None
