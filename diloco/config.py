"""The config as dataclasses, each owned by its module, and everything that is checked before a socket or a device."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.errors import OverrideParseException
from torch import nn

from ckpt.store import Store, StoreError
from diloco import checkpointing, inner, loading, parallel, tracker
from diloco.checkpointing import CkptConfig
from diloco.codec import CODECS, CodecConfig
from diloco.data import DataConfig
from diloco.errors import ConfigError
from diloco.evaluate import build_eval_sets
from diloco.inner import InnerConfig
from diloco.mixing import build_samples, check_end
from diloco.outer import OuterConfig
from diloco.parallel import ParallelConfig
from diloco.regional import Regional, RegionConfig, build_own
from diloco.tracker import TrackerConfig
from diloco.typed import convert
from elastic.addresses import host_port, is_local
from elastic.lighthouse import ElasticConfig
from elastic.security import ENVIRONMENT, REGION_NAME, Security, SecurityError, choose
from elastic.tcp import MAX_STREAMS


@dataclass
class RunConfig:
    """What is common to all regions of the run, and where it lives."""

    name: str = "default"
    dir: str = "runs/default"
    """Holds <region>/metrics.jsonl of each region on this machine and, unless run.store says otherwise, the store."""
    store: str = ""
    """Journal and checkpoints: any fsspec URL that all regions reach; empty: the directory <run.dir>/store."""
    rounds: int | None = None
    """Stop after this many rounds (outer steps of one fragment)."""
    tokens: int | None = None
    """Stop after this many tokens of all regions in committed rounds."""
    epochs: int | None = None
    """Stop once every sample of so many passes over `data` is in a committed round, or dropped."""
    seed: int = 0
    report_every: int = 10
    """Inner steps between two report lines."""
    eval_every: int = 1
    """Rounds between two evaluations; 0: only at the end."""
    eval_sequences: int = 32
    """Held-out sequences of an evaluation."""
    eval_sets: list[Any] = field(default_factory=list)
    """More to evaluate on: {name: books, path: DIR}, keys in place of those of `data`. Its held-out part, or all of it."""


@dataclass
class ModelConfig:
    """The model, by dotted path."""

    target: str = "diloco.model.build_llama"
    """Callable that returns an nn.Module; gets `args`."""
    args: dict[str, Any] = field(default_factory=dict)
    loss: str = "diloco.model.next_token_loss"
    """Callable (model, tokens [B, T+1], **loss_args) -> (objective, mean nll in nats per token)."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    plan: str | None = None
    """Callable (model, tp) -> tensor-parallel plan; needed for parallel.tp > 1 only."""


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config from plain values. Raises ConfigError on an unknown key or a value of the wrong type."""
    config = _build(Config, values, "")
    assert isinstance(config, Config)
    return config


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """All dotted keys that there are."""
    found: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        group = dataclasses.is_dataclass(hint)
        found += keys(typing.cast(type, hint), f"{prefix}{name}.") if group else [prefix + name]
    return found


def unknown_key(key: str) -> ConfigError:
    """The sentence for a key that does not exist, naming the nearest that does."""
    if key in keys() or key.rpartition(".")[0] in keys():  # below a key whose value is a mapping
        return ConfigError(f"{key} has nothing of that name to override: add it with a plus, +{key}=VALUE")
    near = difflib.get_close_matches(key, keys(), n=1) or [k for k in keys() if k.endswith("." + key.split(".")[-1])]
    hint = f"did you mean {near[0]}?" if near else f"the groups are {', '.join(typing.get_type_hints(Config))}"
    return ConfigError(f"unknown key {key}: {hint}")


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's several lines about the overrides as one sentence with the key and the fix."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override} is not an override: write key=value, with quotes around odd characters")
    if match := re.search(r"Could not override '([^']+)'.*default list use (\+\S+)", text, re.DOTALL):
        return ConfigError(f"{match[1]} is not in the config yet: add it with a plus, {match[2]}")
    if match := re.search(r"An item is already at '([^']+)'", text):
        return ConfigError(f"{match[1]} is in the config already: set it without the plus, {match[1]}=VALUE")
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(r"Could not find '([^'/]+)/([^']*)'", text):
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return ConfigError(f"{match[1]}={match[2]} does not exist: set it to one of {', '.join(options)}")
    if match := re.search(r"Missing mandatory value: .*full_key: (\S+)", text, re.DOTALL):
        return ConfigError(f"{match[1]} is not set: add {match[1]}=VALUE")
    return ConfigError(f"{' '.join(overrides)} cannot be composed: {' '.join(text.split())}")


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise unknown_key(f"{prefix}{name}")
    built = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{key}={value} is not a group: set the keys below it, such as {keys(typing.cast(type, hints[name]))[0]}"
                )
            built[name] = _build(typing.cast(type, hints[name]), value, f"{key}.")
        else:
            built[name] = convert(value, hints[name], key)
    return cls(**built)


def load(path: str, key: str) -> Any:
    """The object at a dotted path. Raises ConfigError naming `key`."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}={path} cannot be loaded ({error}): set it to package.module.name") from error


