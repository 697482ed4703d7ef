"""`python -m ckpt VERB ...`: what a person asks of checkpoints, and how it answers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence

from ckpt import exporting, importing, making, retention
from ckpt.catalog import ROOT, Facts, Named, damages, facts, named, one, open_store, some
from ckpt.checkpoint import DamagedError, load_manifest
from ckpt.errors import RequestError
from ckpt.layout import Theta

VERBS = {
    "ls": "URL: its checkpoints, one a line",
    "show": "URL[@ENTRY]: what a checkpoint says of itself, and its layout",
    "verify": "URL[@ENTRY]: reads every byte of one or all",
    "export": "URL[@ENTRY] --format hf OUT [--dtype fp32|bf16]: a folder for transformers' LlamaForCausalLM",
    "gc": "URL [--keep 3] [--keep-every 0] [--grace 900] [--dry-run]: removes what ckpt.keep, ckpt.keep_every and ckpt.grace "
    "leave of its checkpoints",
    "pin": "URL[@ENTRY]: gc and training leave this one",
    "unpin": "URL@ENTRY: undoes it",
    "average": "URL@ENTRY URL@ENTRY ... [--weights A,B,...] OUT: a checkpoint with the weighted mean of their θ",
    "import": "HF_FOLDER OUT: a checkpoint from a folder of a LlamaForCausalLM",
}
"""Verb -> what follows it."""
OPTIONS = {
    "export": {"--format", "--dtype"},
    "average": {"--weights"},
    "gc": {"--keep", "--keep-every", "--grace", "--dry-run"},
}
GC_DEFAULTS = {"--keep": "3", "--keep-every": "0", "--grace": "900"}
FLAGS = {"--dry-run"}
"""Options without a value."""


def usage() -> str:
    lines = [f"  {verb} {what}" for verb, what in VERBS.items()]
    where = "(URL: a run directory, or the URL of a run's store; without @ENTRY or @RUN/ENTRY the newest)"
    return "\n".join([f"usage: python -m ckpt VERB ... {where}", *lines])


def main(argv: Sequence[str]) -> int:
    """The exit code: 1 if a checkpoint is damaged, 2 if the command cannot be carried out."""
    if not argv or argv[0] not in VERBS:
        print(usage(), file=sys.stderr)
        return 2
    verbs = {"ls": _ls, "show": _show, "verify": _verify, "export": _export, "average": _average, "import": _import}
    verbs |= {"gc": _gc, "pin": _pin, "unpin": _unpin}
    try:
        return verbs[argv[0]](*split(argv[0], argv[1:]))
    except (RequestError, OSError) as error:
        print(f"ckpt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except DamagedError as error:
        print(f"ckpt: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def split(verb: str, rest: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(what is named, options). RequestError for an option that the verb does not have."""
    places, options, words = list[str](), dict[str, str](), iter(rest)
    for word in words:
        key, equals, value = word.partition("=")
        if not word.startswith("--"):
            places.append(word)
        elif key not in OPTIONS.get(verb, ()):
            raise RequestError(f"{word} is not known here: {verb} {VERBS[verb]}")
        elif key in FLAGS:
            if equals:
                raise RequestError(f"{word} has a value, and {key} takes none: {verb} {VERBS[verb]}")
            options[key] = ""
        elif not (value := value if equals else next(words, "")):
            raise RequestError(f"{key} has no value: {verb} {VERBS[verb]}")
        else:
            options[key] = value
    return places, options


def _exactly(verb: str, places: Sequence[str], count: int) -> list[str]:
    if len(places) != count:
        raise RequestError(f"{' '.join(places) or 'nothing'} is not {count} place(s): {verb} {VERBS[verb]}")
    return list(places)


def _say(lines: Iterable[str]) -> int:
    for line in lines:
        print(line, flush=True)
    return 0


def _ls(places: list[str], options: dict[str, str]) -> int:
    what = named(*_exactly("ls", places, 1))
    there, damaged = some(what), 0
    print(f"{'run':<18} {'entry':>7} {'rounds':>7} {'tokens':>17} {'size':>14} {'shards':>7}")
    pins = retention.pinned(what.store)
    for prefix, _, _ in there:
        try:
            line = _line(facts(what.store, load_manifest(what.store, prefix)))
            print(f"{line} · pinned" if prefix in pins else line, flush=True)
        except DamagedError as error:
            print(f"damaged: {error}", flush=True)
            damaged += 1
    return 1 if damaged else 0


def _line(f: Facts) -> str:
    return f"{f.run:<18} {f.entry:>7} {f.rounds:>7} {f.tokens:>17,} {f.bytes / 1e6:>11,.1f} MB {f.shards:>7}"


