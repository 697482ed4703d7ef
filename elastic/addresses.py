"""HOST:PORT."""

from __future__ import annotations


def host_port(address: str) -> tuple[str, int]:
    """Raises ValueError on anything but http://HOST:PORT or HOST:PORT."""
    host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not http://HOST:PORT")
    return host, int(port)


def is_local(host: str) -> bool:
    """This machine's loopback."""
    return host == "localhost" or host.startswith("127.") or host in ("::1", "[::1]")