def store_url(cfg: Config) -> str:
    return cfg.run.store or f"{cfg.run.dir}/store"


def validate(cfg: Config, world: int) -> None:
    """Raises ConfigError for anything that cannot work, without touching a socket or a device, or writing a file."""
    validate_anywhere(cfg, world)
    _validate_places(cfg)
    tracker.validate(cfg.tracker)
    parallel.validate(cfg.parallel, world)
    _validate_network(cfg)
    samples = build_samples(cfg.data, cfg.inner.seq_len, cfg.run.seed)
    check_end(cfg.model.loss_args, samples.source)
    sets = build_eval_sets(cfg.data, cfg.run.eval_sets, samples, cfg.inner.seq_len)
    own = build_own(cfg.region, cfg.data, samples.source, cfg.inner.seq_len, cfg.run.seed)
    loading.check(Regional(samples, own), cfg.data.workers)
    _validate_model(cfg, max(each.source.vocab for each in (samples, *sets.values())))


def validate_anywhere(cfg: Config, world: int) -> None:
    """Of `validate`, what can be told on any machine. Raises ConfigError."""
    _validate_run(cfg)
    validate_method(cfg)
    parallel.validate_mesh(cfg.parallel, world)
    inner.validate(cfg.inner, world // cfg.parallel.tp)
    addresses(cfg)
    if not 0 <= cfg.elastic.streams <= MAX_STREAMS:
        raise ConfigError(f"elastic.streams={cfg.elastic.streams}: set it to 0 (automatic) or up to {MAX_STREAMS}")


def validate_method(cfg: Config) -> None:
    """Of codec, outer step and membership alone: what a plan needs to be right. Raises ConfigError."""
    _validate_codec(cfg.codec)
    _validate_outer(cfg)


def addresses(cfg: Config) -> dict[str, str]:
    """Keys of elastic -> hosts that they name. Raises ConfigError."""
    elastic, hosts = cfg.elastic, {}
    for key, address in {"lighthouse": elastic.lighthouse, "gateway": elastic.gateway or "127.0.0.1:0"}.items():
        try:
            hosts[key] = host_port(address)[0]
        except ValueError as error:
            raise ConfigError(f"elastic.{key}: {error}") from error
    return {**hosts, **({"host": elastic.host} if elastic.host else {})}


def _validate_network(cfg: Config) -> None:
    public = [f"{key}={getattr(cfg.elastic, key)}" for key, host in addresses(cfg).items() if not is_local(host)]
    if not build_security(cfg).secured and public:
        raise ConfigError(
            f"elastic.{public[0]} is not loopback, and nobody has to prove that he belongs to the run: set "
            f"elastic.tls to a directory made by python -m launch.certs, or {ENVIRONMENT} to a secret, alike everywhere"
        )


def build_security(cfg: Config) -> Security:
    """What this region's connections have to prove. Raises ConfigError."""
    elastic = cfg.elastic
    try:
        security = choose(elastic.tls, elastic.secret_file, cfg.region.name)
        name = security.check()
    except SecurityError as error:
        key = f"elastic.tls={elastic.tls}" if elastic.tls else "the run secret"
        remedy = (
            "set it to what python -m launch.certs made for this region, or make that anew"
            if elastic.tls
            else (f"set {ENVIRONMENT} or elastic.secret_file to the one that all regions have")
        )
        raise ConfigError(f"{key} cannot be used: {error}: {remedy}") from error
    if security.tls and name != cfg.region.name:
        raise ConfigError(
            f"elastic.tls={elastic.tls} has the certificate of {name}, and region.name={cfg.region.name}: set one of them to fit"
        )
    return security


def _validate_run(cfg: Config) -> None:
    if not REGION_NAME.fullmatch(cfg.region.name):
        shown = f"region.name={cfg.region.name!r} is not a name" if cfg.region.name else "no region is named"
        raise ConfigError(
            f"{shown}: add +region=eu, +region=us or +region=asia, or region.name=NAME (letters, digits, . and -)"
        )
    if cfg.run.rounds is None and cfg.run.tokens is None and cfg.run.epochs is None:
        raise ConfigError(
            "run.rounds=null, run.tokens=null and run.epochs=null: set one of them, it says when the run is done"
        )
    for key in ("rounds", "tokens", "epochs", "report_every"):
        value = getattr(cfg.run, key)
        if value is not None and value < 1:
            raise ConfigError(f"run.{key}={value} must be at least 1: set it to a positive number")
    if cfg.run.epochs is not None and cfg.data.sources:
        raise ConfigError(
            f"run.epochs={cfg.run.epochs} counts passes over one source, and data.sources mixes several by weight: set "
            "run.tokens instead"
        )
    checkpointing.validate(cfg.ckpt)


def _validate_places(cfg: Config) -> None:
    directory = Path(cfg.run.dir)
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.dir={cfg.run.dir} cannot be written to, because of {nearest}: set run.dir to a directory of yours"
        )
    try:
        Store(store_url(cfg))
    except StoreError as error:
        raise ConfigError(
            f"run.store={store_url(cfg)} cannot be used ({error}): set it to a directory or an fsspec URL such as "
            "s3://bucket/run"
        ) from error


