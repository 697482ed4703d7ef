"""`python -m launch.plan model=10b 'regions=[{name: eu, gpus: 64, gpu: h100, up: 1gbit, down: 2gbit}, ...]' [key=value ...]`

What a run will need and take before a machine is rented: memory, step time and tokens/s of every region, bytes and seconds of
a round, compute utilization for four ways to exchange, time and traffic of the run, checkpoints, joining, and which H,
fragments, overlap and codec reach a utilization.

    regions=[...]      name, gpus, gpu (h100, a100, 4090, ...; or tflops and memory in GB), up, down; also batch (sequences per
                       inner step), mfu. up and down may come from +wan=global (lan, atlantic, home) and wan.KEY=VALUE
    rtt=80ms           round trip of the slowest pair, without +wan
    mfu=0.4            share of the GPUs' peak that the model's FLOPs reach
    target=0.95        compute utilization to recommend a setting for
    svg=FILE           writes utilization against bandwidth as a picture
    --json             everything as one JSON object instead of tables

Everything else is config as diloco.train takes it: codec=int8 outer.sync_every=100 run.tokens=1_000_000_000_000.

    python -m launch.plan failures [--json]     goodput of 10^3 to 2.4*10^6 chips, elastic data parallelism against regions
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read as torch is imported

import torch
from torch import nn

from diloco import inner, parallel
from diloco.composing import compose_config
from diloco.config import Config, build_module, load, validate_method
from diloco.errors import ConfigError
from diloco.model import Llama, flops_per_token
from launch.advising import recommend, sweep, ways
from launch.describing import Plan, SitePlan, describe, failures, notes, picture, table_of_failures
from launch.failing import regional
from launch.links import TIME, WanConfig
from launch.planning import Schedule, Site, Way, Work, activation_bytes, checkpoint, join, memory, outlook, step_seconds
from launch.regions import find_override, split_own
from launch.sites import EXAMPLE, Place, names_of, parse_places, quantity, share
from launch.wanconfig import split_wan

OWN = {"regions": "", "rtt": "80ms", "mfu": "0.4", "target": "0.95", "svg": ""}
RESTART = 60.0
"""Seconds until a region's processes are back after an interruption, before it joins: assumed."""
SEQUENCES_PER_GPU, SEQ_LEN = 16, 8192
"""Of an inner step, unless the command line says so: INTELLECT-1's 1M tokens per 8 GPUs (configs/experiment/intellect1.yaml)."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line."""

    places: list[Place]
    rtt: float
    mfu: float
    target: float
    svg: Path | None
    overrides: list[str]


def parse(argv: Sequence[str]) -> Request:
    """Raises ConfigError."""
    own, rest = split_own(argv, OWN, "--json")
    if not own["regions"]:
        raise ConfigError(f"regions is not set: write {EXAMPLE}")
    wan, overrides = split_wan(rest, names_of(own["regions"]))
    places = parse_places(own["regions"], wan)
    named = next((key for key in ("region", "region.name") if find_override(overrides, key) is not None), None)
    if named:
        raise ConfigError(f"{named} names one region: a plan is of all, write regions=[...] instead")
    rtt = _rtt(wan, places) if wan else quantity("rtt", own["rtt"], TIME)
    picked = Path(own["svg"]) if own["svg"] else None
    return Request(places, rtt, share("mfu", own["mfu"]), _target(own["target"]), picked, overrides)


def _target(value: str) -> float:
    number = share("target", value)
    if number > 0.999:
        raise ConfigError(f"target={value} leaves no time to exchange anything: set it to 0.999 or less, such as 0.95")
    return number


def _rtt(wan: WanConfig, places: Sequence[Place]) -> float:
    """Of the slowest pair."""
    names = [place.name for place in places]
    return max((wan.pair(a, b)["rtt"] for a in names for b in names if a != b), default=0.0)


# ---- from the config to what a plan depends on ----


def assume(cfg: Config, overrides: Sequence[str]) -> list[str]:
    """Sets what the command line leaves open and the config's defaults, which are for a laptop, would get wrong. Returns what
    it said."""
    if any(find_override(overrides, key) is not None for key in ("inner.batch", "inner.seq_len", "experiment")):
        return []
    cfg.inner.seq_len, cfg.inner.micro_batch = SEQ_LEN, cfg.inner.micro_batch or 1
    cfg.inner.batch = 0  # of each region its own
    return [
        f"inner.batch and inner.seq_len are not set: {SEQUENCES_PER_GPU} sequences of {SEQ_LEN} tokens per GPU and inner "
        "step, one at a time (INTELLECT-1's)"
    ]


