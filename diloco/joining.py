"""Opening or joining a run: from a built Trainer to a member that takes part in rounds, and out again."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

from ckpt.store import Store
from diloco.bits import serve_blocks
from diloco.checkpoints import Checkpoints, describe
from diloco.config import Config, build_security, store_url
from diloco.control import Control, Limits, RunLedger, expelled
from diloco.errors import ConfigError
from diloco.exchanging import Setup, published
from diloco.fold import PROTOCOL, Settings, State, canonical, fold_all
from diloco.fragments import digest
from diloco.journal import Journal
from diloco.looking import look, take_directory
from diloco.mixing import MixedFacts, Samples, index_of
from diloco.parallel import Region, on_rank_0
from diloco.regional import Own
from diloco.resetting import resume_samples
from diloco.restoring import restore
from diloco.saving import Saver
from diloco.starting import check_start, start
from diloco.trainer import Links, Trainer
from elastic import probing, recovery
from elastic.addresses import own_host
from elastic.coordinator import Coordinator
from elastic.lighthouse import Membership, reach
from elastic.memory import Pipe
from elastic.node import Identity, Node
from elastic.process import Exchange
from elastic.pulse import step_aside
from elastic.ranks import Ranks, follow
from elastic.rounds import Rounds
from elastic.timing import Timing


def join(trainer: Trainer, stack: ExitStack, exchanges: Pipe) -> None:
    """exchanges: to the process that is to do this rank's exchanges. Collective. Raises ConfigError, before anything is
    written, if this region does not fit the run."""
    cfg, region = trainer.cfg, trainer.region
    check_ranks(region, data_of(trainer.dataset, trainer.own, trainer.eval_sets))
    store = Store(store_url(cfg))
    journal = Journal(store)
    on_rank_0(region, lambda: look(cfg, journal, stack))
    entries = _open(trainer, store, journal)
    state = fold_all(entries)
    assert state is not None
    trainer.state = state
    on_rank_0(region, lambda: _check(trainer, store, state))
    if region.rank == 0:
        take_directory(cfg, state.run)
    data = _connect(trainer, store, stack, exchanges)
    restore(trainer, journal, entries)
    inside = [e.decode() for e in region.gather_bytes(trainer.links.node.endpoint.encode())]
    outside = [e.decode() for e in region.gather_bytes(_published(trainer).encode())]
    _become_member(trainer, journal, outside, [e.decode() for e in region.gather_bytes(data.encode())])
    if region.rank == 0:
        _take_control(trainer, journal, inside, outside[0], stack)
    trainer.report.open(trainer)


# The run


def data_of(data: Samples, own: Sequence[Own], sets: Mapping[str, Samples]) -> dict[str, list[Any]]:
    """Key -> training and held-out windows and digest of what this rank has there. Text is hashed by rank 0 alone, for the
    fingerprint: of it the windows have to do."""
    parts: dict[str, Samples] = {"data": data, **{f"region.sources[{k}]": each.samples for k, each in enumerate(own)}}
    parts |= {f"run.eval_sets ({name})": each for name, each in sets.items() if each not in parts.values()}
    return {key: [part.train_windows, part.heldout_windows, _digest_of(part)] for key, part in parts.items()}


def _digest_of(part: Samples) -> str:
    cheap = isinstance(part.source, MixedFacts) or index_of(part.source) is not None
    return part.source.digest if cheap else ""


def check_ranks(region: Region, mine: dict[str, list[Any]]) -> None:
    """All ranks have the same data. Raises ConfigError on all of them. Collective."""
    ranks = [json.loads(data) for data in region.gather_bytes(json.dumps(mine).encode())]
    for rank, theirs in enumerate(ranks):
        for key, facts in ranks[0].items():
            if theirs[key] != facts:
                raise ConfigError(
                    f"{key} is not the same on all ranks of this region, training and held-out sequences and digest are "
                    f"{theirs[key]} on rank {rank} and {facts} on rank 0: copy it again where it is wrong"
                )


def max_local_steps(cfg: Config) -> int:
    if cfg.outer.optimizer == "adamw":
        return 0  # gradients are of the common parameters
    return cfg.elastic.max_local_steps or 4 * cfg.outer.sync_every


def settings_of(cfg: Config, epoch: int) -> Settings:
    """epoch: samples of a pass over `data`."""
    return Settings(
        sync_every=cfg.outer.sync_every,
        lr=cfg.outer.lr,
        momentum=cfg.outer.momentum,
        boundary=cfg.outer.boundary,
        rounds=cfg.run.rounds,
        tokens=cfg.run.tokens,
        samples=None if cfg.run.epochs is None else cfg.run.epochs * epoch,
        seq_len=cfg.inner.seq_len,
        seed=cfg.run.seed,
        ahead=max_local_steps(cfg) + cfg.outer.sync_every + cfg.outer.max_overlap_steps,
        lease_rounds=cfg.elastic.lease_rounds,
        start_regions=cfg.elastic.start_regions,
        max_norm_ratio=cfg.elastic.max_norm_ratio,
    )


def _open(trainer: Trainer, store: Store, journal: Journal) -> list[bytes]:
    """The journal's entries so far, the same on all ranks. Opens the run if there is none: theta_0 is stored first, then
    `open` is created; if another region was faster, its run it is."""
    region = trainer.region
    empty = region.rank == 0 and journal.state is None
    run = region.broadcast_bytes(secrets.token_hex(8).encode() if empty else None).decode()
    if run:
        checkpoints = _checkpoints(trainer, store, run)
        prefix = checkpoints.save_first(trainer.planes, start(trainer, checkpoints))
        if region.rank == 0:
            fields = {
                "kind": "open",
                "protocol": PROTOCOL,
                "run": run,
                "checkpoint": prefix,
                "fingerprint": trainer.fingerprint(),
                "settings": asdict(settings_of(trainer.cfg, trainer.dataset.train_windows)),
            }
            journal.append(fields)
    return _spread(trainer, _reread(journal) if region.rank == 0 else [])


def _checkpoints(trainer: Trainer, store: Store, run: str) -> Checkpoints:
    cfg = trainer.cfg
    model = describe(trainer.model, cfg.model, cfg.inner.seq_len)
    return Checkpoints(store, run, trainer.region, trainer.shards, cfg.ckpt, model)


def _reread(journal: Journal) -> list[bytes]:
    """All entries from 0."""
    journal.state = None
    return journal.read()


def _spread(trainer: Trainer, entries: list[bytes]) -> list[bytes]:
    data = trainer.region.broadcast_bytes(json.dumps([e.decode() for e in entries]).encode())
    return [entry.encode() for entry in json.loads(data)]


_MEANS = {
    "model": "model",
    "parameters": "the number of parameters (model.args)",
    "fragments": "outer.fragments",
    "codec": "codec",
    "data": "the digest of the data (data.path, data.sources)",
    "windows": "the number of training sequences (data.holdout)",
    "mixture": "the names and weights of data.sources and data.phases",
    "shuffle": "the windows that are shuffled together (data.shuffle)",
    "seq_len": "inner.seq_len",
    "end": "the token that ends documents (model.loss_args.end)",
    "outer": "outer.optimizer, with the numbers of inner that an outer AdamW takes,",
}
"""Keys of the fingerprint -> keys of the config."""


def _check(trainer: Trainer, store: Store, state: State) -> None:
    """This region and the run fit. Raises ConfigError with both values."""
    cfg, mine = trainer.cfg, trainer.fingerprint()
    where = f"the run in {store_url(cfg)}"
    check_start(cfg, store, state.run)
    if cfg.ckpt.resume == "never" and state.rounds > 0:
        raise ConfigError(f"ckpt.resume=never, but {where} has {state.rounds} rounds: set run.dir to a new directory")
    for key, value in state.fingerprint.items():
        if mine.get(key) != value:
            raise ConfigError(
                f"{where} is of another kind, {_MEANS.get(key, key)} is {value} there and {mine.get(key)} here: use its "
                "settings, or set run.dir to a new directory"
            )
    if state.settings.seed != cfg.run.seed:
        raise ConfigError(
            f"run.seed={cfg.run.seed}, but {where} was begun with {state.settings.seed}, and the order of its samples is made "
            f"of that: set run.seed={state.settings.seed}"
        )
    if cfg.region.name in state.expelled:
        raise ConfigError(f"region.name={expelled(cfg.region.name)}")
    if state.stopped is not None:
        raise ConfigError(f"{where} has ended ({state.stopped}): set run.dir to a new directory")
    _check_own(trainer, state, where)
    for key, value in asdict(settings_of(cfg, trainer.dataset.train_windows)).items():
        if getattr(state.settings, key) != value:
            print(f"warning: {key}={value} is ignored, the run goes by {getattr(state.settings, key)}", flush=True)


def _check_own(trainer: Trainer, state: State, where: str) -> None:
    for k, own in enumerate(trainer.own):
        if (known := state.sources.get(f"{trainer.cfg.region.name}/{own.name}", own.digest)) != own.digest:
            raise ConfigError(
                f"region.sources[{k}] ({own.name}) is other data than {where} has had under that name, its digest is {known} "
                f"there and {own.digest} here: use that data with its inner.seq_len and run.seed, or another name"
            )


# The network


def _connect(trainer: Trainer, store: Store, stack: ExitStack, exchanges: Pipe) -> str:
    """Two listening ports for every rank, one of them its exchanges'; nobody knows of them before `join` is in the journal.
    Returns the endpoint of the exchanges."""
    cfg, region, state = trainer.cfg, trainer.region, trainer.state
    member = f"{cfg.region.name}_{secrets.randbelow(10**9)}"
    member = region.broadcast_bytes(member.encode() if region.rank == 0 else None).decode()
    node = Node(_host(cfg), security=build_security(cfg))
    stack.callback(node.close)
    node.identity = Identity(state.run, canonical(dict(state.fingerprint)).decode(), member, region.rank)
    exchanger = Exchange(exchanges, partial(_lost, member))
    stack.callback(exchanger.close)
    recovery.serve(node, partial(serve_blocks, trainer), cfg.elastic.congestion)
    probing.serve(node, cfg.elastic.congestion)
    if region.rank != 0:
        follow(node, exchanger)
    checkpoints = _checkpoints(trainer, store, state.run)
    saver = Saver(checkpoints, trainer.planes, trainer.inner, member, cfg.region.name)
    stack.callback(saver.close)
    trainer.links = Links(member, node, exchanger, store, checkpoints, saver)
    answer = exchanger.open(_setup(trainer).message())
    if "error" in answer:
        raise _no_gateway(cfg, answer["error"])
    return str(answer["endpoint"])


def _setup(trainer: Trainer) -> Setup:
    """What the process of this rank's exchanges has to know."""
    cfg, elastic, links = trainer.cfg, trainer.cfg.elastic, trainer.links
    return Setup(
        identity=vars(links.node.identity),
        host=_host(cfg),
        security=asdict(links.node.security),
        gateway=elastic.gateway,
        dial_only=elastic.dial_only,
        elements=[fragment.elements for fragment in trainer.fragments],
        block=trainer.fragments[0].block,
        codec=asdict(cfg.codec),
        compile=trainer.compiled,
        stall=elastic.stall_timeout,
        streams=elastic.streams,
        congestion=elastic.congestion,
        store=links.store.url,
    )


