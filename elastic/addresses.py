"""HOST:PORT, and what the command lines that listen there ask for."""

from __future__ import annotations

import argparse

from elastic.security import ENVIRONMENT, Security, SecurityError, choose


def host_port(address: str) -> tuple[str, int]:
    """Raises ValueError on anything but http://HOST:PORT or HOST:PORT."""
    host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not http://HOST:PORT")
    return host, int(port)


def is_local(host: str) -> bool:
    """This machine's loopback."""
    return host == "localhost" or host.startswith("127.") or host in ("::1", "[::1]")


def add_security(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls",
        nargs="+",
        default=[],
        metavar="PATH",
        help="a directory that launch.certs made, or the paths of authority, certificate, key and revocation list",
    )
    parser.add_argument("--secret-file", default="", help=f"the run secret; default: the environment's {ENVIRONMENT}")


def security_of(options: argparse.Namespace, name: str) -> Security:
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