def build_sites(request: Request, cfg: Config) -> list[Site]:
    """Raises ConfigError."""
    sites = []
    for place in request.places:
        if place.gpus % cfg.parallel.tp:
            raise ConfigError(
                f"parallel.tp={cfg.parallel.tp} does not divide regions.{place.name}.gpus={place.gpus}: set one to fit"
            )
        batch = place.batch or cfg.inner.batch or SEQUENCES_PER_GPU * place.gpus
        try:
            inner.validate(dataclasses.replace(cfg.inner, batch=batch), place.gpus // cfg.parallel.tp)
        except ConfigError as error:
            raise ConfigError(f"regions.{place.name} with {place.gpus} GPUs: {error}") from error
        rates = {"up": place.up, "down": place.down}
        peak = place.peak(cfg.parallel.dtype)
        sites.append(Site(place.name, place.gpus, peak, place.mfu or request.mfu, place.memory, **rates, batch=batch))
    return sites


def build_work(cfg: Config) -> Work:
    """The model is built on the meta device, which takes no memory. Raises ConfigError."""
    with torch.device("meta"):
        model = build_module(cfg, 1)
    if cfg.parallel.tp > 1 and cfg.model.plan:
        load(cfg.model.plan, "model.plan")(model, cfg.parallel.tp)
    parameters = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    count = sum(p.numel() for p in model.parameters())
    width = 2 if cfg.parallel.dtype == "bfloat16" else 4
    args = model.args if isinstance(model, Llama) else None
    return Work(
        parameters,
        parallel.layer_of(model),
        flops_per_token(count, args.layers, args.dim, cfg.inner.seq_len) if args else 6.0 * count,
        cfg.inner.seq_len,
        cfg.inner.micro_batch,
        width,
        _activations(model, cfg, width),
        tp=cfg.parallel.tp,
        planes=3 if cfg.outer.optimizer == "adamw" else 2,
        feedback=cfg.codec.error_feedback,
        durable=cfg.ckpt.durable,
        every=cfg.ckpt.every,
        moments=cfg.elastic.join_inner == "peer" and cfg.outer.optimizer != "adamw",
        tokens=cfg.run.tokens,
        rounds=cfg.run.rounds,
    )


def _activations(model: nn.Module, cfg: Config, width: int) -> float | None:
    if not isinstance(model, Llama):
        return None
    a = model.args
    kv = a.kv_heads * a.head_dim
    again = cfg.parallel.checkpoint_activations
    return activation_bytes(a.dim, a.layers, kv, a.ffn, a.vocab, width, cfg.parallel.tp, again)


# ---- the plan ----


def make_plan(request: Request) -> Plan:
    """Raises ConfigError."""
    cfg = compose_config(request.overrides)
    validate_method(cfg)
    if cfg.parallel.dtype not in parallel.CHOICES["dtype"]:
        raise ConfigError(f"parallel.dtype={cfg.parallel.dtype} is not known: set it to float32 or bfloat16")
    if cfg.parallel.tp < 1:
        raise ConfigError(
            f"parallel.tp={cfg.parallel.tp} must be at least 1: set it to a divisor of every region's GPUs"
        )
    assumed = [f"MFU {request.mfu:g}, of all regions that name none", *assume(cfg, request.overrides)]
    sites, work = build_sites(request, cfg), build_work(cfg)
    o = cfg.outer
    schedule = Schedule(o.sync_every, o.fragments, o.max_overlap_steps, o.boundary == "first")
    compared = ways(Way(schedule, cfg.codec.name), len(set(work.layers.values())))
    found = [outlook(name, sites, work, way, request.rtt) for name, way in compared.items()]
    configured = found[0]
    plans = [_site_plan(k, request.places[k].gpu, sites, work, configured.way) for k in range(len(sites))]
    alone = len(sites) == 1
    return Plan(
        cfg.model.target.rpartition(".")[2],
        work.count,
        cfg.parallel.dtype,
        request.rtt,
        assumed,
        plans,
        found,
        notes(plans, sites, work, found, cfg.parallel.dtype),
        None if alone else recommend(sites, work, request.rtt, request.target, schedule.first),
        [] if alone else sweep(sites, work, compared, request.rtt),
        _interruptions(plans),
    )


def _site_plan(k: int, gpu: str, sites: Sequence[Site], work: Work, way: Way) -> SitePlan:
    site, others = sites[k], [*sites[:k], *sites[k + 1 :]]
    on_gpu, on_host = memory(site, work, way, len(sites))
    step, (size, seconds) = step_seconds(site, work), checkpoint(site, work, len(sites))
    return SitePlan(
        site.name,
        site.gpus,
        gpu,
        site.batch,
        step,
        site.batch * work.seq_len / step,
        on_gpu,
        on_host,
        site.memory,
        sum(on_gpu.values()) <= site.memory,
        size,
        seconds,
        join(site, others, work),
    )


def _interruptions(plans: Sequence[SitePlan]) -> dict[str, float]:
    """Of this fleet, at one a GPU-year."""
    gpus = sum(plan.gpus for plan in plans)
    recovery = RESTART + sum(plan.join_seconds * plan.gpus for plan in plans) / gpus
    ours = regional(gpus, len(plans), recovery)
    return {"interval_seconds": ours.interval(), "recovery_seconds": recovery, "goodput": ours.expected()}


# ---- command line ----


def write_svg(path: Path, text: str) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"svg={path} cannot be written ({error.strerror}): set it to a file in a directory of yours"
        ) from error


def run(argv: Sequence[str]) -> str:
    """What is printed. Raises ConfigError."""
    as_json, rest = "--json" in argv, [text for text in argv if text != "--json"]
    if rest[:1] == ["failures"]:
        if rest[1:]:
            raise ConfigError(f"{rest[1]} means nothing to launch.plan failures: it takes --json only")
        rows = failures()
        return _json([dataclasses.asdict(row) for row in rows]) if as_json else table_of_failures(rows)
    request = parse(rest)
    plan = make_plan(request)
    if request.svg:
        if not plan.sweep:
            raise ConfigError(f"svg={request.svg} has nothing to show of one region: name a second one in regions")
        write_svg(request.svg, picture(plan, request.target))
    return _json(dataclasses.asdict(plan)) if as_json else describe(plan)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        print(run(argv))
    except ConfigError as error:
        print(f"launch.plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
