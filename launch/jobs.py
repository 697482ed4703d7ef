"""The jobs of a sweep: each is a run of all its regions, started through launch.local as a process group of its own, in a
directory that is named by what it runs. `job.json` there says how it ended."""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckpt.store import Store
from diloco.composing import compose_config
from diloco.config import validate
from diloco.errors import ConfigError
from diloco.fold import JournalError
from diloco.journal import Journal
from diloco.metrics import duration
from launch.comparing import RECORD, final
from launch.process import Job, Lines, Stop, child_command, supervise
from launch.regions import Region, check_regions, find_override, naming, override, parse_override

STOP_SECONDS = 60.0
"""How long a run may take to leave cleanly."""
QUIET_SECONDS = 10.0
"""Between two lines of the same job on the console; its log.txt has all."""


@dataclass(frozen=True)
class SweepJob:
    num: int
    """Hydra's; another one when the sweep is extended."""
    values: Mapping[str, Any]
    """What each override sets, regions included."""
    regions: tuple[Region, ...]
    overrides: tuple[str, ...]
    """Of the run."""
    dir: Path

    @property
    def name(self) -> str:
        return f"job {self.num}"


def make_job(overrides: Sequence[str], sweep_dir: Path, num: int) -> SweepJob:
    """Raises ConfigError if no region is named, or if it could not be kept apart from its neighbours."""
    kept = [text for text in overrides if parse_override(text).key_or_group.split(".")[0] != "sweep"]
    regions, rest = split_regions(kept)
    for part in (rest, *(region.overrides for region in regions)):
        check_shared(part)
    if inside := [region for region in regions if find_override(region.overrides, "run.store") is not None]:
        raise ConfigError(f"regions has run.store in {inside[0].name}, but a run has one store: set it for all regions")
    values = {o.key_or_group: ("(deleted)" if o.is_delete() else o.value()) for o in map(parse_override, kept)}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return SweepJob(num, values, tuple(regions), (*apart(rest, sweep_dir.name, digest),), sweep_dir / digest)


def split_regions(overrides: Sequence[str]) -> tuple[list[Region], list[str]]:
    """The regions that `+region=NAME` or `+regions=[...]` names, and the other overrides. Raises ConfigError."""
    name, several = find_override(overrides, "region"), find_override(overrides, "regions")
    if (name is None) == (several is None):
        raise ConfigError("a sweep needs to know its regions: add either +region=eu or '+regions=[eu, us]'")
    rest = [text for text in overrides if parse_override(text).key_or_group not in ("region", "regions")]
    return check_regions([name] if several is None else several), rest


def check_shared(overrides: Sequence[str]) -> None:
    """Raises ConfigError for what jobs cannot share."""
    for key, why in {
        "run.dir": "every job has a directory of its own: set sweep.dir to where they shall be",
        "elastic.lighthouse": "every job starts a lighthouse of its own: leave it out",
    }.items():
        if (value := find_override(overrides, key)) is not None:
            raise ConfigError(f"{key}={value} would be shared by all jobs of a sweep, but {why}")


def apart(overrides: Sequence[str], sweep: str, job: str) -> list[str]:
    """The overrides with a store and a name of the job's own."""
    store = find_override(overrides, "run.store")
    name = find_override(overrides, "run.name") or sweep
    own = [override("run.name", f"{name}-{job}")]
    own += [override("run.store", f"{store}/{sweep}-{job}")] if store else []
    return [*(o for o in overrides if parse_override(o).key_or_group not in ("run.name", "run.store")), *own]


def check(jobs: Sequence[SweepJob]) -> None:
    """Raises ConfigError if the config of a region of a job cannot work."""
    for job in jobs:
        shared = [o for o in job.overrides if parse_override(o).key_or_group.split(".")[0] != "wan"]
        for region in job.regions:
            own = [naming(region.name), override("run.dir", str(job.dir))]
            if find_override(shared, "elastic.start_regions") is None:
                own.append(f"elastic.start_regions={len(job.regions)}")
            cfg = compose_config([*shared, *own, *region.overrides])
            if cfg.run.store and find_override(shared, "run.store") is None:
                raise ConfigError(
                    f"run.store={cfg.run.store} of a recipe would be shared by all jobs of a sweep: set run.store on the "
                    "command line, where each job gets a place of its own in it"
                )
            validate(cfg, region.nproc)
            if not cfg.data.holdout and not cfg.data.sources:
                raise ConfigError("data.holdout=0 leaves nothing to compare jobs by: set it to about 0.02")


# ---- running ----


def run_jobs(jobs: Sequence[SweepJob], parallel: int) -> list[float]:
    """Runs those that are not done, `parallel` at once, and returns everyone's final held-out loss in nats per token: inf if
    it failed or diverged. Raises KeyboardInterrupt when all have left after Ctrl-C or SIGTERM. Main thread only."""
    if not isinstance(parallel, int) or parallel < 1:
        raise ConfigError(f"sweep.parallel={parallel} is not a number of jobs: set it to 1 or more")
    todo = {}
    for job in jobs:
        if state(job) != "done" and complete(job):
            record(job, "done")  # it was killed before it could
        if state(job) == "done":
            say(job, f"done before: {result(job)} ({job.dir})")
        else:
            todo[job.dir] = job  # once: a sweeper may ask for the same twice
    stop = Stop()
    if todo:
        with stop.on_signals():
            Running([*todo.values()], parallel, stop).run()
    if stop.times:
        raise KeyboardInterrupt
    return [final_loss(job) for job in jobs]


