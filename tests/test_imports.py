"""Which room may import what (docs/design): checked on the source, lazy imports and TYPE_CHECKING included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("diloco", "elastic", "ckpt", "launch", "configs", "tests")

FORBIDDEN = {
    "diloco": {"launch", "tests"},
    "elastic": {"diloco", "ckpt", "launch", "configs", "tests"},
    "ckpt": {"diloco", "elastic", "launch", "configs", "tests"},
    "launch": {"tests"},
    "configs": {"diloco", "elastic", "ckpt", "launch", "tests"},
}
THIRD_PARTY = {
    "elastic": {"torch", "torchft", "cryptography"},
    "ckpt": {"torch", "safetensors", "fsspec", "obstore", "botocore", "blake3"},
}
"""What these two rooms may import besides the standard library; the others may what they like."""

LOOP = {f"diloco.{name}" for name in ("train", "trainer", "joining", "control")}
"""What `launch` starts as a process and never imports."""

HYDRA = {
    "diloco/train.py": {"hydra", "omegaconf"},
    "diloco/composing.py": {"hydra", "omegaconf"},  # for it and launch.plan, which may not import it
    "diloco/config.py": {"hydra.errors"},  # to explain them
    "launch/sweep.py": {"hydra", "omegaconf"},
    "launch/plugins/hydra_plugins/diloco_launcher.py": {"hydra", "omegaconf"},
    "launch/regions.py": {"hydra.core.override_parser", "hydra.errors"},  # the override grammar, no DictConfig
}

PURE = {
    "diloco/agreeing.py",
    "diloco/averaging.py",
    "diloco/blockwise.py",
    "diloco/clock.py",
    "diloco/codec.py",
    "diloco/fragments.py",
    "diloco/fold.py",
    "diloco/kernels.py",
    "diloco/ledger.py",
    "diloco/lineage.py",
    "diloco/losing.py",
    "diloco/merging.py",
    "diloco/mixture.py",
    "diloco/norms.py",
    "diloco/outer.py",
    "diloco/planes.py",
    "diloco/quantize.py",
    "diloco/reading.py",
    "diloco/rounding.py",
    "diloco/settings.py",
    "diloco/sparse.py",
    "diloco/state.py",
    "diloco/validity.py",
    "elastic/events.py",
    "elastic/flight.py",
    "elastic/order.py",
    "elastic/plan.py",
    "elastic/proposal.py",
    "elastic/ranges.py",
    "elastic/rounds.py",
    "launch/advising.py",
    "launch/failing.py",
    "launch/planning.py",
    "launch/simulating.py",
    "launch/svg.py",
}
"""Algorithms: torch, blake3, the standard library and each other; no sockets, files, processes or clocks."""
SHELL = {"asyncio", "http", "io", "os", "pathlib", "select", "shutil", "signal", "socket", "ssl", "subprocess"}
SHELL |= {"tempfile", "time", "urllib"}
CLI = "main"
"""The command line of a pure file is not pure, and imports what it needs inside."""

SOURCES = sorted(p for room in ROOMS if room != "tests" for p in (ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, without: str = "") -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; `from a.b import c` gives a.b.c. Not in a function named `without`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == without:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; spell it out"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        else:
            yield from imports(node, without)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(path: str, source: str) -> list[str]:
    """One line for each import of the file that its room does not allow."""
    room, found = path.split("/")[0], []
    pure = path in PURE
    for line, name in imports(ast.parse(source), without=CLI if pure else ""):
        top = name.split(".")[0]
        standard = top in sys.stdlib_module_names
        third = not standard and top not in ROOMS
        reasons = {
            f"{room} may not import {top}": top in FORBIDDEN[room],
            f"{room} may only import {THIRD_PARTY.get(room)}": third and top not in THIRD_PARTY.get(room, {top}),
            "launch starts the loop as a process": room == "launch" and within(name, LOOP),
            "only diloco/train.py and diloco/composing.py see Hydra": top in ("hydra", "omegaconf")
            and not within(name, HYDRA.get(path, set())),
            "a pure file imports no other third party than torch and blake3": pure
            and third
            and top not in ("torch", "blake3"),
            "a pure file touches no socket, file or clock": pure and top in SHELL,
            "a pure file imports pure files only": pure and top in ROOMS and not pure_module(name),
        }
        found += [f"{path}:{line}: {name}: {reason}" for reason, true in reasons.items() if true]
    return found


def pure_module(name: str) -> bool:
    """`name` is a pure module, or something in one."""
    return within(name, {path.removesuffix(".py").replace("/", ".") for path in PURE})


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    assert offences(name_of(path), path.read_text()) == []


def test_the_lists_name_files_that_exist() -> None:
    names = {name_of(path) for path in SOURCES}
    assert names >= PURE | HYDRA.keys()
    assert {name.split("/")[0] for name in names} == set(ROOMS) - {"tests"}
    assert all((ROOT / (module.replace(".", "/") + ".py")).exists() for module in LOOP)


def test_pure_files_open_nothing() -> None:
    """Nor do they print, but for their command line."""
    for name in sorted(PURE):
        tree = ast.parse((ROOT / name).read_text())
        tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == CLI)]
        calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert not {"open", "print", "input", "exec", "eval", "__import__"} & set(calls), name


def test_no_pickle() -> None:
    for path in SOURCES:
        names = [name for _, name in imports(ast.parse(path.read_text()))]
        assert not [name for name in names if within(name, {"pickle", "marshal", "shelve", "dill"})], path
        loads = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute) and n.attr == "load"]
        assert not [n for n in loads if isinstance(n.value, ast.Name) and n.value.id == "torch"], f"{path}: torch.load"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("elastic/node.py", "from diloco.journal import State"),
        ("elastic/node.py", "def f():\n    import ckpt.store"),
        ("elastic/node.py", "import numpy"),
        ("ckpt/store.py", "if TYPE_CHECKING:\n    from elastic import plan"),
        ("ckpt/store.py", "import diloco"),
        ("diloco/metrics.py", "import launch.local"),
        ("diloco/trainer.py", "from omegaconf import DictConfig"),
        ("launch/local.py", "import hydra"),
        ("launch/regions.py", "from hydra import compose"),
        ("launch/local.py", "from diloco.trainer import Trainer"),
        ("launch/local.py", "from diloco import train"),
        ("diloco/outer.py", "import numpy"),
        ("diloco/codec.py", "import os"),
        ("diloco/ledger.py", "from diloco.trainer import Trainer"),
        ("diloco/fold.py", "def read():\n    from ckpt.store import Store"),
        ("elastic/plan.py", "import elastic.wire"),
    ],
)
def test_an_offence_is_seen(path: str, source: str) -> None:
    assert len(offences(path, source)) >= 1


def test_what_is_allowed_is_allowed() -> None:
    assert offences("diloco/outer.py", "import torch\nimport math\nfrom diloco.codec import Codec") == []
    assert offences("diloco/fold.py", "def main():\n    from ckpt.store import Store") == []
    assert offences("diloco/train.py", "import hydra\nfrom omegaconf import DictConfig") == []
