"""What proves a frame's origin where there is a run secret and no TLS: a tag of AES-256-GMAC (NIST SP 800-38D: GCM that encrypts
nothing), keyed for this connection and direction, with the frame's number in it as the nonce. So a frame that somebody on the way
has changed, made, repeated, left out or moved ends the connection. With AES in the processor it takes less time than the crc32
that it replaces."""

from __future__ import annotations

import json
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

TAG = 16
"""Bytes, between the JSON of a frame and its payload."""


class Seal:
    """One side's tags on a connection. What is sent is tagged by one thread at a time, in its order, and what comes is checked by
    one."""

    def __init__(self, secret: bytes, nonces: list[str], who: list[Any], side: str) -> None:
        """nonces: both sides' of the handshake, new on every connection, and so are the keys. side: dials or answers."""
        other = {"dials": "answers", "answers": "dials"}[side]
        self._mine, self._theirs = _key(secret, side, nonces, who), _key(secret, other, nonces, who)
        self._sent = self._checked = 0

    def tag(self, *parts: bytes | memoryview) -> bytes:
        """Of the next frame that is sent."""
        gcm = Cipher(self._mine, modes.GCM(_nonce(self._sent))).encryptor()
        self._sent += 1
        for part in parts:
            gcm.authenticate_additional_data(part)
        gcm.finalize()
        return gcm.tag

    def fits(self, tag: bytes | bytearray, *parts: bytes | bytearray) -> bool:
        """Whether the next frame that came is what the other side sent next. In constant time."""
        gcm = Cipher(self._theirs, modes.GCM(_nonce(self._checked), bytes(tag))).decryptor()
        self._checked += 1
        for part in parts:
            gcm.authenticate_additional_data(part)
        try:
            gcm.finalize()
        except InvalidTag:
            return False
        return True


def _nonce(number: int) -> bytes:
    """Used once with each key, as GMAC requires."""
    return number.to_bytes(12)


def _key(secret: bytes, side: str, nonces: list[str], who: list[Any]) -> algorithms.AES:
    info = json.dumps(["frames", side, nonces, who]).encode()
    return algorithms.AES(HKDF(hashes.SHA256(), 32, None, info).derive(secret))
