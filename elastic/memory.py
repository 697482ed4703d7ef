"""Memory that processes of one rank share: tensors in anonymous files, which a `Pipe` hands over as descriptors."""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from elastic.wire import Message

INLINE = 32 << 10
"""Bytes of a message that go through the socket itself; longer ones are handed over like a tensor."""
DESCRIPTORS = 16
"""Tensors in a message at most."""


class Memory(mmap.mmap):
    """An anonymous file, mapped."""

    descriptor: int

    def __del__(self) -> None:
        os.close(self.descriptor)


_memories: WeakValueDictionary[int, Memory] = WeakValueDictionary()
"""Address -> what is mapped there."""


def shared_zeros(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[count] zeros that a `Pipe` can hand over."""
    if not count:
        return torch.zeros(0, dtype=dtype)
    descriptor = os.memfd_create("diloco", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, count * dtype.itemsize)
    return _map(descriptor, dtype)


def shared_bytes(data: bytes) -> Tensor:
    """uint8: a copy that a `Pipe` can hand over."""
    flat = shared_zeros(len(data), torch.uint8)
    if data:
        flat.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return flat


def _map(descriptor: int, dtype: torch.dtype) -> Tensor:
    """The whole file as a tensor, which owns the descriptor."""
    memory = Memory(descriptor, os.fstat(descriptor).st_size)
    memory.descriptor = descriptor
    flat = torch.frombuffer(memory, dtype=dtype)  # keeps `memory` for as long as it lives itself
    _memories[flat.data_ptr()] = memory
    return flat


def _descriptor(flat: Tensor) -> int:
    memory = _memories.get(flat.data_ptr())
    if memory is None or len(memory) != flat.numel() * flat.element_size():
        raise ValueError("a tensor that is not one of shared_zeros, as a whole, cannot be handed over")
    return memory.descriptor


class Pipe:
    """One end of a socket pair between two processes of a rank. Messages arrive whole and in order; the tensors that come
    with one are the same memory on both sides. Any thread may send, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Raises OSError if the other side is gone."""
        kinds = [[str(t.dtype).removeprefix("torch."), t.numel()] for t in tensors]
        data = json.dumps({"message": message, "tensors": kinds}).encode()
        shared = [t for t in tensors if t.numel()]
        if len(data) > INLINE:
            shared, data = [*shared, shared_bytes(data)], b"\0"
        with self._sending:
            socket.send_fds(self._sock, [data], [_descriptor(t) for t in shared])

    def receive(self) -> tuple[Message, list[Tensor]]:
        """Raises ConnectionError once the other side is gone."""
        data, descriptors, *_ = socket.recv_fds(self._sock, INLINE + 1, DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise ConnectionResetError("the other process of this rank has ended")
        if data == b"\0":
            data = _map(descriptors.pop(), torch.uint8).numpy().tobytes()
        parsed, left = json.loads(data), iter(descriptors)
        kinds = [(getattr(torch, name), count) for name, count in parsed["tensors"]]
        return parsed["message"], [
            _map(next(left), dtype) if count else torch.zeros(0, dtype=dtype) for dtype, count in kinds
        ]

    def close(self) -> None:
        """The other side's `receive` ends, and this one's."""
        self._sock.shutdown(socket.SHUT_RDWR)


def pipes() -> tuple[Pipe, Pipe]:
    """Both ends."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Pipe(one), Pipe(other)
