"""Members of a run without sockets, journal or clock: what tests.bench.loss trains, in one process and always alike.

The model, inner step, codec, outer step and merge are the product's; the members are stepped in turn, and an exchange takes
an exact number of inner steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from diloco.averaging import Averaging, Contribution
from diloco.codec import build_codec
from diloco.config import Config
from diloco.data import Dataset, build_source
from diloco.evaluate import evaluate
from diloco.fragments import group_parameters
from diloco.inner import Inner
from diloco.merging import mix, progress, rebase, rounding_seed
from diloco.outer import nesterov
from diloco.parallel import layer_of, open_region
from diloco.shards import Shards
from diloco.trainer import build_model, load_loss

EVALUATED = 512
"""Held-out sequences; the same ones for every variant and seed."""


@dataclass(frozen=True)
class Plan:
    """How long a simulated run is and how it differs from the plainest one."""

    members: int
    rounds: int
    """Of every fragment."""
    overlap: int = 0
    """Inner steps between a snapshot and its merge."""
    swapped: bool = False
    """The members' samples change places in rounds drawn by the seed: the same samples, the same steps, other noise."""


@dataclass
class Flight:
    """A fragment's round under way."""

    due: int
    """Merged after this many inner steps of the run."""
    flats: list[Tensor]
    """The members' snapshots."""
    contributions: list[Contribution]


@dataclass
class Member:
    inner: Inner
    shards: Shards
    residual: list[Tensor] = field(default_factory=list)
    """One per fragment, or none."""


class Run:
    """`plan.members` regions of one rank each; theta and momentum, which they have in common, once."""

    def __init__(self, cfg: Config, plan: Plan) -> None:
        self.cfg, self.plan, region = cfg, plan, open_region(cfg.parallel)
        source = build_source(cfg.data)
        self.dataset = Dataset(source, cfg.inner.seq_len, cfg.data.holdout, cfg.run.seed)
        models = [build_model(cfg, region, source.vocab) for _ in range(plan.members)]
        shapes = [(name, tuple(p.shape)) for name, p in models[0].named_parameters()]
        self.fragments = group_parameters(shapes, layer_of(models[0]), cfg.outer.fragments)
        self.averaging = Averaging(self.fragments, build_codec(cfg.codec), cfg.codec.feedback_decay)
        self.members = [
            Member(Inner(cfg.inner, model, load_loss(cfg), region), Shards(model, self.fragments, region))
            for model in models
        ]
        self.theta = [self.members[0].shards.read(f.index) for f in self.fragments]
        self.momentum = [torch.zeros_like(theta) for theta in self.theta]
        if cfg.codec.error_feedback:
            for member in self.members:
                member.residual = [torch.zeros_like(theta) for theta in self.theta]
        self.flights: dict[int, Flight] = {}
        self.swaps = Random(cfg.run.seed)

    def train(self) -> float:
        """The whole run. Returns the held-out loss of theta, nats per token."""
        interval = self.cfg.outer.sync_every // len(self.fragments)
        total, order = self.plan.rounds * self.cfg.outer.sync_every, list(range(self.plan.members))
        for step in range(total):
            if self.plan.swapped and step % interval == 0:
                self.swaps.shuffle(order)
            self.inner_steps(step, order, total)
            boundary, rest = divmod(step + 1, interval)
            if not rest:
                self.snapshot((boundary - 1) % len(self.fragments), step + 1, boundary)
            self.merge_due(step + 1)
        self.merge_due(total + self.plan.overlap)
        return self.evaluate()

    def inner_steps(self, step: int, order: Sequence[int], total: int) -> None:
        batch = self.cfg.inner.batch
        for member, place in zip(self.members, order, strict=True):
            start = (step * self.plan.members + place) * batch
            member.inner.step(self.dataset.batch(range(start, start + batch)), (step + 1) / total)

    def snapshot(self, f: int, step: int, boundary: int) -> None:
        """A boundary: every member's contribution to fragment f."""
        contributions, flats = [], []
        for number, member in enumerate(self.members):
            flats.append(member.shards.read(f))
            seed = rounding_seed(self.cfg.run.seed, f, (boundary - 1) // len(self.fragments), str(number))
            residual = member.residual[f] if member.residual else None
            blocks = self.fragments[f].blocks
            contributions.append(self.averaging.contribution(f, 0, blocks, self.theta[f], flats[-1], residual, seed))
        self.flights[f] = Flight(step + self.plan.overlap, flats, contributions)

    def merge_due(self, step: int) -> None:
        for f in [f for f, flight in self.flights.items() if flight.due <= step]:
            self.merge(f, self.flights.pop(f))

    def merge(self, f: int, flight: Flight) -> None:
        """As Trainer.merge does it: residuals, the outer step, the local parameters."""
        blocks, weights = self.fragments[f].blocks, [1.0] * self.plan.members
        parts = [contribution.read(0, blocks) for contribution in flight.contributions]
        data = self.averaging.reduce(f, 0, blocks, parts, weights)[0]
        for member, contribution in zip(self.members, flight.contributions, strict=True):
            if member.residual:
                contribution.update_residual()
        self.outer_step(f, data, weights)
        for member, flat in zip(self.members, flight.flats, strict=True):
            x, outer = member.shards.read(f), self.cfg.outer
            mixed = outer.merge == "mix"
            merged = mix(x, self.theta[f], outer.alpha) if mixed else rebase(self.theta[f], progress(x, flat))
            member.shards.write(f, merged)

    def outer_step(self, f: int, data: Tensor, weights: Sequence[float]) -> None:
        start = 0
        for gradient in self.averaging.decode_runs(f, 0, self.fragments[f].blocks, data, weights):
            stop = start + gradient.numel()
            theta, momentum = self.theta[f][start:stop], self.momentum[f][start:stop]
            nesterov(theta, momentum, gradient, self.cfg.outer.lr, self.cfg.outer.momentum)
            start = stop

    def evaluate(self) -> float:
        member = self.members[0]
        for f, theta in enumerate(self.theta):
            member.shards.write(f, theta)
        inner, region = member.inner, member.inner.region
        return evaluate(inner.model, inner.loss, self.dataset, region, EVALUATED, 4 * inner.micro_batch)[0]
