"""The ranks of one region: their mesh, FSDP2 x tensor parallelism over it, and a few collectives.

One torchrun job is one region. Its mesh has the dims ("dp", "tp"), tensor-parallel ranks adjacent.
CPU/Gloo and CUDA/NCCL take the same path; the tests exercise CPU/Gloo only.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils.checkpoint import checkpoint

from diloco.errors import ConfigError
from diloco.settings import JournalError

Plan = Callable[[nn.Module, int], dict[str, ParallelStyle]]  # model.plan, called as plan(model, tp)
CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("float32", "bfloat16")}
FORWARDED: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ConfigError, JournalError, OSError)}
"""What `on_rank_0` raises on all ranks; of what is derived from them, the kind here."""


@dataclass
class ParallelConfig:
    """How a region uses its ranks: FSDP over world / tp of them, tensor parallelism over tp."""

    tp: int = 1
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "float32"  # of compute: float32 | bfloat16; master weights are always fp32
    checkpoint_activations: bool = False
    compile: bool = False
    timeout: float = 1800.0  # seconds, of a collective inside the region


@dataclass
class Region:
    """This process among its region's ranks. `mesh` is None for a lone fp32 rank: no process group either."""

    rank: int
    world: int
    dp: int
    tp: int
    dp_rank: int
    tp_rank: int
    device: torch.device
    mesh: DeviceMesh | None

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's data on every rank, over the CPU backend; others' is ignored. Empty data costs 8 bytes."""
        if self.world == 1:
            return data or b""
        data = data if self.rank == 0 and data else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0)
        if not size.item():
            return b""
        payload = torch.frombuffer(bytearray(data or int(size.item())), dtype=torch.uint8)
        dist.broadcast(payload, 0)
        return payload.numpy().tobytes()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's data on every rank, in rank order, over the CPU backend."""
        if self.world == 1:
            return [data]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size.item()) for size in sizes)
        padded = torch.frombuffer(bytearray(data.ljust(max(longest, 1), b"\0")), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [p.numpy().tobytes()[: int(size.item())] for p, size in zip(parts, sizes, strict=True)]

    def all_reduce_sum(self, t: Tensor) -> Tensor:
        """Sum t over the ranks, in place, with the backend of its device. Returns t."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def barrier(self) -> None:
        """Wait for every rank, over the CPU backend."""
        self.all_reduce_sum(torch.zeros(1))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_rank_0(region: Region, action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0 (JSON), on every rank. If it raises one of FORWARDED there, all ranks do, with its text,
    rather than wait for it in vain. Collective."""
    said: dict[str, Any] = {}
    if region.rank == 0:
        try:
            said = {"value": action()}
        except tuple(FORWARDED.values()) as error:
            said = {
                "error": next(name for name, kind in FORWARDED.items() if isinstance(error, kind)),
                "text": str(error),
            }
    said = json.loads(region.broadcast_bytes(json.dumps(said).encode()))
    if "error" in said:
        raise FORWARDED[said["error"]](said["text"])
    return said["value"]


def validate_mesh(cfg: ParallelConfig, world: int) -> None:
    """Raises ConfigError for what cannot run with `world` ranks anywhere."""
    if cfg.tp < 1 or world % cfg.tp:
        fix = "set parallel.tp to a divisor, or torchrun's --nproc-per-node to a multiple"
        raise ConfigError(f"parallel.tp={cfg.tp} does not divide this region's {world} rank(s): {fix}")
    for key, known in CHOICES.items():
        if getattr(cfg, key) not in known:
            raise ConfigError(f"parallel.{key}={getattr(cfg, key)} is not one of {known}: set it to one")
    if not cfg.timeout > 0:
        raise ConfigError(f"parallel.timeout={cfg.timeout} is not a time in seconds: set it above 0")


def validate(cfg: ParallelConfig, world: int) -> None:
    """Raises ConfigError for what cannot run with `world` ranks on this machine; opens nothing."""
    validate_mesh(cfg, world)
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if _device_type(cfg) == "cuda" and ranks > gpus:
        fix = "set parallel.device=cpu, or lower torchrun's --nproc-per-node"
        raise ConfigError(f"parallel.device={cfg.device}, but {ranks} rank(s) here have {gpus} GPU(s): {fix}")


def _device_type(cfg: ParallelConfig) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device


def open_region(cfg: ParallelConfig) -> Region:
    """Join the ranks torchrun started, or be a lone rank without it; a process group that is open is used.

    Raises ConfigError before a device or a socket is touched.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    validate(cfg, world)
    device = torch.device(_device_type(cfg))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if device.type == "cpu" and world > 1:
        _map_large_tensors()
    mesh = None
    if world > 1 or cfg.dtype != "float32":
        if not dist.is_initialized():
            _init_process_group(device.type, world, timedelta(seconds=cfg.timeout))
        mesh = init_device_mesh(device.type, (world // cfg.tp, cfg.tp), mesh_dim_names=("dp", "tp"))
    return Region(rank, world, world // cfg.tp, cfg.tp, rank // cfg.tp, rank % cfg.tp, device, mesh)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def _map_large_tensors() -> None:
    """Makes glibc map tensors of 4 MiB and more, which go back to the system when they are freed. FSDP gathers and drops
    such tensors in every step, and its heap otherwise grows by a fifth of all that a rank needs (tests.bench.inner)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)  # what glibc itself arrives at; setting the other one fixes it at 128 KiB


