"""`python -m diloco.journal VERB RUN`: what a person asks of a run's journal, and how it answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ckpt.catalog import open_store
from ckpt.checkpoint import DamagedError
from ckpt.store import Store
from diloco import audit, steer, tally
from diloco.errors import ConfigError
from diloco.fold import JournalError
from diloco.journal import Journal, describe

READS = {
    "show": "RUN: its entries, one a line, and where it stands",
    "verify": "RUN: folds all entries, and checks stored bits and checkpoints against them",
    "replay": "RUN [--from SEQ] [--to SEQ]: rebuilds θ and momentum from a checkpoint and the rounds' bits, and checks them",
    "tokens": "RUN: tokens applied, dropped, leased and returned, region by region and source by source",
}
"""Verb -> what follows it."""


def usage() -> str:
    lines = [f"  {verb} {what}" for verb, what in {**READS, **steer.USAGE}.items()]
    return "\n".join(
        ["usage: python -m diloco.journal VERB RUN (RUN: a run directory, or the URL of a run's store)", *lines]
    )


def serve(argv: Sequence[str]) -> int:
    """The exit code: 1 if something about the run is wrong, 2 if the command is."""
    if len(argv) < 2 or argv[0] not in {**READS, **steer.USAGE}:
        print(usage(), file=sys.stderr)
        return 2
    verb, name, rest = argv[0], argv[1], argv[2:]
    try:
        store = open_store(name)
        if verb in steer.USAGE:
            return _steer(verb, store, name, rest)
        if verb != "replay" and rest:
            raise ConfigError(f"{' '.join(rest)} is too much: {verb} RUN")
        return {"show": _show, "verify": _verify, "replay": _replay, "tokens": _tokens}[verb](store, name, rest)
    except (ConfigError, OSError) as error:
        print(f"diloco.journal: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (JournalError, DamagedError) as error:
        print(f"diloco.journal: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _journal(store: Store, name: str) -> tuple[Journal, list[bytes]]:
    journal = Journal(store)
    entries = journal.read()
    if not entries:
        raise ConfigError(f"RUN={name} holds no journal: name a run directory or the URL of a run's store")
    return journal, entries


def _steer(verb: str, store: Store, name: str, rest: Sequence[str]) -> int:
    print(steer.steer(verb, store, _journal(store, name)[0], rest))
    return 0


def _show(store: Store, name: str, rest: Sequence[str]) -> int:
    run = audit.Run(store, name)
    for seq, data in enumerate(run.entries):
        print(describe(data, run.states[seq - 1] if seq else None))
    if run.report.wrong:
        raise JournalError(run.report.wrong[0])
    state = run.state
    stands = state.stopped or ("paused" if state.paused else "not stopped")
    out = f" · expelled {', '.join(state.expelled)}" if state.expelled else ""
    print(f"rounds {state.rounds} · tokens {state.tokens:,} · epoch {state.epoch} · {stands}{out}")
    return 0


def _verify(store: Store, name: str, rest: Sequence[str]) -> int:
    report = audit.check(audit.Run(store, name))
    for sentence in report.wrong:
        print(f"wrong: {sentence}")
    looked = " · ".join(f"{count} {what}" for what, count in report.seen.items())
    print(
        f"looked at {looked or 'nothing'} · {f'{len(report.wrong)} wrong or missing' if report.wrong else 'all right'}"
    )
    return 1 if report.wrong else 0


def _replay(store: Store, name: str, rest: Sequence[str]) -> int:
    options: dict[str, int] = {}
    for option, value in zip(rest[::2], [*rest[1::2], ""][: len(rest[::2])], strict=True):
        if option not in ("--from", "--to") or not value.isdigit():
            raise ConfigError(f"{' '.join(rest)} is not known here: replay {READS['replay'].split(':')[0]}")
        options[option] = int(value)
    run = audit.Run(store, name)
    if run.report.wrong:
        raise JournalError(run.report.wrong[0])
    for line in audit.replay(run, options.get("--from"), options.get("--to")):
        print(line, flush=True)
    return 0


def _tokens(store: Store, name: str, rest: Sequence[str]) -> int:
    state, counts = tally.tally(_journal(store, name)[1])
    print("\n".join(tally.table(state, counts)))
    if wrong := tally.differs(state, counts):
        raise JournalError(wrong)
    return 0
