"""The settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.catalog import named
from ckpt.store import StoreError
from diloco.errors import ConfigError


@dataclass
class CkptConfig:
    """Checkpoints."""

    every: int = 1
    """Rounds between two checkpoints; one is written at the end in any case."""
    keep: int = 3
    """The newest checkpoints stay, so many of them, and the first."""
    keep_every: int = 0
    """And those after a multiple of so many rounds; 0: none of them."""
    grace: float = 900.0
    """Seconds that the shards of a checkpoint stay after it was removed, for who is reading them, and what a killed save
    left after its last object."""
    upload_deadline: float = 600.0
    """Seconds after which an upload that the store refuses is given up."""
    linger: float = 120.0
    """Seconds for which the memory that a rank saves from outlives its death, for who is started in its place on the same
    machine; 0: it does not."""
    make_up_after: float = 10.0
    """Seconds (or twice what the own upload took, if that is more) after which a region uploads what another one has not."""
    durable: bool = True
    """Store a round's bits before it is committed: then nothing committed is ever lost, at one upload of the encoded
    parameters per round. false: if every region dies at once, the run goes back to the newest checkpoint."""
    lost_wait: float = 30.0
    """Seconds that a region which cannot get a round's bits leaves to whoever has them, before the run goes back to a
    checkpoint."""
    resume: str = "auto"
    """auto: go on from the newest state of the run if there is one; never: refuse to; URL[@ENTRY] of a checkpoint, of another
    run or from python -m ckpt import: a new run starts from it."""


def source(cfg: CkptConfig) -> str:
    """Which checkpoint a new run is to start from, as python -m ckpt names it; empty: from fresh parameters."""
    return "" if cfg.resume in ("auto", "never") else cfg.resume


def validate(cfg: CkptConfig) -> None:
    """Raises ConfigError for what cannot work; opens nothing."""
    if url := source(cfg):
        _validate_source(url)
    if cfg.every < 1 or cfg.keep < 1:
        raise ConfigError(f"ckpt.every={cfg.every} and ckpt.keep={cfg.keep} must be at least 1: raise them")
    if cfg.keep_every < 0 or cfg.grace < 0:
        raise ConfigError(f"ckpt.keep_every={cfg.keep_every} and ckpt.grace={cfg.grace} must be at least 0: raise them")
    if cfg.upload_deadline < 1 or cfg.make_up_after <= 0:
        raise ConfigError(
            f"ckpt.upload_deadline={cfg.upload_deadline} must be at least 1 and ckpt.make_up_after={cfg.make_up_after} "
            "above 0 seconds: raise them"
        )
    if not 0 <= cfg.linger <= 86400:
        raise ConfigError(
            f"ckpt.linger={cfg.linger} is not from 0 to 86400 seconds: set it to about 120, or 0 for none"
        )
    if cfg.lost_wait < 5:
        raise ConfigError(
            f"ckpt.lost_wait={cfg.lost_wait} is too short for who has the bits to say so: set it to at least 5 seconds"
        )


def _validate_source(url: str) -> None:
    if "/" not in url:
        raise ConfigError(f"ckpt.resume={url} is not known: set it to auto, never or the URL[@ENTRY] of a checkpoint")
    try:
        named(url)
    except StoreError as error:
        raise ConfigError(
            f"ckpt.resume={url} cannot be used ({error}): set it to a directory or an fsspec URL such as s3://bucket/run"
        ) from error
