"""`python -m diloco.data VERB`: prepared folders from the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from diloco.corpus.documents import FORMATS
from diloco.corpus.folder import SKIPPED, SPLITS, Index, read_index, wrong
from diloco.corpus.prepare import prepare
from diloco.corpus.worker import NAMED, Options
from diloco.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m diloco.data", description="Token shards of text, for data=prepared data.path=OUT.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    make = verbs.add_parser("prepare", help="text to a folder of token shards; the same command goes on after a kill")
    make.add_argument(
        "sources", nargs="+", metavar="SRC", help="file, directory, glob or fsspec URL: text, JSON lines, Parquet"
    )
    make.add_argument("out", metavar="OUT", help="directory to make")
    make.add_argument(
        "--tokenizer", default="bytes", help="bytes, a tokenizer.json, or a directory with that or GPT-2's files"
    )
    make.add_argument("--end", default="auto", help="token after each document, or none (default: the tokenizer's own)")
    make.add_argument("--field", default="text", help="of JSON lines and Parquet (default: text)")
    make.add_argument("--format", default="auto", choices=("auto", *FORMATS), help="default: by each file's ending")
    make.add_argument(
        "--holdout", type=float, default=0.01, help="share of the documents never trained on, chosen by hash"
    )
    make.add_argument("--on-error", default="stop", choices=("stop", "skip"), help="what to do about damaged documents")
    make.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)"
    )
    for verb, what in {
        "show": "what a prepared folder holds",
        "verify": "its checksums; exit code 1 if one is wrong",
    }.items():
        verbs.add_parser(verb, help=what).add_argument("out", metavar="OUT", help="directory or URL")
    return parser


def serve(argv: Sequence[str]) -> int:
    """The exit code: 1 if a folder is damaged, 2 if the command or the input is wrong."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.verb == "prepare":
            return _prepare(arguments)
        index = read_index(arguments.out, "OUT")
        if arguments.verb == "show":
            print(describe(index))
            return 0
        faults = list(wrong(arguments.out, index))
        print("\n".join([f"wrong: {fault}" for fault in faults] or ["all right"]))
        return 1 if faults else 0
    except (ConfigError, OSError) as error:
        print(f"diloco.data: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diloco.data: stopped; the same command goes on", file=sys.stderr)
        return 130


def _prepare(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.holdout <= 0.5:
        raise ConfigError(f"--holdout {arguments.holdout} is not a share from 0 to 0.5: set it to about 0.01")
    if arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers} is not a number of processes: set it to 1 or more")
    chosen = {
        key: getattr(arguments, key) for key in ("out", "tokenizer", "end", "field", "format", "holdout", "on_error")
    }
    index = prepare(arguments.sources, Options(**chosen), arguments.workers)
    print(describe(index))
    if index.skipped:
        path = Path(arguments.out) / SKIPPED
        few = len(path.read_text().splitlines()) < index.skipped
        print(
            f"{index.skipped:,} damaged skipped: {path} names {f'the first {NAMED:,} of each task' if few else 'them'}"
        )
    if index.holdout and not index.heldout.names:
        print(
            f"no document was held out: with so few, set --holdout above {index.holdout}, or data.holdout when training"
        )
    print(f"train on it with data=prepared data.path={arguments.out}")
    return 0


def describe(index: Index) -> str:
    lines = []
    for name in SPLITS:
        split = getattr(index, name)
        tokens, size = sum(split.tokens), sum(split.bytes)
        lines.append(
            f"{name:8} {tokens:,} tokens · {sum(split.documents):,} documents · {size / 1e6:,.1f} MB of text · "
            f"{size / max(tokens, 1):.2f} bytes/token · {len(split.names):,} shards of {index.dtype[1:]}"
        )
    kind = ", ".join(index.tokenizer) or "bytes"
    end = "nothing" if index.end is None else f"token {index.end}"
    lines.append(f"vocabulary {index.vocab:,} ({kind}) · {end} ends documents · digest {index.digest[:16]}")
    return "\n".join(lines)
