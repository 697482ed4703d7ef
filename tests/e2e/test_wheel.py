"""The built wheel, in an environment of its own, from another directory."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e.cluster import SMALL
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """What it prints. Fails with both streams unless it succeeds."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: the wheel installed, its dependencies those of this one, which a .pth file
    makes visible. .pth files over there are not looked at, and so neither is an editable install of the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []  # else pip fetches hatchling
    run(*pip, "wheel", "--no-deps", *isolation, "--wheel-dir", directory, ROOT, cwd=directory)
    (wheel,) = directory.glob("diloco-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", directory / "venv", cwd=directory)
    python = directory / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=directory)
    paths = sysconfig.get_paths(vars={"base": str(directory / "venv"), "platbase": str(directory / "venv")})
    Path(paths["purelib"], "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return python


def test_the_wheel_is_whole(python: Path, tmp_path: Path) -> None:
    packages = "diloco, ckpt, elastic, launch, configs"
    assert "launch.sweep report DIR" in run(python.parent / "diloco-sweep", "--help", cwd=tmp_path), (
        "its plugin is there"
    )
    found = run(python, "-c", f"import {packages}\nfor m in ({packages}): print(m.__file__)", cwd=tmp_path)
    assert [line.startswith(str(python.parents[1])) for line in found.split()] == [True] * 5, found
    shipped = Path(found.split()[-1]).parent
    sources = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert {path.relative_to(shipped) for path in shipped.rglob("*.yaml")} == sources


def test_it_trains_from_another_directory(python: Path, tmp_path: Path) -> None:
    shown = run(python, "-m", "diloco.train", "--cfg", "job", "+region=us", cwd=tmp_path)
    assert "sync_every:" in shown and list(tmp_path.iterdir()) == []
    assert "regions=[" in run(python.parent / "diloco-local", "--help", cwd=tmp_path)
    lighthouse = f"elastic.lighthouse=http://127.0.0.1:{free_port()}"
    run(
        python,
        "-m",
        "diloco.train",
        "+region=us",
        *SMALL,
        "run.rounds=1",
        "outer.sync_every=4",
        lighthouse,
        cwd=tmp_path,
    )
    assert (tmp_path / "runs" / "default" / "us" / "metrics.jsonl").exists()
    assert "stop" in run(python, "-m", "diloco.journal", "show", "runs/default", cwd=tmp_path)
