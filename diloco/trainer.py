"""The loop of one region, the same on all its ranks: inner steps, a snapshot at the boundary, a merge when a round commits."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ckpt.store import Store
from diloco.agreeing import Roots, prove
from diloco.averaging import Averaging
from diloco.bits import answer_lost, find_bits
from diloco.checkpoints import Checkpoints, reload
from diloco.clock import Clock
from diloco.codec import build_codec, compiles
from diloco.config import Config, build_module, load
from diloco.control import Control, Order, Status
from diloco.dataparallel import adamw_fingerprint, adamw_of, read_gradient
from diloco.evaluate import build_eval_sets, evaluate
from diloco.fold import PROTOCOL, State, fold
from diloco.fragments import digest, group_parameters
from diloco.inner import Inner, StepStats, lr_at
from diloco.journal import Journal
from diloco.keeping import among_all, hear, save
from diloco.lending import Lender
from diloco.loading import Loader
from diloco.merging import Snapshot, mix, progress, rebase, rounding_seed
from diloco.mixing import build_samples
from diloco.parallel import Region, layer_of, parallelize
from diloco.planes import Bits, Planes
from diloco.reading import Ranges, Reader
from diloco.regional import Regional, build_own, heldout_of, shares_of
from diloco.report import Reporter
from diloco.resetting import start_again
from diloco.saving import Saver
from diloco.shards import Shards
from elastic import rounds
from elastic.coordinator import Coordinator
from elastic.lighthouse import Membership
from elastic.memory import shared_zeros
from elastic.node import Node
from elastic.process import Exchange


@dataclass
class Links:
    """What connects a region to the others, from `diloco.joining`. The last four are rank 0's."""

    member: str
    node: Node
    exchanger: Exchange
    store: Store
    checkpoints: Checkpoints
    saver: Saver
    journal: Journal | None = None
    coordinator: Coordinator | None = None
    membership: Membership | None = None
    control: Control | None = None


