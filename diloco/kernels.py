"""One source for eager and compiled arithmetic: plain torch functions, compiled for the one shape that matters.

Compiled ahead of time (`torch.compile(...).aot_compile`), never in the middle of an exchange; the callables then hold no
lock of Python's while they run, use one thread each, and any number of threads may call them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Tensor | None, ...]

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp_wrapper": True,  # the wrapper in Python would hold the interpreter's lock during the arithmetic
    "cpp.threads": 1,
    "cpp.enable_floating_point_contract_flag": "off",  # a fused multiply-add rounds once where eager rounds twice
    "realize_opcount_threshold": 0,  # else each vector of a group computes the group's divisor anew
    "compile_threads": 1,
}


class Kernel:
    """`function(*tensors) -> None` writes into some of its arguments. Compiled for the shapes that it was prepared for,
    eager for all others."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._compiled: dict[Any, Callable[..., None]] = {}

    def __call__(self, *arguments: Tensor | None) -> None:
        self._compiled.get(_signature(arguments), self.function)(*arguments)

    def prepare(self, *arguments: Tensor | None) -> None:
        """Compiles for arguments of these shapes, strides and dtypes, on CPU, and compares the results for these. Raises
        RuntimeError or OSError if that cannot be done, or if the compiler changes a bit."""
        compiled_for, expected = _copies(arguments), _copies(arguments)
        compiler: Any = torch.compile(self.function, fullgraph=True, dynamic=False, options=OPTIONS)
        compiled = compiler.aot_compile((compiled_for, {}))
        compiled.disable_guard_check()  # a signature says all that matters; guards also look at, say, the thread count
        compiled(*compiled_for)
        self.function(*expected)
        if any(not _same_bits(a, b) for a, b in zip(compiled_for, expected, strict=True)):
            raise RuntimeError(f"compiled, {self.function.__name__} gives other bits")
        self._compiled[_signature(arguments)] = compiled


def _copies(arguments: Arguments) -> Arguments:
    """Alike, each in memory of its own: the compiler takes no views of different dtypes of one buffer, though what they
    show is disjoint."""
    return tuple(
        None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in arguments
    )


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _signature(arguments: Arguments) -> Any:
    return tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in arguments)
