"""The store while what carries it fails: a real S3 server behind a faulting proxy, killed and started again, and full disks.

Whatever happens, a call has done all that it was asked, or raises StoreError in one sentence; no object is ever half there.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3fs import S3FileSystem

from ckpt.checkpoint import DamagedError, Piece, commit_manifest, load_manifest, save_shard
from ckpt.reading import Reader, verify
from ckpt.s3 import SWITCH
from ckpt.store import Store, StoreError
from tests.s3_proxy import Proxy, Rule
from tests.s3_server import BUCKET, Server

REPO = Path(__file__).resolve().parents[1]
BIG = os.urandom(6 << 20)
"""Several of the proxy's chunks and of the client's reads."""


@pytest.fixture
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """obstore, unless a test says otherwise: who does S3."""
    name: str = getattr(request, "param", "obstore")
    monkeypatch.setenv(SWITCH, name)
    return name


both_clients = pytest.mark.parametrize("client", ["obstore", "s3fs"], indirect=True)


@pytest.fixture
def store(
    weed: Server, proxy: Proxy, client: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Store:
    """Through the proxy."""
    return _store(weed, proxy.url, request, monkeypatch)


@pytest.fixture
def direct(weed: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, store: Store) -> Store:
    """The same keys, past the proxy."""
    return _store(weed, weed.url, request, monkeypatch)


def _store(weed: Server, url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A client of its own: fsspec hands the same one out again, and it takes the address when it first connects."""
    for name, value in {**weed.environment, "AWS_ENDPOINT_URL": url}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    store = Store(f"s3://{BUCKET}/{request.node.name.translate(str.maketrans('[] ', '---')).strip('-')}")
    store.exists("connect")
    return store


def outcome(call: Callable[[], Any]) -> Any:
    """What it returns, or its StoreError, which has to be one sentence; any other error fails the test."""
    try:
        return call()
    except StoreError as error:
        assert "\n" not in str(error) and str(error).startswith("s3://"), str(error)
        return error


@both_clients
def test_without_a_rule_nothing_changes(store: Store, direct: Store, proxy: Proxy) -> None:
    """Signatures hold although the server is at another address than the one that was signed."""
    before = proxy.count("PUT")
    store.prove()
    assert store.create("a/x", BIG) and direct.read("a/x") == BIG
    assert store.read("a/x", 5, 1 << 20) == BIG[5 : 1 << 20] and store.list() == ["a/x"]
    assert proxy.count("PUT") > before