def _lost(member: str) -> NoReturn:
    """This rank ends as if it had crashed: what it held of rounds under way is gone."""
    print(f"{member}: the process of this rank's exchanges has ended, and so this rank does: see above", flush=True)
    os._exit(1)


def _host(cfg: Config) -> str:
    try:
        return own_host(cfg.elastic.host, cfg.elastic.lighthouse)
    except OSError as error:
        raise ConfigError(
            f"elastic.lighthouse={cfg.elastic.lighthouse} does not tell under which address others reach this machine ({error}): "
            "set elastic.host to that"
        ) from error


def _published(trainer: Trainer) -> str:
    """The endpoint under which other regions dial this rank; empty if they cannot."""
    elastic, links = trainer.cfg.elastic, trainer.links
    try:
        return published(links.node, elastic.gateway, elastic.dial_only, f"{links.member}.{trainer.region.rank}")
    except OSError as error:
        raise _no_gateway(trainer.cfg, str(error)) from error


def _no_gateway(cfg: Config, error: str) -> ConfigError:
    return ConfigError(
        f"elastic.gateway={cfg.elastic.gateway} does not answer as one ({error}): start it there with python -m "
        "elastic.gateway"
    )


# Membership


def _become_member(trainer: Trainer, journal: Journal, endpoints: list[str], data: list[str]) -> None:
    """Appends `join` and applies what came before it. Collective."""
    region, joined = trainer.region, False
    while not joined and trainer.state.stopped is None:
        new: list[bytes] = []
        if region.rank == 0:
            fields = {
                "kind": "join",
                "member": trainer.links.member,
                "region": trainer.cfg.region.name,
                "endpoints": endpoints,
                "data": data,
                "samples_per_step": trainer.cfg.inner.batch,
                "sources": [[own.name, str(own.share), own.digest] for own in trainer.own],
            }
            journal.append(fields)
            new = journal.read()
        for entry in _spread(trainer, new):
            trainer.apply(entry)
            if not joined and trainer.cfg.region.name in trainer.state.expelled:
                raise ConfigError(f"region.name={expelled(trainer.cfg.region.name)}")
            joined = joined or trainer.links.member in trainer.state.members  # once: who was succeeded stays out
        if not joined:  # an entry of other data under the name of an own source would make `join` invalid for ever
            on_rank_0(region, lambda: _check_own(trainer, trainer.state, f"the run in {store_url(trainer.cfg)}"))
    resume_samples(trainer)