def build_module(cfg: Config, vocab: int) -> nn.Module:
    """The model on torch's default device, whole. vocab: token ids of the data are below it. Raises ConfigError."""
    target = load(cfg.model.target, "model.target")
    if cfg.model.args.get("vocab", vocab) < vocab:
        raise ConfigError(
            f"model.args.vocab={cfg.model.args['vocab']} is less than the {vocab} tokens of data.source={cfg.data.source}: "
            f"set model.args.vocab={vocab}"
        )
    try:
        model: nn.Module = target(**cfg.model.args)
    except TypeError as error:
        raise ConfigError(f"model.args={cfg.model.args} do not fit model.target={cfg.model.target}: {error}") from error
    layers = max(len(set(parallel.layer_of(model).values())), 1)
    if cfg.outer.fragments > layers:
        raise ConfigError(
            f"outer.fragments={cfg.outer.fragments} is more than the model's {layers} layers: set it to {layers} or less"
        )
    return model


def _validate_model(cfg: Config, vocab: int) -> None:
    """Builds it on the meta device, which takes no memory, for the plan to look at."""
    load(cfg.model.loss, "model.loss")
    try:
        json.dumps(cfg.model.args, allow_nan=False)  # checkpoints say what they are of
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"model.args={cfg.model.args} is not plain JSON ({error}): set them to numbers or text"
        ) from error
    plan = load(cfg.model.plan, "model.plan") if cfg.model.plan else None
    if cfg.parallel.tp > 1 and plan is None:
        raise ConfigError(f"parallel.tp={cfg.parallel.tp} needs model.plan: set it, or parallel.tp=1 (FSDP)")
    try:
        with torch.device("meta"):
            model = build_module(cfg, vocab)
    except (NotImplementedError, RuntimeError):
        return  # one that looks at its weights as it is built: the real one will tell
    if plan is not None and cfg.parallel.tp > 1:
        plan(model, cfg.parallel.tp)


