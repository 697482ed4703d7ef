"""A TLS 1.3 session without its socket: bytes in, bytes out. So any thread may send while one receives, which a session that
reads and writes the socket by itself does not allow (OpenSSL's objects are for one thread at a time), and the socket stays a
plain one for what the kernel is asked of it."""

from __future__ import annotations

import ssl
import threading
from typing import Any

HEADER = 5
MAX_RECORD = (16 << 10) + 256
"""Bytes after a record's header, RFC 8446 5.2."""


class TlsError(OSError):
    """The session cannot be set up or has broken; one sentence about the peer."""


class Tls:
    """One end. What it wants to be sent is taken with `take`."""

    def __init__(self, context: ssl.SSLContext, server: bool) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._in, self._out, server_side=server)
        self._lock = threading.Lock()

    def handshake(self) -> bool:
        """Goes on with it as far as it can; true once it is done. Raises TlsError, and has an alert to send then."""
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise TlsError(why(error)) from error
        return True

    def peer(self) -> str:
        """The common name in the peer's certificate."""
        shown: Any = self._session.getpeercert() or {}
        return next((str(value) for part in shown["subject"] for key, value in part if key == "commonName"), "")

    def serial(self) -> int:
        """Of the peer's certificate."""
        shown: Any = self._session.getpeercert()
        return int(shown["serialNumber"], 16)

    def take(self) -> bytes:
        with self._lock:
            return self._out.read()

    def feed(self, data: bytes | memoryview) -> Tls:
        """Bytes that came over the socket."""
        with self._lock:
            self._in.write(data)
        return self

    def seal(self, data: memoryview | bytes) -> bytes:
        """Encrypted, to be sent in this order."""
        with self._lock:
            view = memoryview(data)
            while view:
                view = view[self._session.write(view) :]
            return self._out.read()

    def open_into(self, view: memoryview) -> int:
        """Decrypts into `view`. Returns the bytes that are there now; 0: more has to be fed first. Raises EOFError at the
        end of the stream, TlsError."""
        with self._lock:
            try:
                return int(self._session.read(len(view), view))
            except ssl.SSLWantReadError:
                return 0
            except ssl.SSLZeroReturnError as error:
                raise EOFError from error
            except ssl.SSLError as error:
                raise TlsError(why(error)) from error


VERIFY = {
    "CRL": "the revocation list here does not fit its certificate or this run's authority",
    "has expired": "its certificate has expired",
    "not yet valid": "its certificate is not valid yet",
    "revoked": "its certificate is revoked",
    "": "its certificate is not of this run's authority",
}
"""What OpenSSL says of a certificate -> what we say."""
ALERTS = {
    "CERTIFICATE_EXPIRED": "it says that our certificate has expired",
    "CERTIFICATE_REVOKED": "it says that our certificate is revoked",
    "UNKNOWN_CA": "it says that our certificate is not of its run's authority",
    "DECRYPT_ERROR": "it says that our certificate is not of its run's authority",
    "CERTIFICATE_REQUIRED": "it says that we showed no certificate",
    "BAD_CERTIFICATE": "it says that our certificate is a bad one",
    "DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "WRONG_VERSION": "it does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "PROTOCOL_VERSION": "it does not speak TLS 1.3",
    "HTTP_REQUEST": "it does not speak TLS 1.3",
}


def why(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message
        return next(sentence for part, sentence in VERIFY.items() if part in said)
    reason = str(error.reason or error)
    return next((sentence for part, sentence in ALERTS.items() if part in reason), f"TLS failed: {reason.lower()}")
