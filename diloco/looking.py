"""What is there before a region starts a run or joins it: the store, the run's directory, the lighthouse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ckpt.store import StoreError
from diloco.config import Config, build_security, store_url
from diloco.errors import ConfigError
from diloco.fold import JournalError, State
from diloco.journal import Journal
from elastic.lighthouse import AwayError, LighthouseError, find_or_serve


def look(cfg: Config, journal: Journal, stack: ExitStack) -> None:
    """Reads the journal. Raises ConfigError; nothing is written before all of it is as it should be."""
    owner = _owned_by(cfg)  # who opens a run writes this file after the journal, so it is read before that
    with _holding(cfg):
        journal.read()
    _check_owner(cfg, owner, journal.state)
    _lighthouse(cfg, journal.state, stack)
    if journal.state is None:
        with _holding(cfg):
            journal.store.prove()  # type: ignore[attr-defined]


def _lighthouse(cfg: Config, state: State | None, stack: ExitStack) -> None:
    """A run that has members can be joined without one: the journal says where they are."""
    try:
        server = find_or_serve(cfg.elastic.lighthouse, security=build_security(cfg), region=cfg.region.name)
    except LighthouseError as error:
        if not isinstance(error, AwayError) or state is None or not state.members:
            raise ConfigError(str(error)) from error
        return print(f"warning: {error}; meanwhile the members that the journal names are looked for", flush=True)
    if server is not None:
        print(f"lighthouse: none answered, started one at {cfg.elastic.lighthouse}", flush=True)
        stack.callback(server.shutdown)


@contextmanager
def _holding(cfg: Config) -> Iterator[None]:
    """What goes wrong with the store is a ConfigError."""
    try:
        yield
    except (StoreError, JournalError) as error:
        raise ConfigError(
            f"run.store={store_url(cfg)} cannot hold a run ({error}): set it to another place, or run.dir to a new directory"
        ) from error


def _owner(cfg: Config) -> Path:
    """The file that says whose run directory it is, lest metrics of two runs end up in one file."""
    return Path(cfg.run.dir) / ".run"


def _owned_by(cfg: Config) -> str:
    """Empty: nobody has written there yet."""
    return _owner(cfg).read_text().strip() if _owner(cfg).exists() else ""


def _check_owner(cfg: Config, owner: str, state: State | None) -> None:
    if owner and (state is None or state.run != owner):
        there = f"run {state.run}" if state else "none"
        raise ConfigError(
            f"run.dir={cfg.run.dir} is of run {owner}, but run.store={store_url(cfg)} holds {there}: set run.dir to a new "
            "directory"
        )


def take_directory(cfg: Config, run: str) -> None:
    """The run's directory is this run's from now on."""
    path = _owner(cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".run-{os.getpid()}")
    written.write_text(f"{run}\n")
    written.replace(path)
