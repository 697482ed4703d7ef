"""`python -m tests.e2e.no_pickle ...`: diloco.train, in which nothing can unpickle anything; every try is written down."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from typing import Any, NoReturn

import torch

LOG = "NO_PICKLE_LOG"
"""Environment variable: the file that has a line for each try, and one that says that this was on."""


def refuse(*_: Any, **__: Any) -> NoReturn:
    with open(os.environ[LOG], "a") as file:
        file.write("".join(traceback.format_stack()).replace("\n", " ") + "\n")
    raise AssertionError("something was to be unpickled")


class Refusing:
    load = refuse
    __init__ = refuse


def patch() -> None:
    import _pickle

    for module in (pickle, _pickle):
        for name in ("load", "loads"):
            setattr(module, name, refuse)
        module.Unpickler = Refusing  # type: ignore[misc, assignment]
    pickle._Unpickler = Refusing  # type: ignore[attr-defined]
    torch.load = refuse
    with open(os.environ[LOG], "a") as file:
        file.write("on\n")


if __name__ == "__main__":
    patch()
    from diloco.train import leave, main

    assert sys.modules["pickle"].loads is refuse
    leave(main())
