"""`python -m launch.child PARENT [--netns PATH] MODULE [argument ...]`: what launch.local starts its processes through.

Runs a module, or torchrun if MODULE is `torchrun`, or any command if it is `exec`, as a process that ends when the process
PARENT (a pid) dies, so that even `kill -9` of a launcher leaves nothing behind; with --netns in that network namespace.
torchrun comes without its own report of a failed worker: the worker has said why, in its own words, and its exit code is
handed on.
"""

from __future__ import annotations

import ctypes
import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_libc = ctypes.CDLL(None, use_errno=True)


def system_call(name: str, *arguments: int) -> None:
    """One of libc's calls that Python 3.11 does not have. Raises OSError."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def end_with(parent: int) -> None:
    """SIGTERM to this process when its parent process dies; exits at once if that happened already."""
    system_call("prctl", _PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(143)


def enter_network(path: str) -> None:
    """Moves this thread to the network namespace that the file `path` stands for. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    system_call("setns", fd, CLONE_NEWNET)
    os.close(fd)


def torchrun(arguments: Sequence[str]) -> int:
    """torchrun in this process. Returns the exit code of the worker that failed first, 128 + n if signal n
    ended it."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the agent's own: the worker's sentence is enough
    try:
        run.run(run.parse_args(list(arguments)))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        how = f"exit code {code}" if failure.exitcode >= 0 else signal.Signals(-failure.exitcode).name
        if code not in (
            2,
            128 + signal.SIGTERM,
        ):  # a user error has been explained, and a SIGTERM was asked for
            print(f"rank {rank} (pid {failure.pid}) ended with {how}", file=sys.stderr, flush=True)
        return code
    except SignalException as ended:
        return 128 + ended.sigval
    return 0


def main(argv: Sequence[str]) -> int:
    parent, module, *arguments = argv
    end_with(int(parent))
    if module == "--netns":
        network, module, *arguments = arguments
        enter_network(network)
    if module == "exec":
        os.execvp(arguments[0], arguments)
    if module == "torchrun":
        return torchrun(arguments)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
