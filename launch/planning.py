"""What a run over the WAN will need and take, region by region, before a machine is rented. Pure arithmetic.

Assumed: a share of the GPUs' peak (MFU), links that are as fast as named, and that nobody fails. Not counted: snapshots, merges,
evaluation, and what uploads to the store take away from an exchange on the same link.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diloco.codec import CODECS
from diloco.fragments import BLOCK, group_parameters
from elastic.plan import WHOLE, exchange_seconds, ownership
from launch.simulating import Paces, Schedule, simulate

ROUND_TRIPS = 3.5
"""Of a round: one for its proposal and the answers, half a one for its start, the exchange's own (as in its floor in
tests.bench.exchange), and half a one each until all know that all hold the result, and that it is committed."""
FP32 = 4
INNER_PLANES = 3
"""Local parameters and AdamW's two moments."""


@dataclass(frozen=True)
class Site:
    """A region's machines and line."""

    name: str
    gpus: int
    peak: float
    """FLOP/s of one GPU in the compute dtype."""
    mfu: float
    """Share of it that the model's own FLOPs reach."""
    memory: float
    """Bytes of one GPU."""
    up: float
    """Bytes per second."""
    down: float
    batch: int
    """Sequences per inner step."""

    @property
    def rate(self) -> float:
        """What `ownership` goes by."""
        return min(self.up, self.down)


@dataclass(frozen=True)
class Work:
    """What is trained, and how it is kept: all of the config that a plan depends on."""

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and full shapes in the model's order, tied ones once."""
    layers: Mapping[str, int]
    """Name -> index of its layer."""
    flops: float
    """Per token, forward and backward."""
    seq_len: int
    micro_batch: int
    """Sequences per rank and forward; 0: batch / dp."""
    width: int
    """Bytes of a number in the compute dtype."""
    activations: float | None
    """Bytes that a rank keeps per token of its micro-batch for the backward; None: the model is not one we can count."""
    tp: int = 1
    planes: int = 2
    """θ and outer moments."""
    feedback: bool = False
    durable: bool = True
    every: int = 1
    """Rounds between two checkpoints."""
    moments: bool = True
    """A joiner takes AdamW's moments from a member."""
    tokens: int | None = None
    rounds: int | None = None

    @property
    def count(self) -> int:
        return sum(math.prod(shape) for _, shape in self.parameters)

    def elements(self, fragments: int) -> list[int]:
        """Of each fragment, as training groups them."""
        return [f.elements for f in group_parameters(self.parameters, dict(self.layers), fragments)]


@dataclass(frozen=True)
class Way:
    """How regions exchange: what a recommendation may choose."""

    schedule: Schedule
    codec: str

    def encoded(self, work: Work) -> list[int]:
        """Bytes of one contribution to each fragment's round: the codec's own formula."""
        return [CODECS[self.codec].size(n, BLOCK) for n in work.elements(self.schedule.fragments)]

    @property
    def overrides(self) -> str:
        s = self.schedule
        outer = {"sync_every": s.sync_every, "fragments": s.fragments, "max_overlap_steps": s.overlap}
        return " ".join([*(f"outer.{key}={value}" for key, value in outer.items()), f"codec={self.codec}"])


# ---- a region by itself ----


def step_seconds(site: Site, work: Work) -> float:
    """Of one inner step."""
    return site.batch * work.seq_len * work.flops / (site.gpus * site.peak * site.mfu)


def activation_bytes(
    dim: int, layers: int, kv_dim: int, ffn: int, vocab: int, width: int, tp: int = 1, again: bool = False
) -> float:
    """Bytes per token that diloco.model.Llama keeps for the backward on one rank, and what the loss adds.

    A layer keeps, in numbers: the inputs and outputs of both norms 4 d; of tensor-parallel ranks each its part of q, k and v, the
    attention's output, and gate, its SiLU, up and their product. `again`: activations are recomputed, so the layers' inputs and
    one layer whole. Logits are whole on every rank: in the compute dtype, their log-softmax and two gradients in fp32.
    """
    layer = 4 * dim + (2 * dim + 2 * kv_dim + 4 * ffn) / tp
    kept = dim * layers + layer if again else layer * layers
    return width * (kept + 2 * dim) + vocab * (3 * FP32 + (width if width < FP32 else 0))


