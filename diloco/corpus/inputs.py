"""The files that `prepare` reads: of files, directories and globs, local or at any fsspec URL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from diloco.errors import ConfigError

MAGIC = "*?["
LOST = "lost"
"""The type of a link that leads to nothing."""

Entries = dict[str, dict[str, Any]]


def inputs(sources: Sequence[str], out: Path) -> tuple[list[tuple[str, int | None]], list[str]]:
    """(path, bytes) of all files: sources in the order given, those of a directory or a glob sorted by name, each once; None:
    its store does not tell. And a sentence for each link that leads to no file. Raises ConfigError."""
    found: dict[str, int | None] = {}
    lost: dict[str, str] = {}
    for source in sources:
        fs, entries = _listed(source)
        _outside(source, [path for path in entries if "://" not in path], out)
        for path, entry in entries.items():
            if entry["type"] == LOST:
                lost[path] = f"{path}: its link to {entry['destination']} leads to no file, or back to where it is"
            elif path not in found:
                found[path] = _size(fs, source, entry)
    return list(found.items()), list(lost.values())


def _outside(source: str, paths: Sequence[str], out: Path) -> None:
    mine = out.resolve()
    around = Path(source).is_dir() and mine.is_relative_to(Path(source).resolve())
    if around or any(_real(path).is_relative_to(mine) for path in paths):
        raise ConfigError(f"SRC {source} contains OUT {out}: prepare into a directory outside of it")


def _listed(source: str) -> tuple[AbstractFileSystem, Entries]:
    """The files of a source, and lost links, by the path that opens them. Raises ConfigError if there are none."""
    try:
        fs, path = url_to_fs(source)
        fs = _Following() if isinstance(fs, LocalFileSystem) else fs
        entries = _visible(fs, path, any(c in source for c in MAGIC))
    except FileNotFoundError:
        entries = {}
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"SRC {source} cannot be read ({error}): check its spelling, and that you may") from error
    if not entries:
        raise ConfigError(f"SRC {source} is no file, directory or glob that holds any: check its spelling")
    local = isinstance(fs, LocalFileSystem)
    return fs, {path if local else fs.unstrip_protocol(path): entry for path, entry in entries.items()}


def _visible(fs: AbstractFileSystem, path: str, glob: bool) -> Entries:
    """Sorted by name. What the user named is not hidden, only what is found below it."""
    named: list[str] = []
    if glob:
        begin = min((path.index(c) for c in MAGIC if c in path), default=len(path))
        root = path[: path.rfind("/", 0, begin) + 1]
        named = [part for part in path[len(root) :].split("/") if part.startswith(".")]
        entries = fs.glob(path, detail=True)
    elif fs.isdir(path):
        root, entries = path.rstrip("/") + "/", fs.find(path, detail=True)
    else:
        root, entries = path, {path: fs.info(path)}
    files = [name for name in sorted(entries) if entries[name]["type"] in ("file", LOST)]
    if path.startswith(("http://", "https://")):  # a page has links that sort it
        files = [name for name in files if name == path or not name.rpartition("/")[2].startswith("?")]
    return {name: entries[name] for name in files if not _hidden(name.removeprefix(root), named)}


def _hidden(name: str, named: Sequence[str]) -> bool:
    """named: patterns of hidden parts that the user asked for."""
    parts = [part for part in name.split("/") if part.startswith(".")]
    return any(not any(fnmatch(part, pattern) for pattern in named) for part in parts)


def _size(fs: AbstractFileSystem, source: str, entry: dict[str, Any]) -> int | None:
    """A web server's listing has none."""
    size = entry["size"]
    if size is None:
        try:
            size = fs.info(entry["name"])["size"]
        except OSError as error:  # it may be back in a minute, so it is no damage
            raise ConfigError(
                f"SRC {source}: {entry['name']} is listed, and does not answer: try again, or name those that do by a glob"
            ) from error
    return None if size is None else int(size)


class _Following(LocalFileSystem):
    """Lists what links lead to; LocalFileSystem says that a link is neither a file nor a directory. And says which directory
    may not be read, where fsspec leaves it out."""

    def ls(self, path: Any, detail: bool = False, **kwargs: Any) -> list[Any]:
        try:
            return cast(list[Any], super().ls(path, detail, **kwargs))
        except PermissionError as error:
            raise ValueError(str(error)) from error  # of OSErrors `walk` says nothing

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        path = os.fspath(path)  # of an entry of a directory, whose kind would be the link's
        try:
            found: dict[str, Any] = super().info(path, **kwargs)
        except OSError:
            if not os.path.islink(path):
                raise
            found = {"name": self._strip_protocol(path), "size": 0, "type": LOST, "destination": os.readlink(path)}
        if found.get("islink") and found["type"] == "directory" and _leads_back(found["name"]):
            found["type"] = LOST
        return found


def _leads_back(link: str) -> bool:
    """Whether a link to a directory is inside of that."""
    target = _real(link)
    return any(_real(parent).is_relative_to(target) for parent in Path(link).parents)


def _real(path: str | Path) -> Path:
    """As Path.resolve(), which raises RuntimeError at a link to itself."""
    return Path(os.path.realpath(path))