class Running:
    """Jobs on their way: what they say, and how they end."""

    def __init__(self, jobs: Sequence[SweepJob], parallel: int, stop: Stop) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._parallel, self._stop = parallel, stop
        self._lines: Lines = queue.Queue()
        self._started: dict[str, float] = {}
        self._shown: dict[str, float] = {}
        self._left = len(jobs)

    def run(self) -> None:
        supervise(
            self._start(), self._lines, self._stop, self._hear, self._end, STOP_SECONDS + 15, at_once=self._parallel
        )

    def _start(self) -> Iterator[Job]:
        for name, job in self._jobs.items():
            job.dir.mkdir(parents=True, exist_ok=True)
            (job.dir / "log.txt").write_text("")
            self._started[name] = self._shown[name] = time.monotonic()
            record(job, "started")
            say(job, f"{' '.join(f'{k}={v}' for k, v in job.values.items())} ({job.dir})")
            yield Job(name, command(job), environment(job, self._parallel), self._lines, relays=True)

    def _hear(self, name: str, line: str) -> None:
        job, now = self._jobs[name], time.monotonic()
        with (job.dir / "log.txt").open("a") as log:
            log.write(f"{line}\n")
        if now - self._shown[name] > QUIET_SECONDS and " | step " in line:
            self._shown[name] = now
            say(job, line)

    def _end(self, process: Job) -> bool:
        job = self._jobs[process.name]
        self._left -= 1
        if complete(job):
            record(job, "done")
            took = duration(time.monotonic() - self._started[job.name])
            say(job, f"done after {took}: {result(job)}; {self._left} to go")
        elif self._stop.times:
            say(job, "stopped: the same command goes on with it")
        else:
            why = failure(job, process.code or 0)
            record(job, "failed", why)
            say(job, f"failed: {why} (all of it: {job.dir / 'log.txt'})")
        return False


def command(job: SweepJob) -> list[str]:
    regions = json.dumps([asdict(region) for region in job.regions])
    own = [f"regions={regions}", f"stop_seconds={STOP_SECONDS:g}", override("run.dir", str(job.dir))]
    return child_command("launch.local", *own, *job.overrides)


def environment(job: SweepJob, parallel: int) -> dict[str, str]:
    """Ranks of all jobs together have a core each and no more, unless somebody has said how many threads they take."""
    ranks = sum(region.nproc for region in job.regions)
    threads = max(1, len(os.sched_getaffinity(0)) // (ranks * parallel))
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def say(job: SweepJob, text: str) -> None:
    print(f"{job.name:<7} | {text}", flush=True)


# ---- how it ended ----


def record(job: SweepJob, state: str, why: str = "") -> None:
    """Atomically, for another sweep may read it."""
    new = job.dir / f"{RECORD}.new"
    new.write_text(json.dumps({"num": job.num, "state": state, "why": why, "values": job.values}, default=str))
    new.replace(job.dir / RECORD)


def state(job: SweepJob) -> str:
    path = job.dir / RECORD
    return str(json.loads(path.read_text())["state"]) if path.exists() else ""


def final_loss(job: SweepJob) -> float:
    last = final(job.dir) if state(job) == "done" else None
    return last.loss if last else math.inf


def result(job: SweepJob) -> str:
    last = final(job.dir)
    assert last is not None, job
    return (
        f"held-out loss {last.loss:.4f} nats/token" if math.isfinite(last.loss) else "diverged, its loss is not finite"
    )


def complete(job: SweepJob) -> bool:
    """It has a result, and its run has come to its end, whatever its processes' exit codes were."""
    return final(job.dir) is not None and finished(job)


def finished(job: SweepJob) -> bool:
    """The journal says that the run has stopped because it was all done."""
    try:
        journal = Journal(Store(str(find_override(job.overrides, "run.store") or job.dir / "store")))
        journal.read()
    except (OSError, JournalError) as error:
        say(job, f"whether its run is done is not known: {error}")
        return False
    return journal.state is not None and journal.state.stopped is not None and journal.state.finished is not None


def failure(job: SweepJob, code: int) -> str:
    """Why it failed, in a sentence, if it is not complete."""
    if code:
        return why((job.dir / "log.txt").read_text().splitlines()) or f"exit code {code}"
    if final(job.dir) is None:
        return "it wrote no held-out loss: set data.holdout > 0"
    return "its run was stopped before its end: see its journal"


def why(lines: Sequence[str]) -> str:
    """What the first region that failed said: its exception, or how a signal ended it, or its last line before its launcher
    noticed. Without one, the last line of all."""
    for at, line in enumerate(lines):
        if found := re.match(r"(\S+ +\| )(ended with exit code|rank \d+ \(pid)", line):
            said = [text.removeprefix(found[1]) for text in lines[:at] if text.startswith(found[1])]
            return exception(said) or (said[-1].strip() if said and " ended with SIG" not in line else line)
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def exception(said: Sequence[str]) -> str:
    """The last line of the first traceback; empty if there is none."""
    after = iter(said)
    return next((line for line in after if line.startswith("Traceback ")), "") and next(
        (line for line in after if line and not line[0].isspace()), ""
    )
