"""Between a region's sharded parameters and flat slices: collectives over the region's own, fast network.

Reading gathers a parameter on every rank and keeps what falls in the rank's slice. Writing broadcasts each run of
elements from the rank whose slice has it, and cuts the local shard from the whole: tensor-parallel chunk first, then
the FSDP chunk. One value per element is written to all its replicas, so replicas never drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from diloco.fragments import Fragment, Slot
from diloco.parallel import Region, local_tensor
from elastic.plan import rank_blocks

Select = Callable[[nn.Parameter], Tensor]
"""Which tensor of a parameter is meant: itself, or an AdamW moment of the same shape and placement."""


def itself(parameter: nn.Parameter) -> Tensor:
    return parameter


class Shards:
    """The parameters of a (parallelized) model as fp32 flat slices of this rank."""

    def __init__(self, model: nn.Module, fragments: Sequence[Fragment], region: Region) -> None:
        self.fragments, self.region = fragments, region
        self._parameters = dict(model.named_parameters())

    def blocks(self, fragment: int, rank: int | None = None) -> tuple[int, int]:
        """Blocks [first, last) of the fragment in a rank's slice; this rank's by default."""
        return rank_blocks(
            self.fragments[fragment].blocks, self.region.rank if rank is None else rank, self.region.world
        )

    def span(self, fragment: int, rank: int | None = None) -> tuple[int, int]:
        """Elements [start, stop) of the fragment in a rank's slice; this rank's by default."""
        return self.fragments[fragment].span(*self.blocks(fragment, rank))

    @torch.no_grad()
    def read(
        self,
        fragment: int,
        select: Select = itself,
        out: Tensor | None = None,
        only: Collection[str] | None = None,
    ) -> Tensor:
        """This rank's slice, fp32 [stop - start] on the CPU; out: what it is written to; only: these parameters' places in it,
        all by default. Collective."""
        start, stop = self.span(fragment)
        out = torch.empty(stop - start) if out is None else out
        for slot in self.fragments[fragment].slots:
            if only is not None and slot.name not in only:
                continue
            tensor = select(self._parameters[slot.name]).detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            a, b = max(slot.start, start), min(slot.stop, stop)
            if a < b:
                out[a - start : b - start] = whole.reshape(-1)[a - slot.start : b - slot.start]
        return out

    @torch.no_grad()
    def write(self, fragment: int, flat: Tensor, select: Select = itself) -> None:
        """Sets the tensors from the ranks' slices (fp32 [stop - start] on the CPU). Collective."""
        for slot in self.fragments[fragment].slots:
            target = select(self._parameters[slot.name]).detach()
            whole = self._gather(fragment, slot, flat).view(slot.shape)
            local_tensor(target).copy_(local_shard(whole, target))

    def _gather(self, fragment: int, slot: Slot, flat: Tensor) -> Tensor:
        start, _ = self.span(fragment)
        if self.region.world == 1:
            return flat[slot.start : slot.stop]
        whole = torch.empty(slot.stop - slot.start)
        for rank, a, b in self._owners(fragment, slot):
            part = whole[a - slot.start : b - slot.start]
            if rank == self.region.rank:
                part.copy_(flat[a - start : b - start])
            dist.broadcast(part, rank)
        return whole

    def _owners(self, fragment: int, slot: Slot) -> Iterator[tuple[int, int, int]]:
        """(rank, a, b): the runs of the slot's elements by the rank whose slice has them."""
        for rank in range(self.region.world):
            start, stop = self.span(fragment, rank)
            a, b = max(slot.start, start), min(slot.stop, stop)
            if a < b:
                yield rank, a, b


def local_shard(whole: Tensor, target: Tensor) -> Tensor:
    """The part of a full tensor that this rank holds of `target`. FSDP2's `_StridedShard` marks that tensor parallelism
    cut the dimension first, although its mesh dim comes second; `distribute_tensor` cannot do that (torch 2.13)."""
    if not isinstance(target, DTensor):
        return whole
    mesh, placements = target.device_mesh, list(enumerate(target.placements))
    strided = [item for item in placements if type(item[1]).__name__ == "_StridedShard"]
    for mesh_dim, placement in [item for item in placements if item not in strided] + strided:
        if placement.is_shard() or (mesh_dim, placement) in strided:
            assert isinstance(placement, Shard) or hasattr(placement, "dim")
            whole = _chunk(whole, placement.dim, mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
    return whole


def _chunk(tensor: Tensor, dim: int, parts: int, index: int) -> Tensor:
    chunks = tensor.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)
