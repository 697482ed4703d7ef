"""`python -m launch.sweep -m +region=eu outer.lr=0.3,0.7`: a Hydra multirun whose every job is a run of its
own.

The configs are those of diloco.train. Each job starts its region through launch.local, in a run directory
inside the sweep's, and its result is the final held-out loss in nats per token, so that sweepers such as
Optuna (hydra/sweeper=optuna, the extra `optuna`) work too. More regions: `'+regions=[eu, us]'` instead of
+region=eu.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diloco.config import explain
from diloco.errors import ConfigError
from diloco.metrics import HELD_OUT, read_metrics
from launch.local import LIGHTHOUSE, TRAIN, print_line, run_local
from launch.process import Stop
from launch.regions import Region, check_regions, find_override, parse_override


@dataclass(frozen=True)
class Result:
    job: str
    overrides: tuple[str, ...]
    loss: float
    """Final held-out loss, nats per token."""
    bits_per_byte: float
    run_dir: Path


_results: list[Result] = []


def run_job(overrides: Sequence[str], run_dir: Path, job: str) -> Result:
    """One run of a sweep. Exits the sweep with the run's code if that fails, and with 130 if somebody stopped it. Raises
    ConfigError if no region is named, or the run evaluated nothing."""
    regions, rest = split_regions(overrides)
    stop = Stop()
    code = run_local(regions, rest, run_dir, print_line, stop=stop, module=TRAIN, lighthouse=LIGHTHOUSE)
    if code or stop.times:
        sys.exit(code or 130)
    loss, bits = final_loss(run_dir, [region.name for region in regions])
    return Result(job, tuple(overrides), loss, bits, run_dir)


def split_regions(overrides: Sequence[str]) -> tuple[list[Region], list[str]]:
    """The regions that `+region=NAME` or `+regions=[...]` names, and the other overrides. Raises
    ConfigError."""
    name, several = find_override(overrides, "region"), find_override(overrides, "regions")
    if (name is None) == (several is None):
        raise ConfigError("a sweep needs to know its regions: add either +region=eu or '+regions=[eu, us]'")
    rest = [text for text in overrides if parse_override(text).key_or_group not in ("region", "regions", "run.dir")]
    return check_regions([name] if several is None else several), rest


def final_loss(run_dir: Path, regions: Sequence[str]) -> tuple[float, float]:
    """Held-out loss in nats per token, and in bits per byte, of the latest evaluation by any region. Raises
    ConfigError."""
    found = [r for name in regions for r in read_metrics(run_dir / name / "metrics.jsonl", "eval")]
    found = [record for record in found if record["set"] == HELD_OUT]
    last = max(found, key=lambda record: record["round"], default=None)
    if last is None:
        raise ConfigError(f"{run_dir} holds no evaluation: a sweep needs data.holdout > 0 and evaluations switched on")
    if last["loss"] is None:
        return float("inf"), float("inf")
    return last["loss"], last["bits_per_byte"]


def table(results: Sequence[Result]) -> str:
    """Best first."""
    rows = [("held-out", "bits/byte", "job", "overrides")]
    for r in sorted(results, key=lambda r: r.loss):
        rows.append((f"{r.loss:.4f}", f"{r.bits_per_byte:.3f}", r.job, " ".join(r.overrides)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(f"{row[i]:>{widths[i]}}" for i in range(3)), row[3]]) for row in rows)


@hydra.main(version_base=None, config_path="pkg://configs", config_name="config")
def sweep(cfg: DictConfig) -> float:
    """One job of the sweep. Returns the final held-out loss in nats per token."""
    del cfg  # Hydra has composed it, so the overrides fit; the run composes its own from the same overrides
    config = HydraConfig.get()
    try:
        if config.mode != RunMode.MULTIRUN:
            raise ConfigError("launch.sweep runs sweeps: add -m, as in launch.sweep -m +region=eu outer.lr=0.3,0.7")
        overrides = list(OmegaConf.to_object(config.overrides.task))  # type: ignore[arg-type]
        result = run_job(overrides, Path(config.runtime.output_dir).absolute(), str(config.job.num))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    _results.append(result)
    print_line(f"job {result.job}: held-out loss {result.loss:.4f} nats/token")
    return result.loss


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what is wrong with the overrides instead of printing it
    try:
        sweep()
    except (HydraException, OmegaConfBaseException) as error:
        print(explain(error, sys.argv[1:]), file=sys.stderr)
        sys.exit(2)
    finally:
        if _results:
            print_line(table(_results))


if __name__ == "__main__":
    main()
