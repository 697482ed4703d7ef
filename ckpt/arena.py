"""Memory that a rank and its uploader share: training copies the planes into it, and that is all it waits for."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress


class Arena:
    """An anonymous file of fixed size, mapped. A process that has its descriptor keeps the contents, whoever else dies."""

    def __init__(self, descriptor: int, writable: bool) -> None:
        """Takes the descriptor over. Maps all of it, page by page: else the first copy into it would take twice as long as the
        later ones."""
        self.descriptor, self.size = descriptor, os.fstat(descriptor).st_size
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        populate = mmap.MAP_POPULATE if writable else 0
        self._map = mmap.mmap(descriptor, self.size, mmap.MAP_SHARED | populate, access) if self.size else b""

    @classmethod
    def create(cls, size: int) -> Arena:
        """Of `size` bytes, all of which there are. Raises OSError if the machine does not have them."""
        descriptor = os.memfd_create("ckpt-arena", os.MFD_CLOEXEC)
        if size:
            os.posix_fallocate(descriptor, 0, size)  # not a SIGBUS at the first save
        return cls(descriptor, writable=True)

    @classmethod
    def attach(cls, descriptor: int) -> Arena:
        """One that another process has made; read only."""
        return cls(descriptor, writable=False)

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self.descriptor)  # what is mapped stays so while somebody has its bytes

    @property
    def bytes(self) -> memoryview:
        """Its contents, not a copy of them."""
        return memoryview(self._map)

    def pin(self) -> None:
        """For fast copies from a GPU. Raises RuntimeError if CUDA refuses."""
        import torch

        if self.size:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            if code := int(torch.cuda.cudart().cudaHostRegister(address, self.size, 0)):
                raise RuntimeError(f"cudaHostRegister of {self.size} bytes: CUDA error {code}")