def _take_control(trainer: Trainer, journal: Journal, inside: list[str], outside: str, stack: ExitStack) -> None:
    """Rank 0: from now on the coordinator's thread owns the journal. inside: where it reaches its own ranks; outside: where
    other regions reach it."""
    cfg, links = trainer.cfg, trainer.links
    ranks = Ranks(links.node, links.exchanger, inside)
    machine = Rounds(links.member, cfg.elastic.start_regions, cfg.elastic.min_regions, cfg.ckpt.durable)
    timing = Timing(cfg.elastic.peer_timeout, cfg.elastic.stall_timeout)
    ledger = RunLedger(journal, cfg.elastic.start_patience)
    links.coordinator = Coordinator(links.node, ranks, ledger, machine, timing, digest)
    links.journal = journal
    limits = Limits(cfg.inner.batch, cfg.outer.max_overlap_steps, max_local_steps(cfg))
    control = links.control = Control(links.coordinator, ledger, links.member, limits, cfg.elastic.hang_timeout)
    links.coordinator.watch = partial(step_aside, links.coordinator, control.pulse)
    entrance = stack.enter_context(reach(cfg.elastic.lighthouse, links.node.security, links.member))
    links.membership = Membership(
        entrance.address if entrance else cfg.elastic.lighthouse,
        links.member,
        outside,
        trainer.state.run,
        lambda: not control.pulse.late(),
        links.coordinator.meet,
    )
    stack.callback(links.membership.close)
    links.coordinator.seek = links.membership.ask
    links.coordinator.meet({m.id: m.endpoints[0] for m in trainer.state.members.values()})
    links.membership.ask()
    links.coordinator.start()
