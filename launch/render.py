"""`python -m launch.render slurm|k8s|skypilot +region=eu [key=value ...] [--dry-run]`

Writes what runs one region on an engine, and prints the commands that submit it. The engine schedules and restarts machines;
torchrun brings the ranks together and starts them again when one fails; SIGTERM lets the region leave.

    nodes=1            machines of the region
    nproc=8            ranks on each, with a GPU each unless parallel.device=cpu
    max_restarts=3     how often a region that failed is started again
    grace=120          seconds to leave in, once asked to
    secrets=[...]      environment variables that the job takes over, by name; default: DILOCO_SECRET if regions meet beyond
                       this machine without elastic.tls, AWS's keys if run.store is on S3, WANDB_API_KEY if tracker=wandb
    name=diloco-eu     of the job
    out=FILE           default: the name and .sbatch, .yaml or .sky.yaml; nothing is overwritten
    --dry-run          prints the file instead, the rest on stderr

    sbatch=[...]       Slurm: further options, such as sbatch='[--partition=gpu, --time=24:00:00]'
    image=IMAGE        Kubernetes: with Python, this package and, if need be, the data
    gpu=H100           SkyPilot: the kind of GPU
    resources={...}    SkyPilot: further resources, such as resources='{infra: aws/eu-central-1, use_spot: true}'
    setup=COMMAND      SkyPilot: installs this package from the working directory; default: pip install '.[s3]'

Everything else is config as diloco.train takes it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diloco.composing import compose_config
from diloco.config import Config, validate_anywhere
from diloco.errors import ConfigError
from elastic.addresses import host_port, is_local
from elastic.security import ENVIRONMENT
from launch.engines import Job, kubernetes, skypilot, slurm
from launch.regions import parse_override, split_own

COMMON = {
    "nodes": "1",
    "nproc": "8",
    "max_restarts": "3",
    "grace": "120",
    "secrets": "",
    "name": "",
    "out": "",
}
OWN = {
    "slurm": {"sbatch": "[]"},
    "k8s": {"image": ""},
    "skypilot": {"gpu": "", "resources": "{}", "setup": "pip install '.[s3]'"},
}
"""Keys of one engine."""
SUFFIX = {"slurm": ".sbatch", "k8s": ".yaml", "skypilot": ".sky.yaml"}
DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")
"""RFC 1035, so short that pod names fit into one."""


@dataclass(frozen=True)
class Rendered:
    path: Path
    text: str
    commands: list[str]
    notes: list[str]


def split(engine: str, argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This command's own keys for the engine, and the overrides of diloco.train. Raises ConfigError."""
    foreign = {key: other for other, keys in OWN.items() for key in keys if other != engine}
    for text in argv:
        if (key := text.partition("=")[0]) in foreign:
            raise ConfigError(f"{text} is for {foreign[key]}, not for {engine}: leave it out")
    return split_own(argv, {**COMMON, **OWN[engine]}, "--dry-run")


def render(engine: str, argv: Sequence[str]) -> Rendered:
    """Raises ConfigError."""
    own, overrides = split(engine, argv)
    cfg = compose_config(overrides)
    nodes, nproc = (_count(key, own[key]) for key in ("nodes", "nproc"))
    validate_anywhere(cfg, nodes * nproc)
    if engine != "slurm":
        _check_apart(cfg)
    job = _job(engine, own, overrides, cfg, nodes, nproc)
    path = Path(own["out"] or job.name + SUFFIX[engine])
    text, commands = _engine(engine, own, job)(str(path))
    return Rendered(path, text, commands, notes(engine, cfg))


def _job(engine: str, own: dict[str, str], overrides: list[str], cfg: Config, nodes: int, nproc: int) -> Job:
    name = own["name"] or f"diloco-{cfg.region.name}"
    if not DNS_LABEL.fullmatch(name):
        raise ConfigError(
            f"name={name} is not a name everywhere: set name to at most 47 small letters, digits and -, such as diloco-eu"
        )
    moves = engine != "slurm" and bool(cfg.elastic.tls)
    kept = [text for text in overrides if not (moves and parse_override(text).key_or_group == "elastic.tls")]
    return Job(
        name,
        cfg.region.name,
        tuple(kept),
        nodes,
        nproc,
        cfg.parallel.device != "cpu",
        _count("max_restarts", own["max_restarts"], 0),
        _count("grace", own["grace"]),
        tuple(_names(own["secrets"]) if own["secrets"] else needed(cfg)),
        str(cfg.elastic.tls) if moves else "",
    )


