"""Prepared folders in a real bucket: what is fetched, checked, kept, shared, and tried again."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from ckpt.store import StoreError
from diloco.corpus import cache as caching
from diloco.corpus.cache import RUN, RUN_BYTES, Cache, DamagedShard, Run, Shard
from diloco.corpus.command import serve
from diloco.corpus.folder import CHUNK
from diloco.data import DataConfig
from diloco.errors import ConfigError
from diloco.mixing import Samples, build_samples
from tests.corpora import upload, write_folder
from tests.s3_proxy import Proxy, Rule
from tests.s3_server import BUCKET, Server

ROOT = Path(__file__).parent.parent
SEQ_LEN = 2048
SHARDS = (1_400_000, 1_100_001, 1_200_000)
"""Tokens, of two bytes: chunks and windows end across shards."""
CHUNKS = sum(-(-2 * tokens // CHUNK) for tokens in SHARDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 50257, tokens, dtype="<u2") for tokens in (*SHARDS, 30_000)]
    return write_folder(tmp_path_factory.mktemp("corpus") / "out", {"train": arrays[:-1], "heldout": arrays[-1:]})


@pytest.fixture
def url(
    folder: Path, weed: Server, proxy: Proxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Of the folder, behind the proxy; clients do not try again by themselves."""
    for name, value in {**weed.environment, "AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(caching, "RETRY_SECONDS", (0.02, 0.1))
    found = upload(folder, f"s3://{BUCKET}/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}")
    proxy.requests.clear()
    return found


def config(url: str, root: Path, **changes: object) -> DataConfig:
    return DataConfig(
        "diloco.corpus.source.prepared", url, holdout=0.0, cache=str(root / "cache"), **{"patience": 20.0, **changes}
    )


def open_(url: str, root: Path, **changes: object) -> Samples:
    return build_samples(config(url, root, **changes), SEQ_LEN, 0)


def local(folder: Path, **changes: object) -> Samples:
    return open_(str(folder), folder, **changes)


def kept(root: Path) -> int:
    """Bytes of chunks in the cache."""
    return sum(512 * path.stat().st_blocks // CHUNK * CHUNK for path in (root / "cache").glob("diloco-shards/*/*-*/*"))


def fetched(proxy: Proxy, url: str, ending: str = "tokens") -> int:
    return proxy.count("GET", rf"{url.rpartition('/')[2]}/\S*\.{ending}")


def test_a_streamed_corpus_is_the_local_one_and_begins_before_a_shard_is_there(
    url: str, folder: Path, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, sizes = Cache._fetch, list[int]()

    def counted(cache: Cache, key: str, start: int, stop: int, *rest: Any) -> memoryview:
        sizes.append(stop - start if key.endswith(".tokens") else 0)
        return fetch(cache, key, start, stop, *rest)

    monkeypatch.setattr(Cache, "_fetch", counted)
    near, far = local(folder), open_(url, tmp_path)
    assert far.source.digest == near.source.digest and far.source.bytes_per_token == near.source.bytes_per_token == 4
    assert proxy.count("GET") == 1, "opening reads the index alone"
    first = far.batch([0])
    assert fetched(proxy, url) <= 2 and kept(tmp_path) <= 2 * CHUNK < 2 * min(SHARDS)
    assert (first == near.batch([0])).all()
    for begin in range(0, near.train_windows, 100):
        indices = range(begin, min(begin + 100, near.train_windows))
        assert (far.batch(indices) == near.batch(indices)).all()
    held = range(near.heldout_windows)
    assert len(held) > 10 and all((far.heldout(i) == near.heldout(i)).all() for i in held)
    assert len(SHARDS) < fetched(proxy, url) <= CHUNKS + 1 and fetched(proxy, url, "sums") == len(SHARDS) + 1
    everything = sum(path.stat().st_size for path in folder.glob("*.tokens"))
    assert everything <= sum(sizes) <= everything + CHUNK, "once, but for the first chunk, between two of its run"


def test_a_mixture_of_buckets_and_directories_is_that_of_directories(
    url: str, folder: Path, proxy: Proxy, tmp_path: Path
) -> None:
    """Their chunks are fetched in the order in which samples need them, and share a cache."""
    random = np.random.default_rng(1)
    tokens = [random.integers(0, 50257, 900_000, dtype="<u2") for _ in range(2)]
    other, third = (write_folder(tmp_path / name, {"train": [array]}) for name, array in zip("ab", tokens, strict=True))

    def mixed(*places: str | Path) -> Samples:
        sources = [{"path": str(place), "weight": weight} for place, weight in zip(places, (5, 3, 2), strict=True)]
        return build_samples(config("", tmp_path, sources=sources), SEQ_LEN, 0)

    bucket = f"s3://{BUCKET}/mixture"
    far, near = mixed(url, upload(other, bucket), third), mixed(folder, other, third)
    assert far.source.digest == near.source.digest and far.mixture == near.mixture and far.shuffle == near.shuffle
    indices = range(0, far.train_windows, 7)
    for call in far.fetches(indices):
        call()
    before = fetched(proxy, url), fetched(proxy, bucket)
    assert all(before) and far.readahead > 0
    assert (far.batch(indices) == near.batch(indices)).all()
    assert (fetched(proxy, url), fetched(proxy, bucket)) == before, "all was there"


def test_the_cache_is_bounded_and_each_chunk_is_fetched_once_an_epoch(
    url: str, folder: Path, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diloco.data.BLOCK_TOKENS", 1 << 18)
    with pytest.raises(
        ConfigError, match=r"data\.cache_bytes=1000000 does not hold .* set it to (\d+) or more"
    ) as error:
        open_(url, tmp_path, shuffle=1 << 18, cache_bytes=1_000_000)
    least = int(re.findall(r"set it to (\d+)", str(error.value))[0])
    monkeypatch.setattr("diloco.corpus.source.room_for", lambda *_: 1)
    limit = 4 * CHUNK
    far, near = (open_(place, tmp_path, shuffle=1 << 18, cache_bytes=limit) for place in (url, str(folder)))
    assert limit < 2 * sum(SHARDS) and least > limit
    monkeypatch.setattr(caching, "TOUCH_SECONDS", 0.0)
    mine = tmp_path / "cache" / "a" / "b" / "c"
    mine.parent.mkdir(parents=True)
    mine.write_text("not of the cache")
    most = 0
    for index in range(near.train_windows):
        assert (far.batch([index]) == near.batch([index])).all()
        most = max(most, kept(tmp_path))
    assert most <= limit + limit // 64 + CHUNK and mine.exists()
    assert CHUNKS <= fetched(proxy, url) <= 2 * CHUNKS + 2, "a block of half a chunk lies in one or two"


def test_runs_of_chunks_are_fetched_ahead(
    url: str, folder: Path, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diloco.corpus.source.ALONE", 2)
    near, far = local(folder), open_(url, tmp_path)
    assert near.readahead == 0 and far.readahead == far.train_windows == near.train_windows
    everything = range(near.train_windows)
    assert near.fetches(everything) == []
    calls = far.fetches(everything)
    calls[0]()
    far.batch([0])
    assert fetched(proxy, url) <= 2, "what comes first"
    for call in calls:
        call()
    assert fetched(proxy, url) <= 3 + len(SHARDS) < CHUNKS
    seen = len(proxy.requests)
    assert (far.batch(everything) == near.batch(everything)).all() and len(proxy.requests) == seen


def test_two_groups_of_the_order_are_fetched_ahead(
    url: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache has room for, whatever the leases hold."""
    monkeypatch.setattr("diloco.data.BLOCK_TOKENS", 1 << 18)
    far, group = open_(url, tmp_path, shuffle=1 << 18), (1 << 18) // SEQ_LEN
    assert far.readahead == 2 * group
    for call in far.fetches(range(group - 1, far.train_windows)):
        call()
    there, seen = kept(tmp_path), fetched(proxy, url)
    far.batch(range(group - 1, 2 * group))
    assert fetched(proxy, url) == seen
    far.batch(range(far.train_windows))
    assert fetched(proxy, url) > seen and kept(tmp_path) > there


READ = """
import hashlib, sys
from pathlib import Path
from diloco.corpus.cache import Cache, Shard
from diloco.corpus.folder import CHUNK, read_index
url, root = sys.argv[1:]
split = read_index(url, "URL").train
cache = Cache(url, Path(root), "shared", 1 << 30, 20.0)
for name, tokens, checksum in zip(split.names, split.tokens, split.sha256):
    shard, digest = Shard(name, 2 * tokens, checksum), hashlib.sha256()
    for at in range(0, shard.size, CHUNK):
        digest.update(cache.read(shard, at, min(at + CHUNK, shard.size)))
    print(digest.hexdigest())
"""
"""As a rank does, without waiting for torch."""


def test_processes_share_a_cache(url: str, folder: Path, proxy: Proxy, tmp_path: Path) -> None:
    """Three at once, from nothing, one of them killed on its way: every chunk crosses the network once, or once more for the one
    that died with it."""
    command = [sys.executable, "-c", READ, url, str(tmp_path)]
    readers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    while fetched(proxy, url) < 2 and readers[0].poll() is None:
        time.sleep(0.001)
    readers[0].kill()
    said = [reader.communicate(timeout=100)[0] for reader in readers]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("train-*.tokens"))]
    assert [each.split() for each in said[1:]] == [digests, digests]
    assert CHUNKS <= fetched(proxy, url) <= CHUNKS + 1


def test_damage_is_fetched_again_or_named(
    url: str, folder: Path, proxy: Proxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    near, name = local(folder), r"\.tokens"
    for k, rule in enumerate(
        [Rule("flip", "GET", name, times=1, at=77), Rule("truncate", "GET", name, times=1, at=999)]
    ):
        with proxy.fault(rule):
            assert (open_(url, tmp_path / str(k)).batch([0]) == near.batch([0])).all()
        assert rule.hits == 1
    sentence = (
        r"/train-0000\d\.tokens is damaged: its bytes \[\d+, \d+\) do not have the digests of the index: copy it again"
    )
    with proxy.fault(Rule("flip", "GET", name, at=77)), pytest.raises(DamagedShard, match=sentence):
        open_(url, tmp_path / "flip").batch([0])
    with (
        proxy.fault(Rule("status", "GET", r"\.sums", status=404)),
        pytest.raises(DamagedShard, match=r"sums.* none .*copy"),
    ):
        open_(url, tmp_path / "gone").batch([0])
    [*_, run] = sorted((tmp_path / "0" / "cache").glob("diloco-shards/*/*-*/*"))
    held = run.read_bytes()
    run.write_bytes(bytes(len(held) - RUN) + held[-RUN:])
    assert (open_(url, tmp_path / "0").batch([0]) == near.batch([0])).all()
    assert f"{run} is damaged on this disk: fetching it again" in capfd.readouterr().out
    run.write_bytes(held[:CHUNK])  # not of this format
    assert (open_(url, tmp_path / "0").batch([0]) == near.batch([0])).all() and run.stat().st_size == len(held)


def test_an_outage_is_waited_for_and_told(
    url: str, folder: Path, weed: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server is killed while a reader goes on, and started again when the reader has said so."""
    near, far = local(folder), open_(url, tmp_path)
    impatient = open_(url, tmp_path / "impatient", patience=0.1)
    far.batch([0])
    weed.kill()
    got: list[bool] = []
    reader = threading.Thread(target=lambda: got.extend((far.batch([i]) == near.batch([i])).all() for i in range(200)))
    with pytest.raises(OSError, match="cannot read train-"):
        impatient.batch([0])
    try:
        reader.start()
        said, deadline = "", time.monotonic() + 20
        while f"{url}: cannot read" not in said and time.monotonic() < deadline:
            said += capfd.readouterr().out
            time.sleep(0.01)
    finally:
        weed.start()
    reader.join(60)
    assert len(got) == 200 and all(got)
    said += capfd.readouterr().out
    assert said.count("trying again for") == 2 and said.count(f"data: {url} answers again after") == 1


def test_the_wait_for_another_reader_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited for a lock for as long as its holder had patience does not have as much again."""
    now, tries = [0.0], list[str]()

    @contextmanager
    def locked(*_: object) -> Iterator[bool]:
        now[0] += 21
        yield True

    def view(key: str, *_: int) -> memoryview:
        tries.append(key)
        raise StoreError("away")

    monkeypatch.setattr(Cache, "_locked", locked)
    monkeypatch.setattr(caching, "store_of", lambda _: SimpleNamespace(view=view))
    monkeypatch.setattr(
        caching, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    )
    cache = Cache("memory://x", tmp_path, "folder", 1 << 30, 20.0)
    with pytest.raises(StoreError, match="away"):
        cache.bring(Run(Shard("train-00000", CHUNK, ""), 0), 0, 1)
    assert len(tries) == 1


def test_a_removed_run_is_read_on_for_a_moment_and_then_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as its file need not be told that it is read. Few are mapped at once."""
    data, fetches = bytes(RUN_BYTES) + b"second", []

    def view(key: str, start: int, stop: int) -> memoryview:
        fetches.append((start // CHUNK, -(-stop // CHUNK)))
        return memoryview(data)[start:stop]

    monkeypatch.setattr(caching, "store_of", lambda _: SimpleNamespace(view=view))
    cache, shard = Cache("memory://x", tmp_path, "folder", 1 << 40, 20.0), Shard("train-00000", len(data), "")
    cache._sums[shard.name] = RUN * blake3(data[:CHUNK]).digest() + blake3(b"second").digest()
    second = RUN, RUN + 1
    for removed in (False, True):
        if removed:
            (tmp_path / "folder" / shard.name / "000001").unlink()
        assert cache.read(shard, RUN_BYTES, RUN_BYTES + 3) == b"sec" and fetches == [second]
    assert ForkingPickler.dumps(cache), "data.workers take it along, but for what is mapped"
    assert copy.copy(cache).read(shard, RUN_BYTES - 1, RUN_BYTES + 1) == b"\0s"
    assert fetches == [second, (RUN - 1, RUN), second], "another process has only the files"
    (tmp_path / "folder" / shard.name / "000001").unlink()
    monkeypatch.setattr(caching, "TOUCH_SECONDS", 0.0)
    assert cache.read(shard, RUN_BYTES, RUN_BYTES + 3) == b"sec" and fetches[3:] == [second]
    monkeypatch.setattr(caching, "MAPPED", 1)
    assert cache.read(shard, RUN_BYTES - 1, RUN_BYTES + 1) == b"\0s" and len(cache._mapped) == 1
    assert cache.read(shard, 2 * CHUNK - 1, 2 * CHUNK + 1) == b"\0\0" and fetches[-1] == (1, 3), "in one request"


def test_what_is_marked_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who fails while he writes has marked nothing, and whoever reads then takes nothing for a chunk."""
    data = os.urandom(3 * CHUNK)
    monkeypatch.setattr(caching, "store_of", lambda _: SimpleNamespace(view=lambda _, a, b: memoryview(data)[a:b]))
    shard = Shard("train-00000", len(data), "")
    sums = b"".join(blake3(data[at : at + CHUNK]).digest() for at in range(0, len(data), CHUNK))
    mine, other = (Cache("memory://x", tmp_path, "folder", 1 << 30, 20.0, _sums={shard.name: sums}) for _ in range(2))
    assert mine.read(shard, 0, CHUNK) == data[:CHUNK]
    path, run = tmp_path / "folder" / shard.name / "000000", Run(shard, 0)
    assert path.stat().st_size == len(data) + RUN and 512 * path.stat().st_blocks < 2 * CHUNK, "it has holes"
    with pytest.raises(TypeError):
        mine._place(run, 1, 3, [0] * CHUNK)  # type: ignore[arg-type]
    assert other._at_hand(run, [0]) and not other._at_hand(run, [1]) and mine._missing(run, 0, 3) == [1, 2]
    with path.open("r+b") as file:
        file.seek(len(data))
        file.write(b"\1" * RUN)
    assert other.read(shard, 0, len(data)) == data, "a mark that lies is found out"


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "store_of", lambda _: SimpleNamespace(view=lambda *_: memoryview(b"text")))
    cache, shard = Cache("memory://x", tmp_path, "folder", 1 << 30, 20.0), Shard("train-00000", 4, "")
    cache._sums[shard.name] = blake3(b"text").digest()

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"^data\.cache: .*/000000 cannot be written \(No space left.*data\.cache_bytes=1073741824"
    ):
        cache.read(shard, 0, 4)


def test_a_chunk_of_another_user_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, shard = Cache("memory://x", tmp_path, "folder", 1 << 30, 20.0), Shard("train-00000", 4, "")
    cache._sums[shard.name] = blake3(b"text").digest()
    path = tmp_path / "folder" / shard.name / "000000"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"text" + b"\1" * RUN)
    os.utime(path, (0, 0))

    def refused(_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert cache.read(shard, 1, 3) == b"ex"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"data\.path=URL/nowhere holds no index\.json"),
        ({"cache": f"{__file__}/cache"}, rf"data\.cache={__file__}/cache cannot be written to"),
        ({"cache_bytes": 5}, r"data\.cache_bytes=5 does not hold twice the tokens of data\.shuffle=268435456"),
    ],
)
def test_what_cannot_be_streamed_is_one_sentence(
    url: str, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words.replace("URL", url)):
        build_samples(
            DataConfig(**{**vars(config(url if changes else f"{url}/nowhere", tmp_path)), **changes}), SEQ_LEN, 0
        )


def test_the_directory_that_is_written_to_is_the_one_that_is_checked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "diloco-shards").touch()
    with pytest.raises(
        ConfigError, match=r"^data\.cache=.* because of .*/diloco-shards: set it to a directory of yours$"
    ):
        open_(f"file://{folder}", tmp_path)


def test_a_bucket_is_shown_and_verified_like_a_directory(
    url: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(["show", url]) == 0 and "3,700,001 tokens" in capsys.readouterr().out
    assert serve(["verify", url]) == 0 and "all right" in capsys.readouterr().out
    with proxy.fault(Rule("flip", "GET", r"train-00001\.tokens", at=5)):
        assert serve(["verify", url]) == 1 and f"{url}/train-00001.tokens is damaged" in capsys.readouterr().out
