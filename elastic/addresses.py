"""HOST:PORT."""

from __future__ import annotations

import socket


def host_port(address: str) -> tuple[str, int]:
    """Raises ValueError on anything but http://HOST:PORT or HOST:PORT."""
    host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not http://HOST:PORT")
    return host, int(port)


def is_local(host: str) -> bool:
    """This machine's loopback."""
    return host == "localhost" or host.startswith("127.") or host in ("::1", "[::1]")


def own_host(host: str, lighthouse: str) -> str:
    """Where others reach this machine: `host` if it is set, else loopback if the lighthouse is there, else the address from which
    it is reached. Raises OSError if no way leads there."""
    if host:
        return host
    there, port = host_port(lighthouse)
    if is_local(there):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((there, port))  # sends nothing; tells which of our addresses leads there
        return str(probe.getsockname()[0])