def _engine(engine: str, own: dict[str, str], job: Job) -> Callable[[str], tuple[str, list[str]]]:
    if engine == "slurm":
        options = _parsed("sbatch", own["sbatch"], list, "[--partition=gpu]")
        if odd := [o for o in options if not re.fullmatch(r"--[a-z][^\n]*", str(o))]:
            raise ConfigError(f"sbatch has {odd[0]}, which is no option: write options like [--partition=gpu]")
        return lambda file: slurm(job, file, options)
    if engine == "k8s":
        if not own["image"]:
            raise ConfigError("image is not set: add image=IMAGE, a container image with this package in it")
        return lambda file: kubernetes(job, file, own["image"])
    resources = _parsed("resources", own["resources"], dict, "{infra: aws/eu-central-1, use_spot: true}")
    if "job_recovery" in resources:
        raise ConfigError(
            "resources has job_recovery, which is for max_restarts to say: leave it out, set max_restarts=3"
        )
    if job.gpus and not own["gpu"] and not {"accelerators", "any_of", "ordered"} & resources.keys():
        raise ConfigError("gpu is not set: add gpu=H100 or another of `sky show-gpus`, or parallel.device=cpu")
    gpus = {"accelerators": f"{own['gpu']}:{job.nproc}"} if own["gpu"] else {}
    return lambda file: skypilot(job, file, own["setup"], {**gpus, **resources})


def _check_apart(cfg: Config) -> None:
    """What a machine that comes and goes cannot have. Raises ConfigError."""
    if not cfg.run.store:
        raise ConfigError(
            "run.store is not set, and run.dir goes with the machine: set run.store to a place that outlives it, such as "
            "s3://bucket/run"
        )
    if isinstance(cfg.elastic.tls, list):
        raise ConfigError(f"elastic.tls={cfg.elastic.tls} is a list of files: set it to the directory of certificates")
    if cfg.elastic.secret_file:
        raise ConfigError(
            f"elastic.secret_file={cfg.elastic.secret_file} is a file of this machine: leave it out, and have the secret in "
            f"{ENVIRONMENT}"
        )


def needed(cfg: Config) -> list[str]:
    """Environment variables without which the region cannot be part of its run."""
    elastic = cfg.elastic
    apart = not is_local(host_port(elastic.lighthouse)[0])
    names = [ENVIRONMENT] if apart and not elastic.tls and not elastic.secret_file else []
    if cfg.run.store.startswith(("s3://", "s3a://")):
        names += ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    return [*names, *(["WANDB_API_KEY"] if cfg.tracker.kind == "wandb" else [])]


def notes(engine: str, cfg: Config) -> list[str]:
    """What may be meant so, but will often not do."""
    elastic, found = cfg.elastic, []
    if is_local(host_port(elastic.lighthouse)[0]):
        found.append(
            f"elastic.lighthouse={elastic.lighthouse} is loopback: no other region will find this one unless it runs on the "
            "same machine"
        )
    elif engine != "slurm" and not (elastic.host or elastic.gateway or elastic.dial_only):
        found.append(
            "other regions reach this one's ranks only if their networks are joined: else set elastic.gateway=HOST:PORT, or "
            "elastic.dial_only=true in all regions but one"
        )
    return found


# ---- values ----


def _count(key: str, value: str, least: int = 1) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"{key}={value} is not a count: set it to a whole number of {least} or more")
    return int(value)


def _names(value: str) -> list[str]:
    names = _parsed("secrets", value, list, "[DILOCO_SECRET, AWS_ACCESS_KEY_ID]")
    if odd := [n for n in names if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(n))]:
        raise ConfigError(
            f"secrets has {str(odd[0]).partition('=')[0]}, which names no variable: write names only, like [DILOCO_SECRET]"
        )
    return names


def _parsed(key: str, value: str, kind: type, example: str) -> Any:
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, kind):
        raise ConfigError(f"{key}={value} is not a {kind.__name__} in YAML: write it like {key}='{example}'")
    return found


# ---- command line ----


def write(rendered: Rendered) -> None:
    """Raises ConfigError if something else is there."""
    path, data = rendered.path, rendered.text.encode()
    try:
        with suppress(FileExistsError), path.open("xb") as file:
            file.write(data)
        if path.read_bytes() != data:
            raise ConfigError(f"{path} is there already, with other contents: remove it, or set out=FILE")
    except OSError as error:
        raise ConfigError(
            f"out={path} cannot be written ({error.strerror}): set it to a file in a directory of yours"
        ) from error


def run(argv: Sequence[str]) -> None:
    """Raises ConfigError."""
    dry, rest = "--dry-run" in argv, [text for text in argv if text != "--dry-run"]
    if not rest or rest[0] not in OWN:
        named = f"{rest[0]} is no engine" if rest else "no engine is named"
        raise ConfigError(f"{named}: write python -m launch.render {'|'.join(OWN)} +region=eu")
    rendered = render(rest[0], rest[1:])
    if dry:
        print(rendered.text, end="", flush=True)
    else:
        write(rendered)
    said = [f"note: {note}" for note in rendered.notes]
    done = [f"would write {rendered.path}" if dry else f"{rendered.path} is there", "submit it with:"]
    print("\n".join([*said, *done, *(f"    {c}" for c in rendered.commands)]), file=sys.stderr if dry else sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        run(argv)
    except ConfigError as error:
        print(f"launch.render: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
