"""A directory as a store's backend: objects are files that appear complete."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress

TEMPORARY = ".tmp"  # folder of a directory store for files that are not complete yet; never listed or a key
STALE_SECONDS = 24 * 3600.0  # a temporary file untouched for so long belongs to a killed process
ABSENT = (FileNotFoundError, NotADirectoryError)


class Files:
    """A directory, local or shared (NFS): complete files only, made in `.tmp` and linked or renamed."""

    def __init__(self, root: str):
        self.root = root

    def create(self, key: str, data: bytes) -> None:
        self._place(key, data, os.link)

    def write(self, key: str, data: bytes) -> None:
        self._place(key, data, os.replace)

    def _place(self, key: str, data: bytes, place: Callable[[str, str], None]) -> None:
        path = self._path(key)
        temporary = self._path(TEMPORARY, f"{os.getpid()}-{uuid.uuid4().hex}")
        _make_folder(os.path.dirname(temporary))
        _make_folder(os.path.dirname(path))
        try:
            _write_through(temporary, data)
            place(temporary, path)
        finally:
            _unlink(temporary)
        _sync_folder(os.path.dirname(path))

    def read(self, key: str, start: int, stop: int | None) -> bytes:
        with open(self._path(key), "rb") as file:
            size = os.fstat(file.fileno()).st_size  # bounds what `read` allocates
            file.seek(start)
            return file.read(max(0, (size if stop is None else min(stop, size)) - start))

    def size(self, key: str) -> int:
        if not os.path.isfile(self._path(key)):
            raise FileNotFoundError(key)
        return os.path.getsize(self._path(key))

    def delete(self, key: str) -> None:
        os.unlink(self._path(key))

    def find(self, folder: str) -> Iterator[str]:
        for parent, _, names in os.walk(self._path(folder), onerror=_raise_unless_absent):
            for name in names:
                yield os.path.relpath(os.path.join(parent, name), self.root)

    def modified(self, folder: str) -> Iterator[tuple[str, float]]:
        for key in self.find(folder):
            with suppress(FileNotFoundError):  # removed since it was listed
                yield key, os.path.getmtime(self._path(key))

    def sweep(self) -> None:
        folder = self._path(TEMPORARY)
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):  # its process finished, or somebody else sweeps
                if time.time() - os.path.getmtime(path) > STALE_SECONDS:
                    os.unlink(path)

    def _path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)


def _raise_unless_absent(error: OSError) -> None:
    """`os.walk` hides errors: an unreadable folder must not look empty; one that is being removed may."""
    if not isinstance(error, ABSENT):
        raise error


def _write_through(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(path: str) -> None:
    """Make a folder and its parents, each entry durable in its own parent."""
    if os.path.isdir(path):
        return
    _make_folder(os.path.dirname(path))
    os.makedirs(path, exist_ok=True)
    _sync_folder(os.path.dirname(path))


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):  # os.replace has moved it
        os.unlink(path)
