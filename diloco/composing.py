"""The config from Hydra: what `diloco.train` runs, and what `launch.plan` plans, are composed alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diloco.config import Config, explain, from_dict

FLAGS = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info")
"""Hydra's flags that print something and exit."""


def compose_config(overrides: Sequence[str]) -> Config:
    """The config that Hydra makes of the overrides, as dataclasses. Raises ConfigError with one sentence."""
    try:
        with initialize_config_module("configs", version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, overrides) from error
    return from_dict(values)
