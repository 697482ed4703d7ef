"""What a connection between regions has to prove, in one place: TLS with certificates of the run's authority, a run secret, or
(on loopback) nothing. A `Security` is given to whatever dials or listens; it holds paths only, so `asdict` of it may go to
another process as JSON."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from elastic.tls import Tls, TlsError

AUTHORITY, REVOKED = "authority.crt", "revoked.crl"
"""File names in a directory that `python -m launch.certs` made."""
REGION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
ENVIRONMENT = "DILOCO_SECRET"
SHORTEST = 16
"""Characters of a run secret: who was shown a proof can try secrets without asking anybody again."""


class SecurityError(ValueError):
    """Certificates or the secret cannot be used; one sentence, which names no key."""


@dataclass(frozen=True)
class Security:
    """Without any of it, nothing is proved."""

    authority: str = ""
    """Paths of the run authority's certificate, of one's own, of its key, and of the revocation list (may be empty)."""
    certificate: str = ""
    key: str = ""
    revoked: str = ""
    secret_from: str = ""
    """$DILOCO_SECRET for the environment variable, or a file."""

    @property
    def tls(self) -> bool:
        return bool(self.authority)

    @property
    def secured(self) -> bool:
        return self.tls or bool(self.secret_from)

    def context(self, server: bool) -> ssl.SSLContext:
        """Made anew when a file has changed: renewed certificates and further revocations need no restart. Raises OSError."""
        files = [path for path in (self.authority, self.certificate, self.key, self.revoked) if path]
        return _context(self, server, tuple(Path(path).stat().st_mtime_ns for path in files))

    def secret(self) -> bytes:
        """Raises SecurityError."""
        try:
            named = self.secret_from == f"${ENVIRONMENT}"
            text = os.environ.get(ENVIRONMENT, "") if named else Path(self.secret_from).read_text()
        except (OSError, ValueError) as error:
            raise SecurityError(f"{self.secret_from} cannot be read: {error}") from error
        if len(text.strip()) < SHORTEST:
            raise SecurityError(
                f"{self.secret_from} holds fewer than {SHORTEST} characters: put a long random secret there, such as the "
                "output of openssl rand -hex 32"
            )
        return text.strip().encode()

    def check(self) -> str:
        """Shows one's own certificate to oneself: it, its key, authority and revocation list fit. Returns the name in it,
        empty without TLS. Raises SecurityError."""
        if not self.tls:
            if self.secret_from:
                self.secret()
            return ""
        try:
            client, server = Tls(self.context(False), False), Tls(self.context(True), True)
            while not (client.handshake() & server.feed(client.take()).handshake()):
                client.feed(server.take())
            return server.peer()
        except TlsError as error:
            raise SecurityError(f"{self.certificate}: {error}") from error
        except (OSError, ValueError) as error:
            raise SecurityError(
                f"{self.authority}, {self.certificate} and {self.key} do not fit together or cannot be read ({error})"
            ) from error


OPEN = Security()
"""Nothing is proved: for loopback."""


@lru_cache(maxsize=8)
def _context(security: Security, server: bool, stamps: tuple[int, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a certificate is for a region, wherever that is; the hello is checked against it
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(security.authority)
    if security.revoked:
        context.load_verify_locations(security.revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    context.load_cert_chain(security.certificate, security.key)
    if server:
        context.num_tickets = 0  # a resumed session would not be checked for revocation
    return context


def choose(tls: str | Sequence[str], secret_file: str, name: str) -> Security:
    """tls: a directory that holds the certificate of `name`, or the paths of authority, certificate, key and, if there is one,
    revocation list; empty: the secret in `secret_file`, else in $DILOCO_SECRET, else nothing. Raises SecurityError."""
    if not tls:
        from_environment = f"${ENVIRONMENT}" if os.environ.get(ENVIRONMENT) else ""
        return Security(secret_from=secret_file or from_environment)
    if isinstance(tls, str):
        where = Path(tls)
        paths = [str(where / file) for file in (AUTHORITY, f"{name}.crt", f"{name}.key", REVOKED)]
    else:
        paths = [str(path) for path in tls]
    if not 3 <= len(paths) <= 4:
        raise SecurityError("it is neither a directory nor the paths [AUTHORITY, CERTIFICATE, KEY] or [..., REVOKED]")
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise SecurityError(f"{missing[0]} is not there")
    return Security(*paths)


def region_of(member: object) -> str:
    """The region in a member id, `<region>_<number>`."""
    return str(member).rpartition("_")[0]
