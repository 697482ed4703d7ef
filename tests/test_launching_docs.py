"""Every command of docs/launching.md is run here, or its paragraph says what it needs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from launch import certs, doctor, render

PAGE = Path(__file__).resolve().parents[1] / "docs" / "launching.md"
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "launch.certs": certs.main,
    "launch.doctor": doctor.main,
    "launch.render": render.main,
}


def commands(needing: bool) -> list[str]:
    """Those whose paragraph says that they need something, or those whose does not."""
    blocks = PAGE.read_text().split("\n\n")
    return [
        line.strip()
        for before, block in pairwise(blocks)
        if block.startswith("    ") and ("(needs " in before) is needing
        for line in block.splitlines()
    ]


def test_the_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(needing=False):
        python, dash_m, module, *arguments = shlex.split(command)
        assert (python, dash_m) == ("python", "-m") and MAINS[module](arguments) == 0, capsys.readouterr()
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {"certs", "diloco-eu.sbatch", "diloco-eu.yaml", "diloco-eu.sky.yaml"}
    printed = capsys.readouterr().out  # what the page says that they print
    assert all(
        command in printed for command in commands(needing=True) if command.split()[0] in ("kubectl", "sbatch", "sky")
    )


def test_what_needs_more_is_at_least_a_command_of_ours() -> None:
    needing = commands(needing=True)
    assert {command.split()[0] for command in needing} == {"python", "sbatch", "kubectl", "sky", "torchrun"}
    for command in needing:
        if "launch.doctor" in command:
            doctor.parse(shlex.split(command)[3:])