def _init_process_group(device_type: str, world: int, timeout: timedelta) -> None:
    # Gloo beside NCCL, because decisions travel as bytes on the CPU. Alone it is "gloo" and not "cpu:gloo", with
    # which torch 2.13 sets no default backend and each rank warns of that when it closes.
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if world > 1:
        # torchrun keeps its store over restarts, with the addresses of ranks that are gone: each start needs keys of its own.
        shared, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        own = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", shared)
        return dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # no torchrun, no rendezvous
    dist.init_process_group(backend, rank=0, world_size=1, store=store)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks: its longest ModuleList (the first of equals), empty if there is none."""
    return list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[]))


def layer_of(model: nn.Module) -> dict[str, int]:
    """Name of each parameter inside the model's repeated blocks -> index of its block."""
    index = {id(block): i for i, block in enumerate(blocks_of(model))}
    found: dict[str, int] = {}
    for prefix, module in model.named_modules():
        if id(module) in index:
            found |= {f"{prefix}.{name}": index[id(module)] for name, _ in module.named_parameters()}
    return found


def parallelize(model: nn.Module, region: Region, cfg: ParallelConfig, plan: Plan | None) -> nn.Module:
    """Spread the model over the region, in place; parameter names stay the same. Returns the model.

    Tensor parallelism by `plan`, activation checkpointing and compilation per block, then FSDP2 with fp32
    weights and gradient reduction; a lone fp32 rank is left unwrapped. What the plan leaves out is replicated
    over tp, where every rank computes the same gradient. Raises ConfigError if tp > 1 without a plan.
    """
    if region.tp > 1:
        if plan is None:
            raise ConfigError(f"parallel.tp={region.tp} needs model.plan: set it, or parallel.tp=1 (FSDP)")
        assert region.mesh is not None
        tied = _tied_parameters(model)
        parallelize_module(model, region.mesh["tp"], plan(model, region.tp))
        for kept, *others in tied:  # each place got a DTensor of its own: make them one again
            for module, name in others:
                setattr(module, name, getattr(*kept))
    for block in blocks_of(model):
        # Inside FSDP's hooks, and without wrapper modules, which would change parameter names.
        if cfg.checkpoint_activations:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.forward = torch.compile(block.forward)
    if region.mesh is None:
        return model.to(region.device)
    compute = torch.bfloat16 if cfg.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for module in [*blocks_of(model), model]:
        fully_shard(module, mesh=region.mesh["dp"], mp_policy=policy)
    return model


def _tied_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places (module, attribute) of each parameter that sits in several."""
    places = defaultdict[nn.Parameter, list[tuple[nn.Module, str]]](list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places[parameter].append((module, name))
    return [where for where in places.values() if len(where) > 1]


def local_tensor(t: Tensor) -> Tensor:
    """This rank's part of t, aliasing it."""
    return t.to_local() if isinstance(t, DTensor) else t


@torch.no_grad()
def grad_square(params: Iterable[Tensor], region: Region) -> Tensor:
    """Squared 2-norm of the gradients that this rank counts, fp32 scalar; the ranks' sum is the model's."""
    grads = [local_tensor(p.grad) for p in params if p.grad is not None and _counted_here(p, region)]
    return nn.utils.get_total_norm(grads).to(region.device).square()


def _counted_here(p: Tensor, region: Region) -> bool:
    """Of the ranks that hold the same part of p, the first counts it."""
    if not isinstance(p, DTensor):
        return region.rank == 0
    dims = zip(p.device_mesh.mesh_dim_names or (), p.placements, strict=True)
    cut = {dim for dim, placement in dims if not placement.is_replicate()}
    return ("dp" in cut or region.dp_rank == 0) and ("tp" in cut or region.tp_rank == 0)


def grad_norm(params: Iterable[Tensor], region: Region) -> Tensor:
    """2-norm of all gradients, an fp32 scalar, the same on every rank; what tp replicates counts once."""
    return region.all_reduce_sum(grad_square(params, region)).sqrt()
