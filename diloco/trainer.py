"""The loop of one region, the same on all its ranks: inner steps, a snapshot at the boundary, a merge when a round commits."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ckpt.store import Store, StoreError
from diloco.averaging import Averaging
from diloco.checkpoints import Checkpoints
from diloco.codec import CODECS
from diloco.config import Config, build_module, load
from diloco.control import Control, Order, Status
from diloco.data import Dataset, build_source
from diloco.evaluate import evaluate
from diloco.fold import PROTOCOL, State, fold
from diloco.fragments import digest, group_parameters
from diloco.inner import Inner
from diloco.journal import Journal
from diloco.ledger import LeaseReader
from diloco.parallel import Region, layer_of, parallelize
from diloco.planes import Planes
from diloco.report import Reporter
from diloco.shards import Shards
from elastic import rounds
from elastic.coordinator import Coordinator
from elastic.exchange import Exchanger
from elastic.lighthouse import Membership
from elastic.node import Node
from elastic.recovery import fetch


@dataclass
class Snapshot:
    """What this region put into a round that is not decided yet. flat: local parameters then, this rank's slice."""

    key: tuple[int, int, int]
    flat: Tensor
    at: int
    """The region's inner steps then."""
    steps: int
    tokens: int


@dataclass
class Links:
    """What connects a region to the others, from `diloco.joining`. The last four are rank 0's."""

    member: str
    node: Node
    exchanger: Exchanger
    store: Store
    checkpoints: Checkpoints
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
        self.source = build_source(cfg.data)
        self.dataset = Dataset(self.source, cfg.inner.seq_len, cfg.data.holdout, cfg.run.seed)
        self.model = build_model(cfg, region, self.source.vocab)
        shapes = [(name, tuple(p.shape)) for name, p in self.model.named_parameters()]
        self.fragments = group_parameters(shapes, layer_of(self.model), cfg.outer.fragments)
        self.inner = Inner(cfg.inner, self.model, load_loss(cfg), region)
        self.shards = Shards(self.model, self.fragments, region)
        slices = [self.shards.blocks(f.index) for f in self.fragments]
        self.planes = Planes(self.fragments, slices)
        self.averaging = Averaging(self.fragments, CODECS[cfg.codec.name])
        self.reader = LeaseReader()
        self.report = Reporter(cfg, region, self.source.bytes_per_token)
        self.snapshot: Snapshot | None = None
        self.steps = 0
        """Inner steps of this region in this run."""
        self.since = 0
        """Inner steps since the last boundary."""
        self.work = [[0, 0] for _ in self.fragments]
        """[steps, tokens] of each fragment since its last contribution that was used."""
        self.stored: dict[int, str] = {}
        """seq -> attempt of the rounds whose bits may be in the store."""
        self.at_theta: set[int] = set()
        """Fragments whose local parameters equal theta."""

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
            "data": self.source.digest[:16],
            "seq_len": self.cfg.inner.seq_len,
        }

    # The loop

    def train(self) -> Order:
        """Until the journal says stop, or this region leaves. Returns the last order, which says why."""
        while not (order := self.next_order()).end:
            for entry in order.entries:
                self.apply(entry.encode())
            if order.ask:
                self.contribute(*order.ask)
            if order.step:
                self.inner_step()
        return order

    def next_order(self) -> Order:
        """Rank 0's decision, broadcast: inside a region nobody has an opinion of his own."""
        data = None
        if self.links.control is not None:
            status = Status(self.since, self.snapshot is not None, self.reader.available())
            data = self.links.control.next(self.state, status).encode()
        return Order.decode(self.region.broadcast_bytes(data))

    def inner_step(self) -> None:
        indices = self.reader.take(self.cfg.inner.batch)
        mine = self.cfg.inner.batch // self.region.dp
        tokens = self.dataset.batch(indices[self.region.dp_rank * mine : (self.region.dp_rank + 1) * mine])
        self.since, self.steps = self.since + 1, self.steps + 1
        begin = time.monotonic()
        stats = self.inner.step(tokens, self.progress())
        self.report.step(self, stats, time.monotonic() - begin)
        for work in self.work:
            work[0] += 1
            work[1] += self.tokens_per_step
        self.at_theta.clear()

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.inner.batch * self.cfg.inner.seq_len

    def progress(self) -> float:
        return self.state.progress(self.since, self.since * self.tokens_per_step)

    # A round

    def contribute(self, fragment: int, epoch: int, base: int) -> None:
        """Snapshots the fragment, offers the encoded pseudo-gradient to the exchange, and answers. Collective."""
        flat = self.shards.read(fragment)
        blocks = self.planes.slices[fragment]
        encoded, squares = self.averaging.encode_difference(fragment, *blocks, self.planes.theta[fragment], flat)
        norm = math.sqrt(self.region.all_reduce_sum(squares).item())
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"fragment {fragment} has parameters that are not finite: this region diverged and sends nothing; lower "
                "inner.lr, or restart it to go on from the run's parameters"
            )
        key = (epoch, fragment, base)
        self.links.exchanger.offer(key, encoded)
        steps, tokens = self.work[fragment]
        self.snapshot, self.since = Snapshot(key, flat, self.steps, steps, tokens), 0
        answer = {
            "tokens": tokens,
            "steps": steps,
            "norm": norm,
            "theta": self.digest("theta", fragment),
            "momentum": self.digest("momentum", fragment),
            "leases": self.reader.claims(),
        }
        if self.links.coordinator is not None:
            self.links.coordinator.post(rounds.Answered(fragment, epoch, base, answer))

    def digest(self, plane: str, fragment: int) -> str:
        """Of a whole plane, from the ranks' block digests. Collective."""
        return digest(b"".join(self.region.gather_bytes(self.planes.digests(plane, fragment))))

    def apply(self, data: bytes) -> None:
        """The journal moved by one entry. Collective."""
        before, self.state = self.state, fold(self.state, data)
        entry = json.loads(data)
        if entry["kind"] == "round":
            self.merge(before, entry)
        elif entry["kind"] == "rewind":
            self.reset()
        if self.links.member in self.state.members:
            self.reader.update(self.state.members[self.links.member].leases)

    def merge(self, before: State, entry: dict[str, Any]) -> None:
        """A committed round: the outer step, and what is due after it."""
        self.stored[entry["seq"]] = entry["attempt"]
        if self.planes.bases[entry["fragment"]] >= entry["seq"]:
            return  # these planes came from a peer or a checkpoint that had it already
        squares = self.combine(entry)  # a scope of its own: the snapshot is gone when others need the memory
        self.after_round(before, entry, squares)

    def combine(self, entry: dict[str, Any]) -> Tensor:
        """The outer step, and x <- theta' + p with p = x - s if my contribution was used, x - b if not (b, my base, is the
        theta before the step): what I did since is neither lost nor counted twice. Returns what `outer_step` does."""
        f = entry["fragment"]
        key = (entry["epoch"], f, entry["base"])
        snapshot = self.snapshot if self.snapshot is not None and self.snapshot.key == key else None
        used = snapshot if self.links.member in [answer["member"] for answer in entry["answers"]] else None
        bits = self.links.exchanger.result(entry["attempt"])
        if bits is None:
            bits = self.fetch_bits(entry)
        idle = used is not None and used.at == self.steps
        progress = None if idle else self.shards.read(f).sub_(used.flat if used else self.planes.theta[f])
        squares = self.outer_step(entry, bits)
        theta = self.planes.theta[f]
        self.shards.write(f, theta if progress is None else progress.add_(theta))
        if used is not None:
            self.work[f] = [self.work[f][0] - used.steps, self.work[f][1] - used.tokens]
        else:
            self.since = 0  # counted from the last merge
        if idle:
            self.at_theta.add(f)
        self.snapshot = None if snapshot is not None else self.snapshot
        self.links.exchanger.decided(key)
        return squares

    def outer_step(self, entry: dict[str, Any], bits: Tensor) -> Tensor:
        """Theta and momentum after a round, from its bits in this rank's slice. Returns the sum of the squares of the
        averaged pseudo-gradient there."""
        f, settings = entry["fragment"], self.state.settings
        first, last = self.planes.slices[f]
        gradients = self.averaging.decode_runs(f, first, last, bits)
        return self.planes.step(f, entry["seq"], gradients, settings.lr, settings.momentum, bits)

    def fetch_bits(self, entry: dict[str, Any]) -> Tensor:
        """This rank's slice of a committed round that it took no part in: from a member, else from the store. Raises
        OSError if nobody has it. Collective."""
        f = entry["fragment"]
        donors = [m.endpoints for m in self.state.members.values() if m.id != self.links.member]
        blocks, (first, last) = self.fragments[f].blocks, self.planes.slices[f]
        bits: Tensor | None
        try:
            pieces = fetch(self.links.node, donors, blocks, f"bits/{entry['seq']}", f, first, last)
            bits = torch.cat([torch.empty(0, dtype=torch.uint8), *(piece.data for piece in pieces)])
        except OSError:
            size = partial(self.averaging.size, f)
            bits = self.links.checkpoints.load_bits(entry["attempt"], first, last, size)
        digests = b"" if bits is None else self.averaging.digests(f, first, last, bits)
        whole = digest(b"".join(self.region.gather_bytes(digests)))
        if bits is None or whole != entry["digest"]:
            raise OSError(f"the bits of journal entry {entry['seq']} are neither with a member nor in the store")
        return bits

    def serve_blocks(self, plane: str, fragment: int, first: int, last: int) -> tuple[int, Tensor] | None:
        """What other members fetch: blocks of theta or momentum, or the bits of a recent round."""
        if not plane.startswith("bits/"):
            return self.planes.read(plane, fragment, first, last)
        seq = int(plane.removeprefix("bits/"))
        of, bits = self.planes.bits.get(seq, (-1, torch.empty(0)))
        mine = self.planes.slices[fragment]
        if of != fragment or not mine[0] <= first <= last <= mine[1]:
            return None
        begin = self.averaging.size(fragment, mine[0], first)
        return seq, bits[begin : begin + self.averaging.size(fragment, first, last)]

    def reset(self) -> None:
        """Everything as at the checkpoint that the epoch starts from; AdamW's moments afresh. Collective."""
        self.links.exchanger.forget()
        self.links.checkpoints.load_prefix(self.state, self.planes)
        self.adopt()

    def adopt(self) -> None:
        """x <- theta in all fragments, nothing in flight, fresh moments. Collective."""
        for f in range(len(self.fragments)):
            self.shards.write(f, self.planes.theta[f])
        self.at_theta = set(range(len(self.fragments)))
        self.inner.optimizer.state.clear()
        self.inner.materialise()
        self.snapshot, self.since = None, 0
        self.work = [[0, 0] for _ in self.fragments]

    def resume_from(self, progress: dict[str, Any]) -> None:
        """The counters that `save` wrote with this region's own planes."""
        self.steps, self.since, self.work = progress["steps"], progress["since"], progress["work"]
        self.at_theta = set(progress["at_theta"])

    def after_round(self, before: State, entry: dict[str, Any], squares: Tensor) -> None:
        """Report, evaluate and save what is due. Collective."""
        f, rounds_done = entry["fragment"], self.state.rounds
        norm = math.sqrt(self.region.all_reduce_sum(squares).item())
        self.report.round(self, before, entry, norm, self.digest("theta", f))
        ending = self.state.finished is not None
        if ending or (self.cfg.run.eval_every and rounds_done % self.cfg.run.eval_every == 0):
            self.evaluate()
        if ending or rounds_done % self.cfg.ckpt.every == 0:
            self.save(entry["answers"][0]["member"] == self.links.member)

    def evaluate(self) -> None:
        """Held-out loss of the global parameters: theta goes into the model for it, and the local parameters back."""
        away = [f for f in range(len(self.fragments)) if f not in self.at_theta]
        local = {f: self.shards.read(f) for f in away}
        for f in away:
            self.shards.write(f, self.planes.theta[f])
        begin = time.monotonic()
        sequences, micro_batch = self.cfg.run.eval_sequences, self.inner.micro_batch
        nll, tokens = evaluate(self.model, self.inner.loss, self.dataset, self.region, sequences, micro_batch)
        self.report.evaluation(self.state.rounds, nll, tokens, time.monotonic() - begin)
        for f, flat in local.items():
            self.shards.write(f, flat)

    def save(self, mine: bool) -> None:
        """The region's own planes, and the global ones if it is this member's turn. A store that is away costs this
        checkpoint, not the run: the bits of its rounds stay until a later one is whole. Collective."""
        try:
            self._save(mine)
        except StoreError as error:
            self.report.not_saved(self.state.seq, str(error))

    def _save(self, mine: bool) -> None:
        checkpoints = self.links.checkpoints
        progress = {"steps": self.steps, "since": self.since, "work": self.work, "adam": self.inner.updates}
        progress["at_theta"] = sorted(self.at_theta)
        checkpoints.save_own(self.cfg.region.name, self.state, self.inner, progress)
        if mine:
            prefix = checkpoints.save(self.planes, self.state, self.links.member)
            self.report.saved(prefix, self.state.seq)
            if self.region.rank == 0:
                self.stored = checkpoints.drop_bits(self.stored)


def build_model(cfg: Config, region: Region, vocab: int) -> torch.nn.Module:
    """The same parameters on every rank for the same seed, then spread over the region. Raises ConfigError."""
    torch.manual_seed(cfg.run.seed)
    model = build_module(cfg, vocab)
    plan = load(cfg.model.plan, "model.plan") if cfg.model.plan else None
    return parallelize(model, region, cfg.parallel, plan)


def load_loss(cfg: Config) -> Any:
    loss = load(cfg.model.loss, "model.loss")
    return partial(loss, **cfg.model.loss_args) if cfg.model.loss_args else loss