@pytest.mark.skipif(find_spec("obstore") is None, reason="s3fs has botocore do it")
def test_a_bundle_of_certificates_is_used(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Obvious where it is none, even without TLS."""
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    assert isinstance(outcome(lambda: Store(store.url).exists("a")), StoreError)


PASSING = {
    "busy": Rule("status", "PUT", times=2),
    "internal error": Rule("status", "PUT", status=500, times=2),
    "full": Rule("status", "PUT", status=507, times=1),
    "refused": Rule("status", "PUT", status=403, times=1),
    "answer lost": Rule("lose", "PUT", times=1),
    "upload reset": Rule("cut", "PUT", at=1 << 20, times=1),
    "upload reset at once": Rule("cut", "PUT", at=0, times=1),
    "slow": Rule("slow", "PUT", rate=20e6, times=1),
}


@both_clients
@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_of_an_upload_is_retried(store: Store, direct: Store, proxy: Proxy, name: str) -> None:
    """An answer that was lost, too: created is what has these bytes, and the server's 412 to the second try is no refusal."""
    key = name.replace(" ", "-")
    PASSING[name].hits = 0
    with proxy.fault(PASSING[name]) as rule:
        assert outcome(lambda: store.create(key, BIG)) is True
        assert rule.hits >= 1
    assert direct.read(key) == BIG
    assert store.create(key, BIG[::-1]) is False and direct.read(key) == BIG, "and it is not created twice"


def test_every_answer_lost(store: Store, direct: Store, proxy: Proxy) -> None:
    """No PUT is ever answered, and the object is there: read back, so it is ours."""
    with proxy.fault(Rule("lose", "PUT")):
        assert outcome(lambda: store.create("mine", b"mine")) is True
    direct.create("theirs", b"theirs")
    with proxy.fault(Rule("lose", "PUT")):
        assert outcome(lambda: store.create("theirs", b"mine")) is False
    assert direct.read("mine") == b"mine" and direct.read("theirs") == b"theirs"


LASTING = {
    "full": Rule("status", "PUT", status=507),
    "refused": Rule("status", "", status=403),
    "upload reset": Rule("cut", "PUT", at=1 << 20),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_of_an_upload_leaves_nothing(store: Store, direct: Store, proxy: Proxy, name: str) -> None:
    with proxy.fault(LASTING[name]):
        said = outcome(lambda: store.create("a", BIG))
    assert isinstance(said, StoreError) and "may or may not have been created" in str(said)
    assert direct.list() == []
    assert store.create("a", BIG) is True, "the same store goes on when it is over"


READS = {
    "reset": Rule("reset", "GET", at=3 << 20, times=1),
    "ends early": Rule("truncate", "GET", at=3 << 20, times=1),
    "answer lost": Rule("lose", "GET", times=1),
    "busy": Rule("status", "GET", times=2),
    "slow": Rule("slow", "GET", rate=20e6, times=1),
    "shorter than asked": Rule("shorten", "GET", at=1 << 20, times=1),
    "refused": Rule("status", "GET", status=403, times=1),
}


@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("name", READS)
@both_clients
def test_a_read_is_whole_or_an_error(store: Store, direct: Store, proxy: Proxy, name: str, ranged: bool) -> None:
    direct.write("a", BIG)
    rule, span = READS[name], (7, len(BIG) - 7) if ranged else (None, None)
    rule.hits = 0
    with proxy.fault(rule):
        said = outcome(lambda: store.read("a", *span))
        assert rule.hits >= 1
    whole = BIG[slice(*span)]
    if name == "shorter than asked" and not isinstance(said, StoreError):
        assert whole.startswith(said)  # an answer that is whole by its own words: what is in the object says more
    else:
        assert said == whole or isinstance(said, StoreError)
    assert store.read("a", *span) == whole


def test_what_hangs_goes_on_when_it_is_over(store: Store, direct: Store, proxy: Proxy) -> None:
    """A server that takes requests and says nothing; then it is itself again."""
    with proxy.fault(Rule("hang")) as rule:
        said: list[Any] = []
        thread = threading.Thread(target=lambda: said.append(outcome(lambda: store.create("a", b"1"))))
        thread.start()
        until(lambda: rule.hits >= 1)
        assert proxy.underway("PUT") == 1 and not proxy.underway("GET")
    thread.join(90)
    assert said == [True] and direct.read("a") == b"1"
    until(lambda: not proxy.underway())


def test_a_killed_server_and_its_next_life(store: Store, weed: Server) -> None:
    """Uploads are under way when it is killed; all that were acknowledged are there afterwards, and the others not at all or
    whole. Then everything is created again, and that is the same as once."""
    bodies = {f"o/{n}": os.urandom(1 << 20) for n in range(40)}
    done: dict[str, Any] = {}

    def upload() -> None:
        for key, body in bodies.items():
            done[key] = outcome(lambda key=key, body=body: store.create(key, body))  # type: ignore[misc]

    thread = threading.Thread(target=upload)
    thread.start()
    until(lambda: len(done) >= 5)
    weed.kill()
    weed.start()
    thread.join(300)
    assert not thread.is_alive() and len(done) == len(bodies)
    acknowledged = [key for key, said in done.items() if said is True]
    assert len(acknowledged) >= 5
    there = store.list("o")
    assert set(acknowledged) <= set(there)
    assert all(store.read(key) == bodies[key] for key in there)
    assert all(store.create(key, body) for key, body in bodies.items())


def until(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A checkpoint, read over a lying line


@pytest.fixture
def saved(direct: Store) -> dict[str, Any]:
    """Two shards of one plane."""
    whole = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    pieces = [
        Piece("theta", 0, 0, 25_000, whole[:25_000].clone()),
        Piece("theta", 0, 25_000, 60_000, whole[25_000:].clone()),
    ]
    records = [save_shard(direct, "c/1", f"rank-{n}", [piece]) for n, piece in enumerate(pieces)]
    return {**commit_manifest(direct, "c/1", {"step": 1}, records), "whole": whole}


def load(store: Store) -> torch.Tensor:
    manifest = load_manifest(store, "c/1")
    verify(store, manifest)
    return Reader(store, manifest).read("theta", 0, 0, 60_000)


def test_a_bit_that_flips_on_the_way_is_not_loaded(store: Store, proxy: Proxy, saved: dict[str, Any]) -> None:
    """In any answer, manifest and headers too; whatever loads is what was saved."""

    @settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, 5), st.integers(0, 1 << 20), st.integers(0, 7))
    def flips(spare: int, at: int, bit: int) -> None:
        with proxy.fault(Rule("flip", "GET", match="c/1", spare=spare, times=1, at=at, bit=bit)):
            try:
                found = load(store)
            except (DamagedError, StoreError) as error:
                assert "\n" not in str(error)
            else:
                assert torch.equal(found, saved["whole"])

    flips()


@pytest.mark.parametrize("do", ["truncate", "reset", "shorten", "lose"])
def test_a_checkpoint_over_a_breaking_line(store: Store, proxy: Proxy, saved: dict[str, Any], do: Any) -> None:
    """Every third answer breaks off at some point: all of the state is loaded, or one sentence says why not."""
    draw = random.Random(0)
    for _ in range(5):
        rules = [Rule(do, "GET", "c/1", times=1, spare=2 * n, at=draw.randrange(200_000)) for n in range(3)]
        for rule in rules:
            proxy.add(rule)
        try:
            found = load(store)
            assert torch.equal(found, saved["whole"])
        except (DamagedError, StoreError) as error:
            assert "\n" not in str(error)
        finally:
            for rule in rules:
                proxy.remove(rule)
    assert torch.equal(load(store), saved["whole"])


# Full disks


FILL = """
import sys
from ckpt.store import Store, StoreError
store = Store(sys.argv[1])
store.create("first", b"1" * 1000)
try:
    store.create("second", b"2" * (8 << 20))
except StoreError as error:
    print(error)
print(store.list(), store.read("first") == b"1" * 1000)
"""


@pytest.mark.parametrize("limit", ["file size", "disk"])
def test_a_full_disk_is_one_sentence_and_half_of_nothing(tmp_path: Path, limit: str) -> None:
    """A tmpfs of 4 MiB where one may mount, and a limit on the size of files."""
    import resource

    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False
    if limit == "disk":
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("mounting a small disk takes root")

    def small_files() -> None:
        if limit == "file size":
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))

    try:
        run = subprocess.run(
            [sys.executable, "-c", FILL, str(folder)], cwd=REPO, capture_output=True, text=True, preexec_fn=small_files
        )
        sentence, listed = run.stdout.splitlines()
        assert "cannot create second: OSError" in sentence and listed == "['first'] True", run.stdout + run.stderr
        assert not any((folder / ".tmp").iterdir()), "what was half written is removed"
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
