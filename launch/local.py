"""`python -m launch.local 'regions=[{name: eu, nproc: 4, overrides: [parallel.tp=2]}, us]' [key=value ...]`

Runs N regions on this machine with one command: a lighthouse, one torchrun job per region, their lines with
the region's name before each, and a summary at the end. Ctrl-C stops all of them cleanly; a second one kills.

    regions=[...]      which regions, YAML; default [eu, us]. nproc: ranks; overrides: of this region only.
    stop_seconds=60    how long regions may take to stop before they are killed
    run.dir=DIR        where the run is; default runs/<time>
    +wan=atlantic      each region in a network namespace of its own, with the links of configs/wan/atlantic.yaml between
                       them (lan, atlantic, global, home); wan.KEY=VALUE changes one; needs root. See launch/wan.py

Everything else is handed to diloco.train as it is.
"""

from __future__ import annotations

import os
import queue
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from diloco.errors import ConfigError
from elastic.security import ENVIRONMENT
from launch.process import Job, Lines, Stop, child_command, forward, supervise
from launch.regions import Region, find_override, naming, override, parse_override, parse_regions, split_own
from launch.wan import Lab, LabError, introduce, split_wan

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
    thread only. Raises ConfigError if an override is not one, or +wan cannot be here, LabError if its forwarder breaks."""
    _check(regions, overrides)
    names = [region.name for region in regions]
    wan, overrides = split_wan(overrides, names)
    if wan:
        _check_reachable(find_override(overrides, "elastic.lighthouse"))
    width = max(map(len, ["lighthouse", *names]))
    lines: Lines = queue.Queue()

    def say(name: str, line: str) -> None:
        on_line(f"{name:<{width}} | {line}")

    with (stop or Stop()).on_signals() as stop, ExitStack() as stack:
        stack.callback(forward, lines, say)
        lab = stack.enter_context(Lab(wan, names, run_dir, lines)) if wan else None
        for line in introduce(lab) if lab else ():
            say("wan", line)
        ours = {"run.dir": str(run_dir), "elastic.start_regions": str(len(regions))}
        env = {**os.environ, **(_secret(overrides) if lab else {})}
        if find_override(overrides, "elastic.lighthouse") is None:
            bind = f"{lab.hub if lab else '127.0.0.1'}:0"
            job = Job("lighthouse", child_command(lighthouse, "--bind", bind, *_proofs(overrides)), env, lines)
            stack.callback(job.kill)
            address = _address(job, lines, stop, say)
            if address is None:
                return job.code or 0
            ours["elastic.lighthouse"] = address
        started = []
        for region in regions:
            started.append(_start(region, regions, overrides, ours, module, lines, lab, env))
            stack.callback(started[-1].kill)
        return _watch(started, run_dir, lines, stop, say, stop_seconds, lab)


def _check(regions: Sequence[Region], overrides: Sequence[str]) -> None:
    for text in [*overrides, *(o for region in regions for o in region.overrides)]:
        if parse_override(text).key_or_group == "region":
            raise ConfigError(f"{text} names one region: under launch.local write regions=[...] instead")
    for text in (o for region in regions for o in region.overrides):
        if parse_override(text).key_or_group.split(".")[0] == "wan":
            raise ConfigError(f"{text} is not of one region: write it outside of regions=[...]")


def _check_reachable(lighthouse: str | None) -> None:
    """From the namespaces of a WAN lab."""
    if lighthouse and re.match(r"(http://)?(localhost|127\.|\[?::1)", str(lighthouse)):
        raise ConfigError(
            f"elastic.lighthouse={lighthouse} is loopback, and each region under +wan has its own: leave it out"
        )


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
    lab: Lab | None,
    env: Mapping[str, str],
) -> Job:
    given = [*overrides, *region.overrides]
    ours = {**ours, "elastic.host": lab.address(region.name)} if lab else ours
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
        netns=lab.namespace(region.name) if lab else None,
    )
    env = {"OMP_NUM_THREADS": str(_threads(regions)), **env}
    return Job(region.name, command, {**env, **_inside(env)} if lab else env, lines)


def _secret(overrides: Sequence[str]) -> dict[str, str]:
    """Environment with a secret for this run alone, unless another proof is asked for: the namespaces of a WAN lab are not
    loopback."""
    if os.environ.get(ENVIRONMENT) or any(find_override(overrides, f"elastic.{k}") for k in ("tls", "secret_file")):
        return {}
    return {ENVIRONMENT: secrets.token_hex(32)}


def _proofs(overrides: Sequence[str]) -> list[str]:
    """What the regions are told to prove, for the lighthouse's command line."""
    tls, secret = (find_override(overrides, key) for key in ("elastic.tls", "elastic.secret_file"))
    if isinstance(tls, list):  # with it comes one region's own certificate
        raise ConfigError(
            f"elastic.tls={tls} is one region's: under launch.local set it to the directory of all certificates"
        )
    return [*(["--tls", str(tls)] if tls else []), *(["--secret-file", str(secret)] if secret else [])]


def _inside(env: Mapping[str, str]) -> dict[str, str]:
    """Environment of a region in a namespace: its ranks meet on loopback, and torch does not complain that no DNS server
    can be reached."""
    return {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": env.get("TORCH_CPP_LOG_LEVEL", "ERROR")}


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
    lab: Lab | None,
) -> int:
    before = {job.name: _reported(run_dir, job.name) for job in jobs}
    servants = [lab.job] if lab else []
    fatal: list[int] = []

    def on_end(job: Job) -> bool:
        code = job.code
        if stop.times or fatal or not (code or job in servants):
            return False
        if code == 2 or job in servants or _reported(run_dir, job.name) == before[job.name]:
            fatal.append(code or 1)
        say(
            job.name,
            f"ended with exit code {code}: {'stopping the run' if fatal else 'the other regions go on'}",
        )
        return bool(fatal)

    supervise(jobs, lines, stop, say, on_end, stop_seconds, servants)
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
    own, overrides = split_own(argv, {"regions": "[eu, us]", "stop_seconds": "60"}, "--help")
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
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    from launch.summary import main as summary  # imports torch, which takes seconds: only once it is needed

    print()
    return max(code, summary([str(run_dir), *([str(store)] if store else [])]))


if __name__ == "__main__":
    sys.exit(main())
