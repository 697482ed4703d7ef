"""Hydra's launcher for launch.sweep: jobs side by side on this machine, `sweep.parallel` at once. Hydra takes plugins
from the namespace package hydra_plugins only; launch.sweep puts this part of it on the path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from launch.jobs import check, make_job, run_jobs


class SideBySide(Launcher):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._dir, self._parallel = Path(config.hydra.sweep.dir).absolute(), config.sweep.parallel

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One batch. Every job returns a number, which a sweeper may minimize. Raises ConfigError, before anything has
        started, if the first batch holds a job that cannot be; in a later one, it fails alone."""
        jobs = [make_job(overrides, self._dir, num) for num, overrides in enumerate(job_overrides, initial_job_idx)]
        if initial_job_idx == 0:
            with aside():
                check(jobs)
        losses = run_jobs(jobs, self._parallel)
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=loss)
            for overrides, loss in zip(job_overrides, losses, strict=True)
        ]


@contextmanager
def aside() -> Iterator[None]:
    """Within it, configs can be composed although an app of Hydra runs."""
    there = GlobalHydra.instance()
    hydra, there.hydra = there.hydra, None
    try:
        yield
    finally:
        there.hydra = hydra


ConfigStore.instance().store(
    group="hydra/launcher",
    name="side_by_side",
    node={"_target_": "hydra_plugins.diloco_launcher.SideBySide"},
    provider="diloco",
)