def memory(site: Site, work: Work, way: Way, members: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of one rank by what takes them: on its GPU, and beside it on the host. Ranks share N parameters evenly."""
    ranks, n = site.gpus, work.count
    share = FP32 * n / ranks
    encoded = sum(way.encoded(work)) / ranks
    gpu = {"fp32 parameters": share, "gradients": share, "AdamW's moments": 2 * share}
    if ranks > 1:  # one module whole, its gradient, and that in fp32 as it is reduced
        gpu["FSDP's largest module"] = largest(work) / work.tp * (2 * work.width + FP32)
    if work.activations is not None:
        gpu["activations and logits"] = work.activations * micro(site, work) * work.seq_len
    results = members if CODECS[way.codec].gathers else 1
    host = {
        "θ and outer moments": work.planes * share,
        "snapshots": share,
        "contribution and result": (1 + results) * encoded,
        "bits of the last two rounds": 2 * results * encoded,
        "error feedback": share * work.feedback,
        "checkpoint arena": (work.planes + INNER_PLANES + work.feedback) * share,
    }
    return gpu, {name: size for name, size in host.items() if size}


def micro(site: Site, work: Work) -> int:
    """Sequences that a rank has in its memory at once."""
    return work.micro_batch or max(1, site.batch * work.tp // site.gpus)


def largest(work: Work) -> int:
    """Parameters of the largest module that FSDP gathers: a layer, or all that is in none."""
    sizes: dict[int, int] = {}
    for name, shape in work.parameters:
        layer = work.layers.get(name, -1)
        sizes[layer] = sizes.get(layer, 0) + math.prod(shape)
    return max(sizes.values())


# ---- regions together ----


@dataclass(frozen=True)
class Traffic:
    """Of one round."""

    seconds: float
    """From the last snapshot to the commit."""
    stored: float
    """Of them, for the bits that go to the store before it."""
    up: tuple[float, ...]
    """Bytes, region by region."""
    down: tuple[float, ...]


def traffic(sites: Sequence[Site], nbytes: float, codec: str, rtt: float, durable: bool) -> Traffic:
    """A round of a fragment with `nbytes` encoded bytes. rtt: seconds, of the slowest pair.

    Dense codecs as `elastic.plan.ownership` deals the blocks; a sparse one's contributions go to everyone. With ckpt.durable the
    first region stores the result before it counts."""
    members, rates = len(sites), [site.rate for site in sites]
    lone = members == 1
    results = nbytes * (members if CODECS[codec].gathers else 1)
    first = min(range(members), key=lambda k: sites[k].name)
    stored = results / sites[first].up if durable else 0.0
    if lone:
        moved, seconds = [0.0], 0.0
    elif CODECS[codec].gathers:
        moved = [nbytes * (members - 1)] * members
        seconds = max(moved) / min(rates)
    else:
        shares = ownership(rates)
        moved = [nbytes * (1 + (members - 2) * share / WHOLE) for share in shares]
        seconds = exchange_seconds(nbytes, rates, shares)
    up = tuple(size + results * (durable and k == first) for k, size in enumerate(moved))
    return Traffic(seconds + stored + ROUND_TRIPS * rtt * (not lone), stored, up, tuple(moved))


def paces(sites: Sequence[Site], work: Work, way: Way, rtt: float) -> Paces:
    rounds = [traffic(sites, size, way.codec, rtt, work.durable).seconds for size in way.encoded(work)]
    return simulate(way.schedule, [step_seconds(site, work) for site in sites], rounds)


@dataclass(frozen=True)
class Outlook:
    """One way of exchanging, and what comes of it."""

    name: str
    way: Way
    bytes: float
    """Of one contribution, all fragments: a cycle of H steps."""
    seconds: float
    """Of the longest round, its store included."""
    stored: float
    """Of them for the store."""
    utilization: tuple[float, ...]
    """By region."""
    bound: float
    """What exchanges alone leave, without waiting for slower regions."""
    tokens_per_second: float
    """Of all regions, waiting included."""
    up: tuple[float, ...]
    """Bytes of a cycle of H steps."""
    down: tuple[float, ...]
    run_seconds: float | None
    run_rounds: float | None
    run_tokens: float | None


def outlook(name: str, sites: Sequence[Site], work: Work, way: Way, rtt: float) -> Outlook:
    encoded = way.encoded(work)
    rounds = [traffic(sites, size, way.codec, rtt, work.durable) for size in encoded]
    slowest, found = max(rounds, key=lambda t: t.seconds), paces(sites, work, way, rtt)
    speed = sum(rate * site.batch * work.seq_len for rate, site in zip(found.steps, sites, strict=True))
    seconds = budget(work, speed, found.rounds)
    return Outlook(
        name,
        way,
        sum(encoded),
        slowest.seconds,
        slowest.stored,
        found.utilization,
        found.bound(way.schedule),
        speed,
        tuple(sum(t.up[k] for t in rounds) for k in range(len(sites))),
        tuple(sum(t.down[k] for t in rounds) for k in range(len(sites))),
        seconds,
        seconds and seconds * found.rounds,
        seconds and seconds * speed,
    )


def budget(work: Work, tokens_per_second: float, rounds_per_second: float) -> float | None:
    """Seconds until the run is done: whichever of run.tokens and run.rounds comes first."""
    ends = [work.tokens / tokens_per_second] if work.tokens else []
    ends += [work.rounds / rounds_per_second] if work.rounds else []
    return min(ends, default=None)


def checkpoint(site: Site, work: Work, members: int) -> tuple[float, float]:
    """(bytes, seconds) that a region uploads for a checkpoint: its part of θ and moments, and its own planes."""
    common, own = FP32 * work.planes * work.count, FP32 * (INNER_PLANES + work.feedback) * work.count
    size = common / members + own
    return size, size / site.up


def join(site: Site, others: Sequence[Site], work: Work) -> float:
    """Seconds until a region that comes later holds the run's state: θ and outer moments from all the others at once, AdamW's
    moments from the fastest. Replay of the rounds meanwhile is not counted. Alone: from the store."""
    state, moments = FP32 * work.planes * work.count, 2 * FP32 * work.count * work.moments
    if not others:
        return (state + FP32 * INNER_PLANES * work.count) / site.down
    everyone, best = sum(other.up for other in others), max(other.up for other in others)
    return state / min(site.down, everyone) + moments / min(site.down, best)
