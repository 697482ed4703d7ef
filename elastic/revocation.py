"""Ends connections that stand when the certificate at their other end is revoked; a handshake looks at the list only once. A
thread per list looks for a new one, as long as there is a connection that it could name."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

from cryptography import x509

from elastic.security import Security
from elastic.wire import Connection

LOOK = 1.0
"""Seconds between two looks at the file."""


class Watch:
    """Over the connections whose other end has shown a certificate of one authority."""

    def __init__(self, authority: str, revoked: str) -> None:
        self._authority, self._path = Path(authority), Path(revoked)
        self._stamp: tuple[int, ...] = ()
        self._revoked: frozenset[int] = frozenset()
        self._serials: WeakKeyDictionary[Connection, int] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._running = False
        self._said = ""

    def add(self, connection: Connection, serial: int) -> None:
        """serial: of the certificate at its other end."""
        with self._lock:
            self._serials[connection] = serial
            if not self._running:
                threading.Thread(target=self._run, name="revocation", daemon=True).start()
                self._running = True
        self.look()  # the list may be another one since the handshake looked

    def look(self) -> None:
        with self._lock:
            self._read()
            cut = [connection for connection, serial in self._serials.items() if serial in self._revoked]
            for connection in cut:
                del self._serials[connection]
        for connection in cut:
            print("cut a connection: its certificate is revoked", flush=True)
            connection.close()

    def _read(self) -> None:
        """A list that cannot be read, or that the authority has not signed, changes nothing, and is tried again."""
        try:
            seen = self._path.stat()
            stamp = (seen.st_mtime_ns, seen.st_ino, seen.st_size)
            if stamp != self._stamp:
                self._revoked = _serials(self._authority, self._path)
                self._stamp, self._said = stamp, ""
        except (OSError, ValueError) as error:
            if str(error) != self._said:
                print(f"the revocation list {self._path} cannot be used: {error}", flush=True)
            self._said = str(error)

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(LOOK):
            self.look()
            with self._lock:
                if not self._serials:
                    self._running = False
                    return


def _serials(authority: Path, revoked: Path) -> frozenset[int]:
    """Raises OSError, ValueError."""
    listed = x509.load_pem_x509_crl(revoked.read_bytes())
    key = x509.load_pem_x509_certificate(authority.read_bytes()).public_key()
    if not listed.is_signature_valid(key):  # type: ignore[arg-type]
        raise ValueError("this run's authority has not signed it")
    return frozenset(entry.serial_number for entry in listed)


@lru_cache(maxsize=8)
def _watch(authority: str, revoked: str) -> Watch:
    return Watch(authority, revoked)


def watch(security: Security, connection: Connection, serial: int) -> None:
    """From now on the connection ends when the list names the certificate at its other end."""
    if security.revoked:
        _watch(security.authority, security.revoked).add(connection, serial)
