"""`python -m launch.local 'regions=[{name: eu, nproc: 4, overrides: [parallel.tp=2]}, us]' [key=value ...]`

Runs N regions on this machine with one command: a lighthouse, one torchrun job per region, their lines with
the region's name before each, and a summary at the end. Ctrl-C stops all of them cleanly; a second one kills.

    regions=[...]      which regions, YAML; default [eu, us]. nproc: ranks; overrides: of this region only.
    stop_seconds=60    how long regions may take to stop before they are killed
    run.dir=DIR        where the run is; default runs/<time>

Everything else is handed to diloco.train as it is.
"""

from __future__ import annotations

import os
import queue
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from diloco.errors import ConfigError
from launch.process import Job, Lines, Stop, child_command, forward, supervise
from launch.regions import Region, find_override, naming, override, parse_override, parse_regions

TRAIN, LIGHTHOUSE = "diloco.train", "elastic.lighthouse"
LIGHTHOUSE_SECONDS = 30.0


def run_local(
    regions: Sequence[Region],
    overrides: Sequence[str],
    run_dir: Path,
    on_line: Callable[[str], None],
    *,
    stop: Stop | None = None,
    stop_seconds: float = 60.0,
    module: str = TRAIN,
    lighthouse: str = LIGHTHOUSE,
) -> int:
    """Runs `regions` until all have ended and returns the exit code. on_line gets every line, with its name
    before it.

    A region that fails before its first report, or with exit code 2 (a user error), stops the others, and its
    code is the result; when one fails later the others go on, and the result is the highest code. Ctrl-C and
    SIGTERM stop all regions: 0 if they did so in time. `stop` tells afterwards whether that happened. Main
    thread only. Raises ConfigError if an override is not one."""
    _check(regions, overrides)
    width = max(len(name) for name in ["lighthouse", *(region.name for region in regions)])
    lines: Lines = queue.Queue()
    jobs: list[Job] = []

    def say(name: str, line: str) -> None:
        on_line(f"{name:<{width}} | {line}")

    with (stop or Stop()).on_signals() as stop:
        try:
            ours = {"run.dir": str(run_dir), "elastic.start_regions": str(len(regions))}
            if find_override(overrides, "elastic.lighthouse") is None:
                jobs.append(Job("lighthouse", child_command(lighthouse, "--bind", "127.0.0.1:0"), os.environ, lines))
                address = _address(jobs[0], lines, stop, say)
                if address is None:
                    return jobs[0].code or 0
                ours["elastic.lighthouse"] = address
            started = [_start(region, regions, overrides, ours, module, lines) for region in regions]
            jobs += started
            return _watch(started, run_dir, lines, stop, say, stop_seconds)
        finally:
            for job in jobs:
                job.kill()
            forward(lines, say)


def _check(regions: Sequence[Region], overrides: Sequence[str]) -> None:
    for text in [*overrides, *(o for region in regions for o in region.overrides)]:
        if parse_override(text).key_or_group == "region":
            raise ConfigError(f"{text} names one region: under launch.local write regions=[...] instead")


def _address(job: Job, lines: Lines, stop: Stop, say: Callable[[str, str], None]) -> str | None:
    """The address that the lighthouse's first line tells. None: it ended, or somebody asked to stop."""
    deadline = time.monotonic() + LIGHTHOUSE_SECONDS
    told: list[str] = []

    def listen(name: str, line: str) -> None:
        say(name, line.removeprefix("lighthouse "))
        if line.startswith("lighthouse http"):
            told.append(line.split()[1])

    while not told and not stop.times:
        ended = job.code is not None
        forward(lines, listen, wait=0.1)
        if ended:
            say("lighthouse", f"ended with exit code {job.code} before it told its address")
            return None
        if time.monotonic() > deadline:
            raise TimeoutError(f"the lighthouse did not tell its address within {LIGHTHOUSE_SECONDS:g} s")
    return told[0] if told else None


def _start(
    region: Region,
    regions: Sequence[Region],
    overrides: Sequence[str],
    ours: dict[str, str],
    module: str,
    lines: Lines,
) -> Job:
    given = [*overrides, *region.overrides]
    settings = [f"{key}={value}" if value.isdigit() else override(key, value) for key, value in ours.items()]
    settings = [text for text in settings if find_override(given, text.split("=")[0]) is None]
    command = child_command(
        "torchrun",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={region.nproc}",
        "-m",
        module,
        naming(region.name),
        *settings,
        *given,
    )
    return Job(region.name, command, {"OMP_NUM_THREADS": str(_threads(regions)), **os.environ}, lines)


def _threads(regions: Sequence[Region]) -> int:
    """Threads per rank, so that all ranks together have a core each and no more."""
    return max(1, len(os.sched_getaffinity(0)) // sum(region.nproc for region in regions))


def _watch(
    jobs: Sequence[Job],
    run_dir: Path,
    lines: Lines,
    stop: Stop,
    say: Callable[[str, str], None],
    stop_seconds: float,
) -> int:
    before = {job.name: _reported(run_dir, job.name) for job in jobs}
    fatal: list[int] = []

    def on_end(job: Job) -> bool:
        code = job.code
        if not code or stop.times or fatal:
            return False
        if code == 2 or _reported(run_dir, job.name) == before[job.name]:
            fatal.append(code)
        say(
            job.name,
            f"ended with exit code {code}: {'stopping the run' if fatal else 'the other regions go on'}",
        )
        return bool(fatal)

    supervise(jobs, lines, stop, say, on_end, stop_seconds)
    return fatal[0] if fatal else max(job.code or 0 for job in jobs)


def _reported(run_dir: Path, region: str) -> int:
    """Bytes of the metrics that a region has written."""
    path = run_dir / region / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


# ---- command line ----


def new_run_dir() -> Path:
    """runs/<time>-<pid>: no two starts on a machine share it."""
    return Path("runs", time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}").absolute()


def split_arguments(argv: Sequence[str]) -> tuple[list[Region], float, list[str]]:
    """Regions, stop_seconds and the overrides of diloco.train. Raises ConfigError."""
    own, overrides = {"regions": "[eu, us]", "stop_seconds": "60"}, []
    for text in argv:
        key, equals, value = text.partition("=")
        if text.startswith("-"):
            raise ConfigError(f"{text} is not an override: launch.local takes key=value only, see --help")
        if equals and key in own:
            own[key] = value
        else:
            overrides.append(text)
    try:
        stop_seconds = float(own["stop_seconds"])
    except ValueError as error:
        raise ConfigError(f"stop_seconds={own['stop_seconds']} is not a number: set it to seconds") from error
    return parse_regions(own["regions"]), stop_seconds, overrides


def chosen_run_dir(overrides: Sequence[str]) -> Path:
    """The run.dir of `overrides`, or a new one. Raises ConfigError."""
    value = find_override(overrides, "run.dir")
    if value is None:
        return new_run_dir()
    if "${" in str(value):
        raise ConfigError(f"run.dir={value} differs from region to region: under launch.local write a plain path")
    return Path(str(value)).absolute()


def print_line(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        regions, stop_seconds, overrides = split_arguments(argv)
        run_dir = chosen_run_dir(overrides)
        store = find_override(overrides, "run.store")
        code = run_local(regions, overrides, run_dir, print_line, stop_seconds=stop_seconds)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    from launch.summary import main as summary  # imports torch, which takes seconds: only once it is needed

    print()
    return max(code, summary([str(run_dir), *([str(store)] if store else [])]))


if __name__ == "__main__":
    sys.exit(main())