def _validate_codec(codec: CodecConfig) -> None:
    if codec.name not in CODECS:
        raise ConfigError(f"codec.name={codec.name} is not known: set codec to one of {', '.join(CODECS)}")
    if codec.rounding not in ("nearest", "stochastic"):
        raise ConfigError(f"codec.rounding={codec.rounding} is not known: set it to nearest or stochastic")
    if codec.rounding == "stochastic" and codec.name not in ("int8", "int4"):
        raise ConfigError(
            f"codec.rounding=stochastic is for codec=int8 and codec=int4, not for codec={codec.name}: set it to nearest"
        )
    if not 0 < codec.feedback_decay <= 1:
        raise ConfigError(
            f"codec.feedback_decay={codec.feedback_decay} must be above 0 and at most 1: set it to 1 to keep all of the "
            "residual, or codec.error_feedback=false for none"
        )
    if codec.error_feedback and codec.name == "none":
        raise ConfigError(
            "codec.error_feedback=true has nothing to do with codec=none, which leaves nothing out: set it to false"
        )
    if codec.compile not in ("auto", "always", "never"):
        raise ConfigError(f"codec.compile={codec.compile} is not known: set it to auto, always or never")


def _validate_outer(cfg: Config) -> None:
    outer, elastic = cfg.outer, cfg.elastic
    if outer.boundary not in ("steps", "first"):
        raise ConfigError(f"outer.boundary={outer.boundary} is not known: set it to steps or first")
    if outer.fragments < 1 or outer.sync_every < 1 or outer.sync_every % outer.fragments:
        raise ConfigError(
            f"outer.sync_every={outer.sync_every} is not a multiple of outer.fragments={outer.fragments}: fragments sync "
            f"in turn every H / fragments inner steps, so set outer.sync_every to a multiple"
        )
    _validate_overlap(outer)
    if outer.optimizer not in ("nesterov", "adamw"):
        raise ConfigError(f"outer.optimizer={outer.optimizer} is not known: set it to nesterov or adamw")
    classic = (outer.sync_every, outer.fragments, outer.max_overlap_steps, outer.boundary) == (1, 1, 0, "steps")
    if outer.optimizer == "adamw" and not (classic and elastic.max_norm_ratio == 0):
        raise ConfigError(
            "outer.optimizer=adamw exchanges gradients at every step: set outer.sync_every=1, outer.fragments=1, "
            "outer.max_overlap_steps=0, outer.boundary=steps and elastic.max_norm_ratio=0, as +experiment=ddp does"
        )
    if not 0 <= outer.momentum < 1 or outer.lr <= 0:
        raise ConfigError(f"outer.lr={outer.lr} and outer.momentum={outer.momentum}: set lr > 0 and 0 <= momentum < 1")
    if elastic.max_norm_ratio != 0 and not 1 < elastic.max_norm_ratio < 1e6:
        raise ConfigError(
            f"elastic.max_norm_ratio={elastic.max_norm_ratio}: set it to a number above 1, or 0 to reject no contribution"
        )
    if elastic.join_inner not in ("peer", "fresh"):
        raise ConfigError(f"elastic.join_inner={elastic.join_inner} is not known: set it to peer or fresh")
    if not elastic.min_regions >= 1 or elastic.start_regions < elastic.min_regions:
        raise ConfigError(
            f"elastic.start_regions={elastic.start_regions} and elastic.min_regions={elastic.min_regions}: "
            "set 1 <= min_regions <= start_regions"
        )
    if not 0 <= elastic.start_patience < math.inf:
        raise ConfigError(f"elastic.start_patience={elastic.start_patience} is no time: set it to seconds, 0 or more")


def _validate_overlap(outer: OuterConfig) -> None:
    if outer.merge not in ("rebase", "mix"):
        raise ConfigError(f"outer.merge={outer.merge} is not known: set it to rebase or mix")
    if not 0 <= outer.alpha < 1:
        raise ConfigError(f"outer.alpha={outer.alpha} would take nothing over from the others: set 0 <= alpha < 1")
    if not 0 <= outer.max_overlap_steps <= outer.sync_every:
        raise ConfigError(
            f"outer.max_overlap_steps={outer.max_overlap_steps} is not between 0 and outer.sync_every={outer.sync_every}: "
            "a fragment has one exchange at a time, so set it to at most one round's steps"
        )
