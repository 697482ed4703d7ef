import ctypes
import sys

from ckpt.tool import main

_M_MMAP_THRESHOLD = -3  # <malloc.h>


def _map_blocks() -> None:
    """Makes glibc give blocks of 4 MiB and more back when they are freed: its heap keeps them otherwise, and averaging 0.6 GB
    took 1.2 GB of memory instead of 0.6."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)


if __name__ == "__main__":
    _map_blocks()
    raise SystemExit(main(sys.argv[1:]))