class Trainer:
    """A region's state and the verbs of its loop. Build it, `diloco.joining.join` it, `train` it."""

    state: State
    links: Links

    def __init__(self, cfg: Config, region: Region) -> None:
        self.cfg, self.region = cfg, region
        self.dataset = build_samples(cfg.data, cfg.inner.seq_len, cfg.run.seed)
        self.own = build_own(cfg.region, cfg.data, self.dataset.source, cfg.inner.seq_len, cfg.run.seed)
        self.samples = Regional(self.dataset, self.own)
        common = build_eval_sets(cfg.data, cfg.run.eval_sets, self.dataset, cfg.inner.seq_len)
        self.eval_sets = {**common, **heldout_of(self.own, cfg.region.name)}
        self.model = build_model(cfg, region, self.dataset.source.vocab)
        shapes = [(name, tuple(p.shape)) for name, p in self.model.named_parameters()]
        self.fragments = group_parameters(shapes, layer_of(self.model), cfg.outer.fragments)
        self.inner = Inner(cfg.inner, self.model, load_loss(cfg), region)
        self.shards = Shards(self.model, self.fragments, region)
        slices = [self.shards.blocks(f.index) for f in self.fragments]
        self.data_parallel = cfg.outer.optimizer == "adamw"
        """Regions exchange gradients of common parameters, not what they did with parameters of their own."""
        feedback = cfg.codec.error_feedback
        self.planes = Planes(self.fragments, slices, feedback, variance=self.data_parallel, zeros=shared_zeros)
        self.compiled = compiles(cfg.codec, sum(theta.numel() for theta in self.planes.theta))
        """Compiling the codec is worth it for this rank's slices."""
        self.averaging = build_averaging(cfg, self.planes, self.compiled)
        self.lender = Lender(self.shards, self.inner)
        self.reader = Reader(shares_of(self.own, cfg.region.name))
        self.loader = Loader(self.samples, cfg.data.workers, cfg.inner.batch, region.dp_rank, region.dp)
        self.report = Reporter(cfg, region, self.dataset.source.bytes_per_token)
        self.clock = Clock(len(self.fragments))
        self.snapshots: dict[int, Snapshot] = {}
        """Fragment -> what this region put into its round, which is in flight."""
        self.stored: dict[int, str] = {}
        """seq -> attempt of the rounds whose bits may be in the store."""
        self.saved = 0
        """The newest entry whose state is known to be stored; rank 0's."""
        self.at_theta: set[int] = set()
        """Fragments whose local parameters equal theta."""
        self.behind = False
        """The bits of a round could not be had: a rewind follows, or this region leaves."""
        self.taken: Ranges = {}
        """Before the first leases after a restart: ranges of samples that the local parameters have seen already."""
        self.unproven: dict[tuple[int, int], Roots] = {}
        """(fragment, base) -> digests of theta and moments that were fetched, until an entry names them."""
        self._digests: dict[tuple[str, int], tuple[int, str]] = {}
        """(plane, fragment) -> (base, digest) that was computed last."""

    @property
    def parameters(self) -> int:
        return sum(fragment.elements for fragment in self.fragments)

    def fingerprint(self) -> dict[str, Any]:
        """What regions must have in common to train one model."""
        layout = json.dumps([[s.name, s.shape] for f in self.fragments for s in f.slots], sort_keys=True)
        return {
            "protocol": PROTOCOL,
            "model": f"{self.cfg.model.target}:{digest(layout.encode())[:16]}",
            "parameters": self.parameters,
            "fragments": len(self.fragments),
            "codec": self.cfg.codec.name,
            "data": self.dataset.source.digest[:16],
            "windows": self.dataset.train_windows,
            "mixture": self.dataset.mixture,
            "shuffle": self.dataset.shuffle,
            "seq_len": self.cfg.inner.seq_len,
            "end": self.cfg.model.loss_args.get("end"),
            "outer": adamw_fingerprint(self.cfg.inner) if self.data_parallel else "nesterov",
        }

    # The loop

    def train(self) -> Order:
        """Until the journal says stop, or this region leaves. Returns the last order, which says why."""
        while not (order := self.next_order()).end:
            for entry in order.entries:
                self.apply(entry.encode())
            if order.ask:
                self.contribute(*order.ask)
            if order.lend >= 0:
                self.lender.copy(order.lend, order.idle)
            if order.step:
                self.inner_step()
            hear(self)
        return order

    def next_order(self) -> Order:
        """Rank 0's decision, broadcast: inside a region nobody has an opinion of his own."""
        data = None
        if self.links.control is not None:
            ages = {f: self.clock.steps - snapshot.stamp.at for f, snapshot in self.snapshots.items()}
            work = [steps for steps, _ in self.clock.work]
            status = Status(self.clock.since, self.clock.overdue, ages, self.reader.available(), work)
            data = replace(self.links.control.next(self.state, status), lend=self.lender.due()).encode()
        return Order.decode(self.region.broadcast_bytes(data))

    def inner_step(self) -> None:
        tokens = self.loader.next(self.reader)
        self.clock.step(self.tokens_per_step)
        begin = time.monotonic()
        if self.data_parallel:
            stats = StepStats(*self.inner.gradient(tokens), lr_at(self.cfg.inner, self.progress()), applied=True)
        else:
            stats = self.inner.step(tokens, self.progress())
            self.at_theta.clear()
        self.report.step(self, stats, time.monotonic() - begin)

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.inner.batch * self.cfg.inner.seq_len

    def progress(self) -> float:
        """Share of the run that is done: committed rounds and tokens, and this region's own since."""
        stamps = [snapshot.stamp for snapshot in self.snapshots.values()]
        ahead = self.clock.own_rounds(stamps, self.state.sync_interval)
        tokens = self.reader.pending * self.cfg.inner.seq_len
        return self.state.progress(ahead, tokens, self.reader.pending_data)

    # A round

    def contribute(self, fragment: int, epoch: int, base: int) -> None:
        """A boundary: snapshots the fragment, offers the pseudo-gradient to the exchange, and answers. Collective."""
        if self.behind or not self.in_step:
            return  # theta is not that of the state: the epoch ends, or more entries come
        key, theta = (epoch, fragment, base), self.planes.theta[fragment]
        flat = shared_zeros(theta.numel())
        if self.data_parallel:
            read_gradient(self, fragment, out=flat)
            minuend, subtrahend = flat, shared_zeros(theta.numel())
        else:
            minuend, subtrahend = theta, self.shards.read(fragment, out=flat)
        residual = self.planes.residual[fragment] if self.planes.residual else None
        seed = rounding_seed(self.cfg.run.seed, fragment, self.state.fragments[fragment].rounds, self.cfg.region.name)
        blocks = self.planes.slices[fragment]
        contribution = self.averaging.contribution(fragment, *blocks, minuend, subtrahend, residual, seed)
        norm: float | None = math.sqrt(self.region.all_reduce_sum(contribution.squares()).item())
        if not math.isfinite(norm or 0.0):
            norm = None
            contribution = self.averaging.contribution(fragment, *blocks, theta, theta)  # zeros, and no weight
        self.links.exchanger.offer(key, contribution)
        stamp = self.clock.snapshot(fragment, self.state.sync_interval)
        self.snapshots[fragment] = Snapshot(key, flat, contribution, stamp, self.reader.claims())
        answer = {
            "tokens": stamp.tokens,
            "steps": stamp.steps,
            "norm": norm,
            "theta": self.digest("theta", fragment),
            "momentum": digest("".join(self.digest(name, fragment) for name in self.planes.names[1:]).encode()),
            "leases": self.snapshots[fragment].claims,
            "dropped": int(self.clock.dropped),
        }
        if self.links.coordinator is not None:
            self.links.coordinator.post(rounds.Answered(fragment, epoch, base, answer))

    @property
    def in_step(self) -> bool:
        """The planes are those of the state: not while entries are missing that a donor had."""
        return self.planes.bases == [fragment.base for fragment in self.state.fragments]

    def digest(self, plane: str, fragment: int) -> str:
        """Of a whole plane, from the ranks' block digests; computed once a round. Collective."""
        base, known = self.planes.bases[fragment], self._digests.get((plane, fragment))
        if known is None or known[0] != base:
            blocks = self.region.gather_bytes(self.planes.digests(plane, fragment))
            known = self._digests[plane, fragment] = base, digest(b"".join(blocks))
        return known[1]

    def apply(self, data: bytes) -> None:
        """The journal moved by one entry. Collective."""
        before, self.state = self.state, fold(self.state, data)
        if self.links.member in self.state.members:
            self.reader.update(self.state.members[self.links.member].leases)
            self.loader.granted(self.reader)
        entry = json.loads(data)
        if entry["kind"] == "round":
            self.merge(before, entry)
        elif entry["kind"] == "lost":
            answer_lost(self, entry["round"])
        elif entry["kind"] == "rewind":
            self.reset()

    def merge(self, before: State, entry: dict[str, Any]) -> None:
        """A committed round: the outer step, and what is due after it."""
        f, seq = entry["fragment"], entry["seq"]
        self.stored[seq] = entry["attempt"]
        if self.planes.bases[f] >= seq or self.behind:
            return  # these planes came from a peer or a checkpoint that had it already, or a rewind follows
        if (bits := find_bits(self, entry)) is None:
            return  # a newer state came instead, or a rewind follows
        snapshot = self.snapshots.pop(f, None)
        out = before.rejected(f, entry["answers"])
        counted = {answer["member"] for answer in entry["answers"]} - out
        used = snapshot if self.links.member in counted else None
        if used is not None:
            self.settle(f, used)
        elif snapshot is None:
            self.clock.missed()
        squares = self.combine(before, entry, used, bits)
        self.links.exchanger.decided((entry["epoch"], f, entry["base"]))
        overlap = 0 if used is None else self.clock.steps - used.stamp.at
        del snapshot, used  # its memory is wanted below
        if self.links.member in out:
            start_again(self)
        self.after_round(before, entry, squares, overlap)

    def settle(self, fragment: int, used: Snapshot) -> None:
        """The round holds this region's contribution: what is left for the next one."""
        self.clock.used(fragment, used.stamp)
        if self.planes.residual:
            used.contribution.update_residual()
        if self.cfg.outer.merge == "mix":
            # Of the steps since, this share of the parameters loses this share of the work.
            share = (1 - self.cfg.outer.alpha) * self.fragments[fragment].elements / self.parameters
            self.clock.dropped += share * (self.clock.steps - used.stamp.at) * self.cfg.inner.batch

    def combine(self, before: State, entry: dict[str, Any], used: Snapshot | None, bits: Bits) -> Tensor:
        """The outer step, and the merge of theta' into the local parameters. A contribution that was not used is always
        rebased: mixing would lose it. Returns what `outer_step` does."""
        f = entry["fragment"]
        theta = self.planes.theta[f]
        if used is not None and self.cfg.outer.merge == "mix":
            squares = self.outer_step(before, entry, bits)
            self.shards.write(f, mix(self.shards.read(f), theta, self.cfg.outer.alpha))
        elif used is not None and used.stamp.at == self.clock.steps:
            squares = self.outer_step(before, entry, bits)
            self.shards.write(f, theta)
            self.at_theta.add(f)
        else:
            mine = progress(self.shards.read(f), theta if used is None else used.flat)
            squares = self.outer_step(before, entry, bits)
            self.shards.write(f, rebase(theta, mine))
        return squares

    def outer_step(self, before: State, entry: dict[str, Any], bits: Bits) -> Tensor:
        """Theta and momentum after a round, from its bits in this rank's slice. before: the state that it was committed on.
        Returns the sum of the squares of the averaged pseudo-gradient there."""
        prove(self.unproven, entry)
        first, last = self.planes.slices[bits.fragment]
        weights = before.weights(bits.fragment, entry["answers"])
        decode = partial(self.averaging.decode_runs, bits.fragment, first, last, bits.data, weights)
        if self.data_parallel:
            return self.planes.step_adamw(entry["seq"], bits, decode(), adamw_of(self, before, entry, decode()))
        return self.planes.step(entry["seq"], bits, decode(), before.settings.lr, before.settings.momentum)

    def reset(self) -> None:
        """Everything as at the checkpoint that the epoch starts from; AdamW's moments afresh. Collective."""
        self.links.exchanger.forget()
        self.behind = not reload(self.links.member, self.links.checkpoints, self.state, self.planes)
        if not self.behind:
            self.adopt()

    def adopt(self) -> None:
        """x <- theta in all fragments, nothing in flight, fresh moments and residual. Collective."""
        self.take_theta()
        self.inner.optimizer.state.clear()
        self.inner.materialise()
        self.planes.forget_residual()

    def take_theta(self) -> None:
        """x <- theta in all fragments; what this region did since is gone. Collective."""
        for f in range(len(self.fragments)):
            self.shards.write(f, self.planes.theta[f])
        self.at_theta = set(range(len(self.fragments)))
        self.snapshots.clear()
        self._digests.clear()
        self.clock.start_over()

    def resume_from(self, progress: dict[str, Any]) -> None:
        """The counters that `save` wrote with this region's own planes."""
        self.clock.load(progress["clock"])
        self.at_theta = set(progress["at_theta"])
        self.taken = progress["taken"]

    def after_round(self, before: State, entry: dict[str, Any], squares: Tensor, overlap: int) -> None:
        """Report, evaluate and save what is due. overlap: inner steps since this region's snapshot for it. Collective."""
        f, rounds_done = entry["fragment"], self.state.rounds
        norm = math.sqrt(self.region.all_reduce_sum(squares).item())
        self.report.round(self, before, entry, norm, self.digest("theta", f), overlap)
        ending = self.state.finished is not None
        if ending or (self.cfg.run.eval_every and rounds_done % self.cfg.run.eval_every == 0):
            self.evaluate()
        if self.in_step and (ending or rounds_done % self.cfg.ckpt.every == 0):
            save(self, among_all(self.state, entry), wait=ending)

    def evaluate(self) -> None:
        """Losses of the global parameters on held-out data: theta goes into the model for it, and the local parameters back."""
        away = [f for f in range(len(self.fragments)) if f not in self.at_theta]
        local = {f: self.shards.read(f) for f in away}
        for f in away:
            self.shards.write(f, self.planes.theta[f])
        for name, held_out in self.eval_sets.items():
            begin = time.monotonic()
            sequences, micro_batch = self.cfg.run.eval_sequences, self.inner.micro_batch
            nll, tokens = evaluate(self.model, self.inner.loss, held_out, self.region, sequences, micro_batch)
            size = held_out.heldout_bytes_per_token
            self.report.evaluation(name, self.state.rounds, nll, size, tokens, time.monotonic() - begin)
        for f, flat in local.items():
            self.shards.write(f, flat)


def build_model(cfg: Config, region: Region, vocab: int) -> torch.nn.Module:
    """The same parameters on every rank for the same seed, then spread over the region. Raises ConfigError."""
    torch.manual_seed(cfg.run.seed)
    model = build_module(cfg, vocab)
    plan = load(cfg.model.plan, "model.plan") if cfg.model.plan else None
    return parallelize(model, region, cfg.parallel, plan)


def build_averaging(cfg: Config, planes: Planes, compiled: bool) -> Averaging:
    averaging = Averaging(planes.fragments, build_codec(cfg.codec), cfg.codec.feedback_decay, shared_zeros)
    if compiled and (reason := averaging.warm(cfg.codec.error_feedback)):
        print(f"{cfg.region.name}: {reason}", flush=True)
    return averaging


def load_loss(cfg: Config) -> Any:
    loss = load(cfg.model.loss, "model.loss")
    return partial(loss, **cfg.model.loss_args) if cfg.model.loss_args else loss
