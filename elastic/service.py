"""A command that opens a port and serves until it is asked to end: the lighthouse's, and the gateway's."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from elastic.addresses import host_port, is_local
from elastic.security import ENVIRONMENT, Security, SecurityError, choose

Open = Callable[[str, int, Security], tuple[str, Callable[[], None]]]
"""(host, port, security) -> (where it is reached, what ends it). Raises RuntimeError or OSError if the port is taken."""


def serve(name: str, about: str | None, bind: str, open_at: Open, argv: Sequence[str] | None) -> int:
    """`python -m elastic.NAME`; bind: where it listens by default. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m elastic.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bind", default=bind, help=f"HOST:PORT; port 0 picks a free one; default: {bind}")
    _add_security(parser)
    options = parser.parse_args(argv)
    try:
        host, port = host_port(options.bind)
        where, close = open_at(host, port, _security_of(options, name))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        print(f"--bind {options.bind} cannot be used ({said}): name a free HOST:PORT of this machine", file=sys.stderr)
        return 2
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    print(f"{name} {where}", flush=True)
    done.wait()
    close()
    return 0


def _add_security(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls",
        nargs="+",
        default=[],
        metavar="PATH",
        help="a directory that launch.certs made, or the paths of authority, certificate, key and revocation list",
    )
    parser.add_argument("--secret-file", default="", help=f"the run secret; default: the environment's {ENVIRONMENT}")


def _security_of(options: argparse.Namespace, name: str) -> Security:
    """What the command line asks for. name: whose certificate in a directory. Raises ValueError, one sentence that names the
    option, if it cannot be used or a public port would be open to everybody."""
    try:
        tls = options.tls[0] if len(options.tls) == 1 else options.tls
        security = choose(tls, options.secret_file, name)
        security.check()
    except SecurityError as error:
        given = f"--tls {' '.join(options.tls)}" if options.tls else "the run secret"
        raise ValueError(f"{given} cannot be used: {error}") from error
    if not security.secured and not is_local(host_port(options.bind)[0]):
        raise ValueError(
            f"--bind {options.bind} is not loopback: add --tls DIR (made by python -m launch.certs), or set {ENVIRONMENT} to "
            "the run's secret"
        )
    return security
