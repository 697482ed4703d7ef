"""The files that run one region on an engine: an sbatch script, a Kubernetes JobSet, a SkyPilot managed job. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

TRAIN = "diloco.train"
PORT = 29500
"""Of torchrun's rendezvous, where a machine is one region's alone."""
CERTIFICATES = "/etc/diloco"
"""Where a pod finds its region's certificates."""


@dataclass(frozen=True)
class Job:
    """One region's job."""

    name: str
    region: str
    overrides: tuple[str, ...]
    """Of diloco.train, without elastic.tls where `tls` moves the certificates."""
    nodes: int
    nproc: int
    """Ranks on each node."""
    gpus: bool
    """A GPU for every rank."""
    max_restarts: int
    grace: int
    """Seconds to leave in, once asked to."""
    secrets: tuple[str, ...]
    """Environment variables that the job has to find set; their values are in no file."""
    tls: str = ""
    """The directory of certificates on this machine; empty: none, or where it is already."""


def files(tls: str, region: str) -> list[str]:
    """What a region needs of a directory that launch.certs made: not the authority's key."""
    return [f"{tls}/{name}" for name in ("authority.crt", "revoked.crl", f"{region}.crt", f"{region}.key")]


class Expanded(str):
    """An argument in which the shell is to put variables."""


def _torchrun(job: Job, endpoint: str, run: str, *settings: str) -> list[str]:
    """The command on every node. settings: further overrides."""
    return [
        "torchrun",
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.nproc}",
        f"--max-restarts={job.max_restarts}",
        f"--shutdown-timeout={job.grace}",
        "--rdzv-backend=c10d",
        Expanded(f"--rdzv-endpoint={endpoint}"),
        Expanded(f"--rdzv-id={run}"),
        "-m",
        TRAIN,
        *job.overrides,
        *settings,
    ]


def _shell(command: Sequence[str]) -> str:
    """One argument a line."""
    return " \\\n    ".join(f'"{part}"' if isinstance(part, Expanded) else shlex.quote(part) for part in command)


# ---- Slurm ----


def slurm(job: Job, file: str, options: Sequence[str]) -> tuple[str, list[str]]:
    """The script, and the commands that submit it. options: further ones of sbatch."""
    settings = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={job.nproc}"] if job.gpus else []),
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-%j.log",
        f"--signal=TERM@{job.grace}",
        *options,
    ]
    command = _torchrun(job, "$head:$((20000 + SLURM_JOB_ID % 10000))", "$SLURM_JOB_ID")
    lines = [
        "#!/bin/bash",
        f"# Region {job.region} as a Slurm job. scancel --name={job.name} lets it leave; submitted again, it joins.",
        *(f"#SBATCH {option}" for option in settings),
        "set -euo pipefail",
        *(f': "${{{name}:?is not set: export it before sbatch}}"' for name in job.secrets),
        # srun has not read this one since Slurm 22.05; if it is not set, the task has all CPUs of the job.
        '[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
        'read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        f"exec srun --ntasks-per-node=1 {_shell(command)}",
    ]
    return "\n".join(lines) + "\n", [f"sbatch {shlex.quote(file)}"]


# ---- Kubernetes ----


def kubernetes(job: Job, file: str, image: str) -> tuple[str, list[str]]:
    """A JobSet (its controller makes the headless service by which its pods find each other), and the commands."""
    moved = [f"elastic.tls={CERTIFICATES}"] if job.tls else []
    command = _torchrun(job, f"{job.name}-node-0-0.{job.name}:{PORT}", job.name, *moved)
    container: dict[str, Any] = {
        "name": "train",
        "image": image,
        "command": [part.replace("$", "$$") for part in command],  # $(NAME) would be a variable
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        **({"envFrom": [{"secretRef": {"name": job.name}}]} if job.secrets else {}),
        **({"resources": {"limits": {"nvidia.com/gpu": str(job.nproc)}}} if job.gpus else {}),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if job.tls:
        container["volumeMounts"].append({"name": "tls", "mountPath": CERTIFICATES, "readOnly": True})
        volumes.append({"name": "tls", "secret": {"secretName": f"{job.name}-tls"}})
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace + 10,
        "containers": [container],
        "volumes": volumes,
    }
    evicted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": job.max_restarts},
        "replicatedJobs": [
            {
                "name": "node",
                "replicas": 1,
                "template": {
                    "spec": {
                        "completionMode": "Indexed",
                        "parallelism": job.nodes,
                        "completions": job.nodes,
                        "backoffLimit": 0,
                        "podFailurePolicy": {"rules": [evicted]},  # whoever evicts a pod does not use up restarts
                        "template": {"spec": pod},
                    }
                },
            }
        ],
    }
    kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    return _yaml({**kind, "metadata": {"name": job.name}, "spec": spec}), _kubectl(job, file)


def _kubectl(job: Job, file: str) -> list[str]:
    commands = []
    if job.secrets:
        values = " ".join(f'--from-literal={name}="${{{name}:?}}"' for name in job.secrets)
        commands.append(f"kubectl create secret generic {job.name} {values}")
    if job.tls:
        values = " ".join(f"--from-file={shlex.quote(path)}" for path in files(job.tls, job.region))
        commands.append(f"kubectl create secret generic {job.name}-tls {values}")
    return [*commands, f"kubectl apply -f {shlex.quote(file)}"]


# ---- SkyPilot ----


def skypilot(job: Job, file: str, setup: str, resources: dict[str, Any]) -> tuple[str, list[str]]:
    """A managed job, and the commands. resources: as SkyPilot's YAML has them."""
    moved = [Expanded("elastic.tls=$HOME/.diloco")] if job.tls else []
    command = _shell(_torchrun(job, f"$head:{PORT}", "$SKYPILOT_TASK_ID", *moved))
    mounts = {f"~/.diloco/{path.rpartition('/')[2]}": path for path in files(job.tls, job.region)} if job.tls else {}
    task = {
        "name": job.name,
        "num_nodes": job.nodes,
        "workdir": ".",
        "resources": {**resources, "job_recovery": {"max_restarts_on_errors": job.max_restarts}},
        **({"secrets": dict.fromkeys(job.secrets)} if job.secrets else {}),
        **({"file_mounts": mounts} if mounts else {}),
        "setup": f"{setup}\n",
        "run": f'set -euo pipefail\nread -r head <<< "$SKYPILOT_NODE_IPS"\nexec {command}\n',
    }
    secrets = "".join(f" --secret {name}" for name in job.secrets)
    return _yaml(task), [f"sky jobs launch -n {job.name}{secrets} {shlex.quote(file)}"]


class _Plain(yaml.SafeDumper):
    """Scripts as blocks, lists indented below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Plain.add_representer(str, _text)


def _yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Plain, sort_keys=False, width=1000)
