"""What is left of a rank that died: its uploader keeps the arena for a while, for the process that takes its place.

That one is on the same machine. It finds the uploader by an abstract socket (unix(7)) of the rank's name, gets the file itself,
and checks all of it: the rank may have died in the middle of a copy.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ckpt.arena import Arena
from ckpt.parts import ITEM, Held

PATIENCE = 60.0
"""Seconds in which a successor has looked through what it was given."""
MOST = 64 << 20
"""Bytes of a description."""
_LENGTH = struct.Struct("!I")


def digests(arena: memoryview, held: Sequence[Held]) -> list[str]:
    """BLAKE3 of each, hex."""
    return [blake3(arena[h.at : h.at + ITEM * (h.stop - h.start)]).hexdigest() for h in held]


class Keeper(threading.Thread):
    """The uploader's side. It gives the arena to one successor, of the same user, once the rank is dead."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(name="keeper", daemon=True)
        self.busy = False
        """The arena is still being uploaded from."""
        self._descriptor, self._rank = descriptor, os.getppid()
        self._held: tuple[dict[str, Any], Future[list[str]]] | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._taken = threading.Event()

    def hold(self, name: str, what: dict[str, Any], sums: Future[list[str]]) -> None:
        """From now on the arena holds this. name: of the rank, for `find`; what: JSON; sums: digests of what["held"]."""
        first, self._held = self._held is None, (what, sums)
        if first:
            self._socket.bind(f"\0{name}-{os.getpid()}")
            self._socket.listen()
            self.start()

    def linger(self, seconds: float) -> None:
        """Until somebody has taken it, that long at most."""
        if self._held is not None:
            self._taken.wait(seconds)

    def run(self) -> None:
        while not self._taken.is_set():
            peer, _ = self._socket.accept()
            with peer, suppress(OSError):
                peer.settimeout(PATIENCE)
                if os.getppid() != self._rank and _user(peer) == os.getuid():
                    self._give(peer)
        self._socket.close()  # the next successor need not wait for an answer, while this one's upload goes on

    def _give(self, peer: socket.socket) -> None:
        assert self._held is not None
        what, sums = self._held
        data = json.dumps({**what, "digests": sums.result(), "busy": self.busy}).encode()
        socket.send_fds(peer, [_LENGTH.pack(len(data))], [self._descriptor])
        peer.sendall(data)
        if peer.recv(1):
            self._taken.set()


@dataclass
class Survivor:
    """arena: whose contents are those of `what`, every byte checked."""

    what: dict[str, Any]
    arena: Arena

    @property
    def memory(self) -> Arena | None:
        """To save into; None while the dead rank's uploader still reads it."""
        return None if self.what["busy"] else self.arena


def find(name: str, held: Sequence[Held]) -> Survivor | None:
    """The newest (by what["seq"]) of a dead rank of this name and layout on this machine that is not damaged."""
    found = [survivor for address in _addresses(name) if (survivor := _ask(address, held)) is not None]
    return max(found, key=lambda survivor: int(survivor.what["seq"]), default=None)


def _addresses(name: str) -> Iterator[str]:
    with suppress(OSError):
        for line in Path("/proc/net/unix").read_text().splitlines():
            path = line.rpartition(" ")[2]
            if path.startswith(f"@{name}-"):
                yield "\0" + path[1:]


def _ask(address: str, held: Sequence[Held]) -> Survivor | None:
    with socket.socket(socket.AF_UNIX) as peer, suppress(OSError, ValueError, KeyError, TypeError, struct.error):
        peer.settimeout(PATIENCE)
        peer.connect(address)
        if _user(peer) != os.getuid():
            return None
        head, descriptors, _, _ = socket.recv_fds(peer, _LENGTH.size, 1, socket.MSG_CMSG_CLOEXEC)
        if not descriptors:
            return None  # its rank is alive
        arena = Arena(descriptors[0], writable=True)
        (length,) = _LENGTH.unpack(head)
        what = json.loads(_exactly(peer, length))
        if what["held"] != [vars(each) for each in held]:
            return None  # of another mesh or model: whoever comes next may want it
        whole = digests(arena.bytes, held) == what["digests"]
        peer.sendall(b"1")  # it is of no use to anybody else
        return Survivor(what, arena) if whole else None
    return None


def _exactly(peer: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < min(length, MOST) and (more := peer.recv(min(length - len(data), 1 << 20))):
        data += more
    return bytes(data)


def _user(peer: socket.socket) -> int:
    """Of the process at the other end."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
