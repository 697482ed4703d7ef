"""Which checkpoints a store has, and how a person names one: URL, URL@ENTRY or URL@RUN/ENTRY."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ckpt.checkpoint import MANIFEST, DamagedError, load_manifest
from ckpt.errors import RequestError
from ckpt.format import FormatError, field, is_count, require
from ckpt.layout import Theta
from ckpt.reading import findings
from ckpt.store import MissingError, Store

ROOT = "checkpoints"
"""Folder of the global checkpoints: <ROOT>/<run>/<entry>."""

_GLOBAL = re.compile(rf"({ROOT}/([^/]+)/([0-9]{{1,18}}))/{re.escape(MANIFEST)}")
_NAMED = re.compile(r"(?P<url>.+)@(?:(?P<run>[^/@]+)/)?(?P<entry>[0-9]{1,18})")


@dataclass(frozen=True)
class Named:
    """What a person named: a store, and maybe one of its checkpoints."""

    text: str
    store: Store
    run: str | None = None
    entry: int | None = None


def open_store(name: str) -> Store:
    """The store of a run directory, or at a URL. StoreError if it is none."""
    inside = os.path.join(name.removeprefix("file://"), "store")
    return Store(inside if os.path.isdir(inside) else name)


def named(text: str) -> Named:
    """Parse URL[@[RUN/]ENTRY]."""
    if match := _NAMED.fullmatch(text):
        return Named(text, open_store(match["url"]), match["run"], int(match["entry"]))
    return Named(text, open_store(text))


def prefixes(store: Store) -> list[tuple[str, str, int]]:
    """(prefix, run, entry) of the committed global checkpoints, by run and entry."""
    found = [match for key in store.list(ROOT) if (match := _GLOBAL.fullmatch(key))]
    return sorted(((m[1], m[2], int(m[3])) for m in found), key=lambda item: item[1:])


def some(what: Named) -> list[tuple[str, str, int]]:
    """As prefixes, but those that were named; RequestError if that is none."""
    there = prefixes(what.store)
    if not there:
        raise RequestError(f"URL={what.text} has no checkpoint: name a run directory, or the URL of a run's store")
    chosen = [item for item in there if what.run in (None, item[1]) and what.entry in (None, item[2])]
    if not chosen:
        names = ", ".join(f"{run}/{entry}" for _, run, entry in there)
        raise RequestError(f"URL={what.text} is no checkpoint: write URL@ENTRY with one of {names}")
    return chosen


def one(what: Named) -> dict[str, Any]:
    """The manifest of the checkpoint that was named, or of the newest. RequestError if that is none or several, and
    DamagedError if it is damaged."""
    chosen = some(what)
    if what.entry is None:
        newest = max(entry for _, _, entry in chosen)
        chosen = [item for item in chosen if item[2] == newest]
    if len(chosen) > 1:
        runs = " or ".join(f"@{run}/{entry}" for _, run, entry in chosen)
        raise RequestError(f"URL={what.text} is a checkpoint of several runs: write URL{runs}")
    return load_manifest(what.store, chosen[0][0])


@dataclass(frozen=True)
class Facts:
    """What a manifest says of a global checkpoint; `tokens` are those of committed rounds."""

    run: str
    entry: int
    rounds: int
    tokens: int
    bytes: int
    shards: int


def facts(store: Store, manifest: dict[str, Any]) -> Facts:
    """DamagedError if the manifest does not say them."""
    prefix: str = manifest["prefix"]
    try:
        counters, model = (field(manifest, key, _is_dict, "a body") for key in ("counters", "model"))
        rounds, applied = (field(counters, key, is_count, "counters") for key in ("rounds", "applied"))
        tokens = applied * field(model, "seq_len", is_count, "a model")
        field(model, "args", _is_dict, "a model")
        require(isinstance(model.get("target"), str), "has a model without target")
    except FormatError as error:
        raise DamagedError(f"{store.url}: {prefix}/{MANIFEST} is damaged: it {error}") from error
    _, run, entry = prefix.rsplit("/", 2)
    size = sum(record["bytes"] for record in manifest["shards"])
    return Facts(run, int(entry), rounds, tokens, size, len(manifest["shards"]))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def damages(what: Named) -> Iterator[tuple[str, list[str]]]:
    """(prefix, one sentence for each damage) of the named checkpoint; of all there are in the store, the regions' own
    included, if none is named. Reads every byte. RequestError if there is none."""
    chosen = [prefix for prefix, _, _ in some(what)]
    if what.entry is None:
        keys = what.store.list("regions")
        chosen += [key.removesuffix(f"/{MANIFEST}") for key in keys if key.endswith(f"/{MANIFEST}")]
    for prefix in chosen:
        yield prefix, _damages(what.store, prefix)


def _damages(store: Store, prefix: str) -> list[str]:
    try:
        manifest = load_manifest(store, prefix)
        if prefix.startswith(f"{ROOT}/"):
            facts(store, manifest)
            Theta(store, manifest)
    except MissingError as error:
        return [f"{error}: it was removed since it was listed"]
    except DamagedError as error:
        return [str(error)]
    return [str(error) for error in findings(store, manifest)]
