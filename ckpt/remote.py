"""Any fsspec filesystem as a store's backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Remote:
    """Any other fsspec filesystem.

    For create, s3fs sends If-None-Match: * with the PUT, and from 100 MiB with CompleteMultipartUpload.
    """

    def __init__(self, fs: Any, root: str):
        self.fs = fs
        self.root = root.rstrip("/")

    def create(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(self._path(key), data, mode="create")

    def write(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(self._path(key), data)

    def read(self, key: str, start: int, stop: int | None) -> bytes:
        if start == 0 and stop is None:
            return bytes(self.fs.cat_file(self._path(key)))
        return bytes(self.fs.cat_file(self._path(key), start=start, end=stop))

    def size(self, key: str) -> int:
        info = self.fs.info(self._path(key))
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return int(info["size"])

    def delete(self, key: str) -> None:
        self.fs.rm_file(self._path(key))

    def find(self, folder: str) -> Iterator[str]:
        inside = f"{self._path(folder)}/"
        for path in self.fs.find(inside.rstrip("/")):
            # s3fs names an empty folder, or a file of this name, as its own content.
            if path.startswith(inside):
                yield path.removeprefix(f"{self.root}/")

    def modified(self, folder: str) -> Iterator[tuple[str, float]]:
        for key in self.find(folder):
            try:
                when = self.fs.modified(self._path(key))
            except FileNotFoundError:
                continue  # removed since it was listed
            yield key, when.timestamp()

    def sweep(self) -> None:
        pass

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}".rstrip("/")
