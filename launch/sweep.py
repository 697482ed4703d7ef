"""`python -m launch.sweep -m +region=eu outer.lr=0.3,0.7`: Hydra's multirun, whose every job is a run of its own.

The config is that of diloco.train and two keys more: sweep.parallel=N jobs side by side, and sweep.dir=DIR. More regions:
'+regions=[eu, us]' instead of +region=eu. The same command again skips what is done and goes on with the rest. A job's
result is its final held-out loss, so that sweepers such as Optuna work too; docs/sweeps.md has them and Ray.

    python -m launch.sweep report DIR      the table, the CSV and the picture of a sweep again
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diloco.composing import FLAGS
from diloco.config import explain
from diloco.errors import ConfigError
from launch.comparing import read_sweep, report
from launch.jobs import make_job, run_jobs
from launch.regions import find_override, override, parse_override

EXTRAS = {
    "hydra/sweeper=optuna": ("hydra_plugins.hydra_optuna_sweeper", "optuna"),
    "hydra/launcher=ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
}

CLUSTER = "hydra.launcher.ray.init.address"
PLUGINS = Path(__file__).parent / "plugins"
"""Where Hydra finds our launcher."""


def run_one(cfg: DictConfig) -> float:
    """One job, for a launcher such as Ray's that calls it where it shall run. Returns the final held-out loss in nats per
    token, inf if it failed."""
    del cfg  # the run composes its own from the same overrides
    config = HydraConfig.get()
    overrides = [str(text) for text in OmegaConf.to_object(config.overrides.task)]  # type: ignore[union-attr]
    job = make_job(overrides, Path(config.runtime.output_dir), config.job.num)
    with held(job.dir, wait=True):  # for another worker that was asked for the same
        return run_jobs([job], 1)[0]


def choose_dir(overrides: Sequence[str]) -> Path:
    """sweep.dir, or one that the same command finds again. Raises ConfigError."""
    if find_override(overrides, "hydra.sweep.dir") is not None:
        raise ConfigError("hydra.sweep.dir is where a sweep is, and has another name here: set sweep.dir=DIR")
    if (chosen := find_override(overrides, "sweep.dir")) is not None:
        return Path(str(chosen)).absolute()
    what = sorted(
        o for o in overrides if parse_override(o).key_or_group.split(".")[0].split("/")[0] not in ("sweep", "hydra")
    )
    return Path("sweeps", hashlib.sha256("\0".join(what).encode()).hexdigest()[:8]).absolute()


@contextmanager
def held(directory: Path, wait: bool = False) -> Iterator[None]:
    """The directory is this process's alone. wait: until it is. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"sweep.dir={directory} cannot be written ({error.strerror}): set it to one of yours"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(
                f"sweep.dir={directory} is in use by another sweep: wait for it, or set another"
            ) from None
        yield


def sweep(arguments: Sequence[str]) -> int:
    """Returns the exit code. Raises ConfigError."""
    flags = [text.split("=")[0] for text in arguments if text.startswith("-")]
    if unknown := [flag for flag in flags if flag not in (*FLAGS, "-m", "--multirun")]:
        raise ConfigError(f"{unknown[0]} is not known here: -m, --help and --cfg job are, everything else is KEY=VALUE")
    overrides = [text for text in arguments if "=" in text and not text.startswith("-")]
    for choice, (module, extra) in EXTRAS.items():
        if choice in overrides and find_spec(module) is None:
            raise ConfigError(f"{choice} needs a plugin that is not installed: run pip install 'diloco[{extra}]'")
    directory = choose_dir(overrides)
    # Absolute: processes of a cluster start somewhere else.
    sys.argv[1:] = [text for text in sys.argv[1:] if not text.startswith("sweep.dir=")]
    sys.argv.append(override("sweep.dir", str(directory)))
    cluster = find_override(overrides, CLUSTER)
    if cluster is not None:  # the plugin sets what Ray refuses for a cluster that runs
        sys.argv.append("+hydra.launcher.ray.init.object_store_memory=null")
    if {*flags} & {*FLAGS}:
        return hydrate()
    stopped = False
    with held(directory):
        try:
            hydrate()
        except KeyboardInterrupt:
            stopped = True
        except ConnectionError as error:
            if cluster is None:
                raise
            raise ConfigError(f"{CLUSTER}={cluster}: {str(error).partition('. ')[0]}: start one there") from error
        finally:
            report(directory)
    return 130 if stopped else int(any(job.state == "failed" for job in read_sweep(directory)))


def hydrate() -> int:
    """Hands over to Hydra, which reads sys.argv. Raises ConfigError."""
    sys.path.append(str(PLUGINS))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what is wrong with the overrides instead of printing it
    try:
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="sweep")(run_one)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, sys.argv[1:]) from error
    return 0


def main() -> int:
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["report"]:
            if len(arguments) != 2:
                raise ConfigError("report takes one directory: python -m launch.sweep report DIR")
            if not report(Path(arguments[1])):
                raise ConfigError(f"{arguments[1]} holds no job of a sweep: name the directory that a sweep printed")
            return 0
        return sweep(arguments)
    except ConfigError as error:
        print(f"launch.sweep: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # As a module, not as __main__: Ray's workers import what they run.
    from launch.sweep import main as run

    sys.exit(run())
