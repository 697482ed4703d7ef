"""A plan in words, tables and a picture. Rates are bits per second here, as lines are sold; sizes are decimal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diloco.metrics import count, duration, size
from launch.advising import RATES, Advice, Line
from launch.failing import CHIPS, data_parallel, regional
from launch.planning import Outlook, Site, Work
from launch.svg import plot


@dataclass(frozen=True)
class SitePlan:
    """A region by itself."""

    name: str
    gpus: int
    gpu: str
    batch: int
    """Sequences per inner step."""
    step_seconds: float
    tokens_per_second: float
    """While it computes."""
    gpu_bytes: Mapping[str, float]
    """Of one rank, by what takes them."""
    host_bytes: Mapping[str, float]
    gpu_memory: float
    fits: bool
    checkpoint_bytes: float
    """That it uploads for one."""
    checkpoint_seconds: float
    join_seconds: float


@dataclass(frozen=True)
class Plan:
    model: str
    parameters: int
    dtype: str
    rtt: float
    """Seconds, of the slowest pair."""
    assumed: Sequence[str]
    sites: Sequence[SitePlan]
    ways: Sequence[Outlook]
    """The first is the one configured."""
    notes: Sequence[str]
    advice: Advice | None
    """None: one region exchanges with nobody."""
    sweep: Sequence[Line]
    interruptions: Mapping[str, float]


def notes(
    plans: Sequence[SitePlan], sites: Sequence[Site], work: Work, ways: Sequence[Outlook], dtype: str
) -> list[str]:
    """What the person who asked should look at."""
    now, found = ways[0], []
    for plan in plans:
        if not plan.fits:
            need = f"{size(sum(plan.gpu_bytes.values()))} of {size(plan.gpu_memory)}"
            most = max(plan.gpu_bytes, key=lambda name: plan.gpu_bytes[name])
            fix = "set parallel.checkpoint_activations=true, a smaller inner.micro_batch or a larger parallel.tp"
            found.append(f"{plan.name}: a GPU needs {need}, most of it for {most}: {fix}, or use more GPUs")
    if work.activations is None:
        found.append("activations are not counted: the model is not diloco.model.Llama")
    if dtype == "float32":
        found.append("parallel.dtype=float32 leaves the tensor cores idle: plan with parallel.dtype=bfloat16, too")
    for site, share in zip(sites, now.utilization, strict=True):
        if not now.way.schedule.first and share < now.bound - 0.05:
            lost = percent(now.bound - share)
            fix = f"set outer.boundary=first, or give it {now.bound / share:.2g} times the sequences (regions.{site.name}.batch)"
            found.append(f"{site.name} waits {lost} of the time for slower regions: {fix}")
    if len(sites) > 1 and now.stored > 0.25 * now.seconds:
        part = f"{duration(now.stored)} of {duration(now.seconds)}"
        found.append(f"ckpt.durable=true: {part} of a round go into storing its bits: see docs/checkpoints.md")
    if work.tokens and now.run_tokens is not None and now.run_tokens < 0.999 * work.tokens:
        found.append(f"run.rounds={work.rounds} ends the run before run.tokens={work.tokens:,}: set run.rounds=null")
    return found + _checkpoint_note(plans, work, now)


def _checkpoint_note(plans: Sequence[SitePlan], work: Work, now: Outlook) -> list[str]:
    interval = now.way.schedule.interval * max(plan.step_seconds for plan in plans) / now.bound
    slowest = max(plan.checkpoint_seconds for plan in plans)
    if slowest <= work.every * interval:
        return []
    fit = int(slowest / interval) + 1
    return [
        f"a checkpoint takes {duration(slowest)} to upload and is due every {duration(work.every * interval)}: set "
        f"ckpt.every={fit}, or every other one is skipped"
    ]


# ---- text ----


def describe(plan: Plan) -> str:
    parts = [_head(plan), _sites(plan), _ways(plan), _run(plan), *([_sweep(plan)] if plan.sweep else [])]
    parts += [_advice(plan.advice)] if plan.advice else []
    parts += ["Look at\n" + "\n".join(f"  - {note}" for note in plan.notes)] if plan.notes else []
    return "\n\n".join([*parts, _failing(plan)])


def _head(plan: Plan) -> str:
    gpus = sum(site.gpus for site in plan.sites)
    where = f"{gpus} GPUs in {len(plan.sites)} region(s), {plan.rtt * 1e3:g} ms apart"
    head = f"{count(plan.parameters)} parameters in {plan.dtype} on {where}"
    return "\n".join([head, *(f"assumed: {text}" for text in plan.assumed)])


def _sites(plan: Plan) -> str:
    head = ("region", "GPUs", "a GPU needs", "has", "host per rank", "step", "tokens/s", "checkpoint", "joins in")
    rows = [
        (
            site.name,
            f"{site.gpus} {site.gpu}",
            size(sum(site.gpu_bytes.values())),
            size(site.gpu_memory) + ("" if site.fits else " !"),
            size(sum(site.host_bytes.values())),
            seconds(site.step_seconds),
            count(site.tokens_per_second),
            f"{size(site.checkpoint_bytes)}, {seconds(site.checkpoint_seconds)}",
            seconds(site.join_seconds),
        )
        for site in plan.sites
    ]
    return table([head, *rows])


def _ways(plan: Plan) -> str:
    head = (
        "exchange",
        "H",
        "fragments",
        "overlap",
        "codec",
        "a cycle's bytes",
        "longest round",
        *(s.name for s in plan.sites),
        "tokens/s",
    )
    rows = []
    for found in plan.ways:
        s = found.way.schedule
        shares = [percent(share) for share in found.utilization]
        how = (str(s.sync_every), str(s.fragments), str(s.overlap), found.way.codec)
        rows.append(
            (found.name, *how, size(found.bytes), seconds(found.seconds), *shares, count(found.tokens_per_second))
        )
    return "Compute utilization, by region\n" + table([head, *rows])


def _run(plan: Plan) -> str:
    now = plan.ways[0]
    if now.run_seconds is None or now.run_tokens is None or now.run_rounds is None:
        return ""
    cycles = now.run_rounds / now.way.schedule.fragments
    head = f"The run: {count(now.run_tokens)} tokens in {count(now.run_rounds)} rounds take {duration(now.run_seconds)}"
    rows = [
        (site.name, "sends", size(now.up[k] * cycles), "receives", size(now.down[k] * cycles))
        for k, site in enumerate(plan.sites)
    ]
    return head + "\n" + table(rows)


def _sweep(plan: Plan) -> str:
    rows = [("slowest direction", *(line.name for line in plan.sweep))]
    rows += [(rate(r), *(percent(line.utilization[i]) for line in plan.sweep)) for i, r in enumerate(RATES)]
    return (
        "Compute utilization by bandwidth, all lines in proportion; data parallel: bf16 gradients at every step\n"
        + table(rows)
    )


def _advice(advice: Advice) -> str:
    found = advice.outlook
    reach = f"{percent(found.bound)} of compute utilization, {percent(advice.target)} wanted"
    head = f"For {percent(advice.target)}: {found.way.overrides}"
    need = f"from {rate(advice.rate)} on" if advice.rate else "not with a hundred times the bandwidth"
    verdict = "It reaches" if advice.enough else "Nothing that is tried reaches it; the best comes to"
    return f"{head}\n  {verdict} {reach}; it holds {need} in the slowest direction."


def _failing(plan: Plan) -> str:
    found = plan.interruptions
    return (
        f"At one interruption a GPU-year, one every {duration(found['interval_seconds'])}: goodput {_fine(found['goodput'])} "
        f"(a region is back after {duration(found['recovery_seconds'])})"
    )


def seconds(value: float) -> str:
    """Short times with a fraction: 0.25 s, 12.3 s, then as `duration`."""
    return f"{value:.3g} s" if value < 60 else duration(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _fine(share: float) -> str:
    return f"{100 * share:.3f} %"


def rate(bytes_per_second: float) -> str:
    return size(8 * bytes_per_second).removesuffix("B") + "bit/s"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in range(1, len(row)))]) for row in rows
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def picture(plan: Plan, target: float) -> str:
    """Utilization against bandwidth, SVG."""
    lines = [
        (line.name, [(r, share) for r, share in zip(line.rates, line.utilization, strict=True)]) for line in plan.sweep
    ]
    ticks = [(r, rate(r).replace(".00", "").replace(".0", "")) for r in RATES[::4]]
    title = f"Compute utilization, {count(plan.parameters)} parameters, {', '.join(site.name for site in plan.sites)}"
    return plot(title, "slowest direction, all lines in proportion", "compute utilization", ticks, lines, target)


# ---- failures ----


@dataclass(frozen=True)
class Failures:
    """Goodput of so many chips, simulated."""

    chips: int
    interval_seconds: float
    data_parallel: float
    regions_8: float
    regions_16: float


def failures() -> list[Failures]:
    return [
        Failures(
            chips,
            data_parallel(chips).interval(),
            data_parallel(chips).goodput(),
            regional(chips, 8).goodput(),
            regional(chips, 16).goodput(),
        )
        for chips in CHIPS
    ]


def table_of_failures(rows: Sequence[Failures]) -> str:
    head = ("chips", "an interruption every", "elastic data parallel", "8 regions", "16 regions")
    lines = [
        (
            f"{r.chips:,}",
            seconds(r.interval_seconds),
            percent(r.data_parallel),
            percent(r.regions_8),
            percent(r.regions_16),
        )
        for r in rows
    ]
    return (
        "Goodput at one interruption per chip-year, simulated\n"
        + table([head, *lines])
        + "\nPublished for 1.2M chips (arXiv 2604.21428): 58 %, 88 %, 93 %; the recovery times here are fitted to them."
    )
