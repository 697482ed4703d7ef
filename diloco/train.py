"""`torchrun -m diloco.train +region=eu [KEY=VALUE ...]`: one region of a run, from its config to its end."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from contextlib import ExitStack
from typing import Any, NoReturn

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns at every exit of a healthy job; read at import

import hydra
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diloco.config import Config, from_dict, unknown_key, validate
from diloco.errors import ConfigError


def compose_config(overrides: list[str]) -> Config:
    """The config that Hydra makes of the overrides, as dataclasses. Raises ConfigError with one sentence."""
    try:
        with initialize_config_module("configs", version_base="1.3"):
            composed = compose("config", overrides=overrides)
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error) from error
    return from_dict(values)


def _explain(error: Exception) -> ConfigError:
    """Hydra's several lines as one sentence with the key and the fix."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return ConfigError(f"{match[1]}={match[2]} does not exist: set it to one of {', '.join(options)}")
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return ConfigError(f"{match[1]} is not set: add {match[1]}=VALUE")
    return ConfigError(f"the overrides cannot be read: {' '.join(text.split())}")


def run(cfg: Config) -> int:
    """Trains. Returns the exit code: 0 if the run stopped or this region left on purpose."""
    _hush()
    from diloco.joining import depart, join, leave_on_signals
    from diloco.parallel import open_region
    from diloco.trainer import Trainer

    with ExitStack() as stack:
        region = open_region(cfg.parallel)
        stack.callback(region.close)
        trainer = Trainer(cfg, region)
        join(trainer, stack)
        stack.callback(trainer.report.close)
        leave_on_signals(trainer)
        order = trainer.train()
        depart(trainer, order)
        return 0 if order.clean else 1


def main() -> int:
    arguments = sys.argv[1:]
    if any(a in ("-m", "--multirun") for a in arguments):
        return fail("--multirun would sweep in lockstep inside every rank: use python -m launch.sweep -m OVERRIDES")
    if any(a.startswith("-") for a in arguments):
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")(show)()
        return 0
    try:
        cfg = compose_config(arguments)
        validate(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        return run(cfg)
    except ConfigError as error:
        return fail(str(error))


def _hush() -> None:
    """Two warnings of torch 2.13 that say nothing to a user: FSDP2's about a view nobody writes to, and DTensor's about
    gathering a parameter over both mesh dims, which is what reading a flat slice is."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def show(composed: DictConfig) -> None:
    """What Hydra calls for flags that neither print nor exit by themselves."""
    raise SystemExit(fail("no such flag here: --help and --cfg job are understood, everything else is KEY=VALUE"))


def fail(sentence: str) -> int:
    """Bad input: one sentence, from one rank, exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"diloco.train: {sentence}", file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """Ends the process. Not with sys.exit: a daemon thread inside a native call (a lighthouse's quorum, which can take
    seconds) aborts the interpreter's own finalization."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
