"""What `launch.render` writes: the files that are kept in tests/rendered, as the engines' own schemas want them, and as a shell
reads them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from launch.engines import Job, kubernetes, skypilot, slurm
from launch.render import main, render

RENDERED = Path(__file__).parent / "rendered"
RUN = ["+region=eu", "elastic.lighthouse=http://10.0.0.1:29510", "run.store=s3://bucket/run", "inner.batch=16"]
CASES = {
    "diloco-eu.sbatch": ["slurm", *RUN, "nodes=2", "sbatch=[--partition=gpu, --cpus-per-task=64]"],
    "diloco-eu.yaml": [
        "k8s",
        *RUN,
        "nodes=2",
        "image=registry/diloco:1",
        "elastic.tls=certs",
        "elastic.dial_only=true",
    ],
    "diloco-eu.sky.yaml": [
        "skypilot",
        *RUN,
        "nodes=2",
        "gpu=H100",
        "resources={infra: aws/eu-central-1, use_spot: true}",
        "elastic.tls=certs",
        "elastic.gateway=10.0.0.2:29600",
    ],
}
JOB = Job("diloco-eu", "eu", (), 2, 4, False, 3, 60, ("DILOCO_SECRET",))


@pytest.mark.parametrize("name", CASES)
def test_the_files_are_those_that_are_kept(name: str) -> None:
    rendered = render(CASES[name][0], CASES[name][1:])
    assert rendered.path.name == name and rendered.text == (RENDERED / name).read_text()


def test_kubernetes_knows_every_field_of_the_jobset() -> None:
    """A model made of JobSet's OpenAPI drops what it does not know, and refuses wrong types and missing fields."""
    found = yaml.safe_load((RENDERED / "diloco-eu.yaml").read_text())
    parsed = JobsetV1alpha2JobSet.from_dict(found)
    assert parsed is not None and parsed.to_dict() == found
    for path in (["spec"], ["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0]):
        odd = yaml.safe_load((RENDERED / "diloco-eu.yaml").read_text())
        below: Any = odd
        for part in path:
            below = below[part]
        below["netwrok"] = 1
        assert JobsetV1alpha2JobSet.from_dict(odd).to_dict() != odd


def test_skypilot_knows_every_field_of_the_task() -> None:
    schema = json.loads((RENDERED / "skypilot-schema.json").read_text())
    task = yaml.safe_load((RENDERED / "diloco-eu.sky.yaml").read_text())
    jsonschema.validate(task, schema)
    for odd in ({**task, "num_node": 1}, {**task, "resources": {**task["resources"], "spot": True}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(odd, schema)


# ---- what a shell makes of it ----


def executed(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The script, with stand-ins for the engine that print what they are given."""
    for name, text in {
        "srun": 'shift; echo "cpus: ${SRUN_CPUS_PER_TASK:-}" >&2; exec "$@"',
        "torchrun": "printf '%s\\0' \"$@\"",
        "scontrol": 'printf "node%s\\n" $(seq 5000)',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/home/me", "USER_$": "x", **environment}
    return subprocess.run(["/bin/bash"], input=script.encode(), env=env, capture_output=True, timeout=60)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=40)


@settings(max_examples=15)
@given(override=TEXT)
@example(override="a=$(b)$$(c)$$")
def test_overrides_arrive_as_they_were_given(tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
    folder = tmp_path_factory.mktemp("shell", numbered=True)
    job = Job(**{**vars(JOB), "overrides": ("+region=eu", override)})
    script, _ = slurm(job, "file", [])
    done = executed(folder, script, DILOCO_SECRET="s", SLURM_JOB_ID="70123", SLURM_JOB_NODELIST="node[1-5000]")
    arguments = done.stdout.decode().split("\0")[:-1]
    assert done.returncode == 0 and arguments[-2:] == ["+region=eu", override], done
    assert b"cpus: \n" in done.stderr
    assert {"--rdzv-endpoint=node1:20123", "--rdzv-id=70123", "--nnodes=2", "--max-restarts=3"} <= set(arguments)
    task = yaml.safe_load(skypilot(Job(**{**vars(job), "tls": "certs"}), "file", "true", {})[0])
    done = executed(folder, task["run"], SKYPILOT_NODE_IPS="10.1.1.1\n10.1.1.2", SKYPILOT_TASK_ID="sky-1")
    arguments = done.stdout.decode().split("\0")[:-1]
    assert arguments[-3:] == ["+region=eu", override, "elastic.tls=/home/me/.diloco"], done
    assert "--rdzv-endpoint=10.1.1.1:29500" in arguments and task["secrets"] == {"DILOCO_SECRET": None}
    pod = yaml.safe_load(kubernetes(job, "file", "image")[0])["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = pod["template"]["spec"]["containers"][0]["command"]
    kubelets = re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else "", command[-1])
    assert kubelets == override


def test_a_secret_that_is_not_set_is_one_sentence(tmp_path: Path) -> None:
    done = executed(tmp_path, slurm(JOB, "file", [])[0], SLURM_JOB_ID="1", SLURM_JOB_NODELIST="node1")
    assert done.returncode != 0 and b"DILOCO_SECRET: is not set: export it before sbatch" in done.stderr
    job = executed(tmp_path, "\n".join(kubernetes(JOB, "file", "i")[1]))
    assert job.returncode != 0 and b"DILOCO_SECRET" in job.stderr and b"kubectl" not in job.stderr


def test_srun_has_the_cpus_that_sbatch_was_asked_for(tmp_path: Path) -> None:
    job = {"DILOCO_SECRET": "s", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "64"}
    assert b"cpus: 64" in executed(tmp_path, slurm(JOB, "file", [])[0], **job).stderr


# ---- the command ----


def test_it_writes_once_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = CASES["diloco-eu.yaml"]
    assert main([*arguments, "--dry-run"]) == 0 and not list(tmp_path.iterdir())
    dry = capsys.readouterr()
    assert dry.out == (RENDERED / "diloco-eu.yaml").read_text()
    assert main(arguments) == 0 and (tmp_path / "diloco-eu.yaml").read_text() == dry.out
    said = capsys.readouterr().out
    assert '--from-literal=AWS_SECRET_ACCESS_KEY="${AWS_SECRET_ACCESS_KEY:?}"' in said and "authority.key" not in said
    assert "kubectl apply -f diloco-eu.yaml" in said
    assert main(arguments) == 0  # the same again
    assert main([*arguments, "grace=60"]) == 2 and (tmp_path / "diloco-eu.yaml").read_text() == dry.out
    assert "diloco-eu.yaml is there already" in capsys.readouterr().err


K8S, SKY = ["k8s", *RUN, "image=i"], ["skypilot", *RUN, "gpu=H100"]
BAD = {
    "no engine": ([], ["no engine is named", "slurm|k8s|skypilot"]),
    "another engine": (["pbs", *RUN], ["pbs is no engine"]),
    "flag": (["slurm", *RUN, "--force"], ["--force is not known", "--dry-run"]),
    "unknown key": (["slurm", *RUN, "outer.lrr=1"], ["unknown key outer.lrr", "outer.lr"]),
    "of another engine": (["slurm", *RUN, "image=x"], ["image=x is for k8s"]),
    "nodes": (["slurm", *RUN, "nodes=0"], ["nodes=0 is not a count", "set it"]),
    "grace": (["slurm", *RUN, "grace=1m"], ["grace=1m is not a count"]),
    "batch": (["slurm", *RUN, "nodes=3"], ["inner.batch=16", "set"]),
    "tp": (["slurm", *RUN, "parallel.tp=3"], ["parallel.tp=3 does not divide"]),
    "sbatch": (["slurm", *RUN, "sbatch=--time=1"], ["sbatch=--time=1 is not a list", "sbatch='["]),
    "sbatch option": (["slurm", *RUN, "sbatch=[time]"], ["sbatch has time", "write options"]),
    "no region": (["slurm"], ["no region is named"]),
    "a value for a secret": (["slurm", *RUN, "secrets=[KEY=hidden]"], ["secrets has KEY", "names only"]),
    "name": (["k8s", *RUN, "image=i", "name=Eu"], ["name=Eu", "small letters"]),
    "no image": (["k8s", *RUN], ["image is not set"]),
    "no store": (["k8s", "+region=eu", "image=i"], ["run.store is not set", "s3://"]),
    "a secret file": ([*K8S, "elastic.secret_file=x"], ["elastic.secret_file=x", "DILOCO_SECRET"]),
    "tls paths": ([*SKY, "elastic.tls=[a,b,c]"], ["elastic.tls=", "directory"]),
    "no gpu": (["skypilot", *RUN], ["gpu is not set"]),
    "resources": ([*SKY, "resources=[a]"], ["resources=[a] is not a dict"]),
    "out": (["slurm", *RUN, "out=no/where"], ["out=no/where cannot be written"]),
    "out is a directory": (["slurm", *RUN, "out=."], ["out=. cannot be written", "Is a directory"]),
    "recovery": ([*SKY, "resources={job_recovery: EAGER}"], ["resources has job_recovery", "max_restarts"]),
    "lighthouse": (["slurm", "+region=eu", "elastic.lighthouse=x"], ["elastic.lighthouse", "HOST:PORT"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(BAD[case][0]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert all(part in said.err for part in BAD[case][1]) and "hidden" not in said.err, said.err