def _show(places: list[str], options: dict[str, str]) -> int:
    what = named(*_exactly("show", places, 1))
    manifest = one(what)
    known, theta = facts(what.store, manifest), Theta(what.store, manifest)
    args = " ".join(f"{key}={value}" for key, value in manifest["model"]["args"].items())
    elements = sum(slot.stop - slot.start for slot in theta.slots.values())
    planes = sorted({piece["plane"] for shard in manifest["shards"] for piece in shard["pieces"]})
    print(f"checkpoint  {manifest['prefix']} · format {manifest['format']} · digest {manifest['digest']}")
    print(f"run         {known.run} · entry {known.entry} · rounds {known.rounds} · tokens {known.tokens:,}")
    print(f"model       {manifest['model']['target']} · {args} · seq_len={manifest['model']['seq_len']}")
    print(f"planes      {', '.join(planes)} · {elements:,} parameters each")
    print(f"stored      {known.bytes / 1e6:,.1f} MB · {known.shards} shards")
    if "made" in manifest:
        print(f"made        {json.dumps(manifest['made'])}")
    for slot in theta.slots.values():
        print(f"fragment {slot.fragment} · {slot.start:>12,} · {slot.name} {list(slot.shape)}")
    return 0


def _verify(places: list[str], options: dict[str, str]) -> int:
    wrong = looked = 0
    for prefix, sentences in damages(named(*_exactly("verify", places, 1))):
        looked, wrong = looked + 1, wrong + len(sentences)
        print("\n".join([f"damaged: {each}" for each in sentences] or [f"{prefix} · all right"]), flush=True)
    print(f"looked at {looked} checkpoint(s) · {f'{wrong} damaged or missing' if wrong else 'all right'}")
    return 1 if wrong else 0


def _gc(places: list[str], options: dict[str, str]) -> int:
    what = named(*_exactly("gc", places, 1))
    if what.entry is not None:
        raise RequestError(f"URL={what.text} is one checkpoint: name the store, and pin what is to stay")
    some(what)
    keep, every, grace = (
        _number(options, key, least) for key, least in (("--keep", 1), ("--keep-every", 0), ("--grace", 0))
    )
    dry, removed, left = "--dry-run" in options, 0, 0
    for root in retention.roots(what.store):
        gone = retention.collect(what.store, root, retention.Rules(keep, every, grace), dry)
        verb = "would be removed" if dry else "removed"
        for prefix in gone.checkpoints:
            print(f"{prefix} · {verb}; its shards when that is {grace} s old", flush=True)
        for key in gone.objects:
            print(f"{key} · {verb}", flush=True)
        removed, left = removed + len(gone.checkpoints), left + len(gone.objects)
    print(f"{removed} checkpoint(s) and {left} object(s) without one · {'would be removed' if dry else 'removed'}")
    return 0


def _number(options: dict[str, str], key: str, least: int) -> int:
    text = options.get(key, GC_DEFAULTS[key])
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) >= least):
        raise RequestError(f"{key}={text} is not a whole number of at least {least}: gc {VERBS['gc']}")
    return int(text)


def _pin(places: list[str], options: dict[str, str]) -> int:
    what = named(*_exactly("pin", places, 1))
    prefix = one(what)["prefix"]
    retention.pin(what.store, prefix)
    return _say([f"{prefix} · pinned"])


def _unpin(places: list[str], options: dict[str, str]) -> int:
    what = _with_entry(*_exactly("unpin", places, 1))
    prefix = f"{ROOT}/{what.run}/{what.entry}" if what.run else one(what)["prefix"]
    if prefix not in retention.pinned(what.store):
        raise RequestError(
            f"URL={what.text} is not pinned: {', '.join(sorted(retention.pinned(what.store))) or 'none'} is"
        )
    retention.unpin(what.store, prefix)
    return _say([f"{prefix} · not pinned any more"])


def _export(places: list[str], options: dict[str, str]) -> int:
    url, out = _exactly("export", places, 2)
    form, dtype = options.get("--format"), options.get("--dtype", "fp32")
    if form != "hf":
        raise RequestError(f"--format={form} is not known: add --format hf")
    if dtype not in exporting.DTYPES:
        raise RequestError(f"--dtype={dtype} is not known: set it to {' or '.join(exporting.DTYPES)}")
    what = named(url)
    manifest = one(what)
    facts(what.store, manifest)
    print(f"from {manifest['prefix']}", flush=True)
    return _say(exporting.export(what.store, manifest, out, dtype))


def _average(places: list[str], options: dict[str, str]) -> int:
    *urls, out = places or [""]
    if len(urls) < 2:
        raise RequestError(f"{' '.join(places)} names fewer than two checkpoints and OUT: average {VERBS['average']}")
    sources, store = [_with_entry(url) for url in urls], open_store(out)
    weights = _weights(options.get("--weights"), len(urls))
    making.check_new(store, out)
    return _say(making.average(sources, weights, store))


def _with_entry(url: str) -> Named:
    """Of a run that goes on, "the newest" is another one tomorrow: an average says which it means."""
    what = named(url)
    if what.entry is None:
        raise RequestError(f"URL={url} names no entry: write {url}@ENTRY, of those that python -m ckpt ls {url} lists")
    return what


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        weights = [float(each) for each in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(0 <= w < math.inf for w in weights) or not 0 < math.fsum(weights) < math.inf:
        raise RequestError(f"--weights={text} is not {count} numbers of at least 0, not all 0: write --weights A,B,...")
    return weights


def _import(places: list[str], options: dict[str, str]) -> int:
    folder, out = _exactly("import", places, 2)
    store = open_store(out)
    making.check_new(store, out)
    return _say(importing.import_(importing.Folder(folder), store))
