"""The store: create-if-absent in a directory and elsewhere, unknown outcomes, ranges, listings, bad keys."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

import ckpt.store
from ckpt.files import STALE_SECONDS, TEMPORARY
from ckpt.store import MissingError, Store, StoreError

REPO = Path(__file__).resolve().parents[1]


class Injected(MemoryFileSystem):
    """fsspec's store in memory, whose next creations fail as planned, before or after they took effect."""

    protocol = "injected"
    store: dict[str, Any] = {}  # noqa: RUF012 - MemoryFileSystem keeps its files there
    pseudo_dirs = [""]  # noqa: RUF012
    plan: list[tuple[str, Exception]] = []  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        when, error = self.plan.pop(0) if self.plan else ("", None)
        if when != "before":
            super().pipe_file(path, value, mode=mode, **kwargs)
        if error:
            raise error


class Overwriting(MemoryFileSystem):
    """A store that does not know about mode="create"."""

    protocol = "overwriting"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value)


class Looking(MemoryFileSystem):
    """fsspec's own fallback, which looks first and then writes; everybody looks before anybody writes."""

    protocol = "looking"
    meeting = threading.Barrier(ckpt.store.PROBES)

    def exists(self, path: str, **kwargs: Any) -> bool:
        found = super().exists(path)
        if self.meeting.n_waiting or not found:
            self.meeting.wait(timeout=10)
        return found

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        AbstractFileSystem.pipe_file(self, path, value, mode=mode)


for kind in (Injected, Overwriting, Looking):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "directory":
        yield Store(str(tmp_path / "store"))
    else:
        yield Store(f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def injected() -> Iterator[Store]:
    Injected.plan.clear()
    yield Store(f"injected://{uuid.uuid4().hex}/run")
    assert not Injected.plan, "a planned failure was never met"


def test_create_is_refused_once_the_key_exists(store: Store) -> None:
    assert store.create("journal/0.json", b"one")
    assert not store.create("journal/0.json", b"two")
    assert not store.create("journal/0.json", b"one more")
    assert store.read("journal/0.json") == b"one"


def test_create_with_equal_bytes_is_mine(store: Store) -> None:
    assert store.create("a", b"nonce 7")
    assert store.create("a", b"nonce 7")


def test_write_replaces_and_delete_removes(store: Store) -> None:
    store.write("a/b", b"old and long")
    store.write("a/b", b"new")
    assert store.read("a/b") == b"new"
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    assert store.create("a/b", b"again")


def test_ranges_are_slices(store: Store) -> None:
    data = bytes(range(100))
    store.create("x", data)
    for start, stop in [
        (None, None),
        (0, 10),
        (10, 20),
        (90, None),
        (90, 1 << 60),
        (0, 0),
        (100, None),
        (200, 300),
    ]:
        assert store.read("x", start, stop) == data[start:stop], (start, stop)
    with pytest.raises(ValueError, match="not a range"):
        store.read("x", 5, 4)
    with pytest.raises(ValueError, match="not a range"):
        store.read("x", -5)


def test_absent_objects(store: Store) -> None:
    store.create("folder/file", b"")
    assert store.exists("folder/file") and store.size("folder/file") == 0 and store.read("folder/file") == b""
    assert not store.exists("folder") and not store.exists("none/at/all")
    for call in (lambda: store.read("none"), lambda: store.read("none", 5), lambda: store.size("folder")):
        with pytest.raises(MissingError):
            call()
    with pytest.raises(FileNotFoundError):
        store.read("none")


def test_list_is_a_folder_sorted_and_never_stale(store: Store) -> None:
    assert store.list() == []
    keys = ["b/2", "a/10/x", "a/1/x", "ab/0", "top"]
    for number, key in enumerate(keys):
        store.create(key, b"")
        assert len(store.list()) == number + 1
    assert store.list() == sorted(keys)
    assert store.list("a") == store.list("a/") == ["a/1/x", "a/10/x"]
    assert store.list("top") == store.list("none") == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "a/",
        ".",
        "a/./b",
        ".tmp/x",
        "a\\b",
        "a\0b",
        "a b",
        "é",
        "?v",
        "x" * 300,
    ],
)
def test_bad_keys_are_refused_everywhere(store: Store, key: str) -> None:
    for call in (store.exists, store.read, store.delete, store.size):
        with pytest.raises(StoreError, match="is not a key"):
            call(key)
    for put in (store.create, store.write):
        with pytest.raises(StoreError, match="is not a key"):
            put(key, b"")
    if key:
        with pytest.raises(StoreError, match="is not a key"):
            store.list(key + "/x")


@pytest.mark.parametrize("url", ["", "nope://x", "s3:/bucket/x", "s3://", "simplecache::s3://b/x"])
def test_bad_urls_are_one_sentence(url: str) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        Store(url)


def test_prove_accepts_and_leaves_nothing(store: Store) -> None:
    store.prove()
    assert store.list() == []


@pytest.mark.parametrize("protocol", ["overwriting", "looking"])
def test_prove_refuses_what_could_have_two_winners(protocol: str) -> None:
    store = Store(f"{protocol}://{uuid.uuid4().hex}/run")
    with pytest.raises(StoreError, match=r"does not refuse to create an object twice.*run\.store"):
        store.prove()
    assert store.list() == []


def test_unknown_outcome_that_took_effect_is_mine(injected: Store) -> None:
    for number, error in enumerate([TimeoutError("slow"), FileExistsError(), RuntimeError("no OSError at all")]):
        Injected.plan.append(("after", error))
        assert injected.create(f"k{number}", b"mine")


def test_unknown_outcome_that_somebody_else_decided(injected: Store) -> None:
    injected.create("k", b"theirs")
    Injected.plan.append(("before", TimeoutError("slow")))
    assert not injected.create("k", b"mine")
    Injected.plan.append(("before", TimeoutError("slow")))
    assert not injected.create("k", b"mine's")  # of equal length
    assert injected.read("k") == b"theirs"


def test_unknown_outcome_that_did_not_happen_is_tried_again(injected: Store) -> None:
    Injected.plan += [("before", FileNotFoundError("NoSuchUpload")), ("before", OSError("409"))]
    assert injected.create("k", b"mine")
    assert injected.read("k") == b"mine"


def test_a_store_that_stays_away_is_an_error(injected: Store) -> None:
    Injected.plan += [("before", TimeoutError("slow"))] * ckpt.store.CREATE_TRIES
    with pytest.raises(StoreError, match=r"cannot create k: TimeoutError: slow .*may or may not") as caught:
        injected.create("k", b"mine")
    assert "\n" not in str(caught.value)
    assert not injected.exists("k")


RACER = """
import sys
from ckpt.store import Store
store, me, keys = Store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
print("".join(str(int(store.create(f"race/{n}", f"{me} {n}".encode() * 50_000))) for n in range(keys)))
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=REPO, stdin=pipe, stdout=pipe, text=True, bufsize=1
    )


def test_of_eight_racing_processes_one_wins_each_key(tmp_path: Path) -> None:
    keys, url = 40, str(tmp_path / "store")
    racers = [start(RACER, url, str(number), str(keys)) for number in range(8)]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
    won = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    store = Store(url)
    assert len(store.list("race")) == keys
    for n in range(keys):
        winners = [number for number in range(8) if won[number][n] == "1"]
        assert len(winners) == 1, (n, winners)
        assert store.read(f"race/{n}") == f"{winners[0]} {n}".encode() * 50_000
    assert os.listdir(Path(url) / TEMPORARY) == []


KILLED = """
import os, signal, sys
from ckpt.store import Store
point = sys.argv[2]
real = getattr(os, point)
def die(*arguments):
    if sys.argv[3] == "after":
        real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, point, die)
Store(sys.argv[1]).create("journal/0.json", b"mine" * 1000)
"""


@pytest.mark.parametrize(
    ("point", "when", "there"),
    [("fsync", "before", False), ("link", "before", False), ("link", "after", True)],
)
def test_a_kill_leaves_all_or_nothing(tmp_path: Path, point: str, when: str, there: bool) -> None:
    store = Store(str(tmp_path))
    store.write("other", b"")  # so that no folder needs an fsync first
    os.makedirs(tmp_path / "journal")
    process = start(KILLED, str(tmp_path), point, when)
    assert process.wait(timeout=60) == -9
    assert process.stdin and process.stdout
    process.communicate()
    assert len(os.listdir(tmp_path / TEMPORARY)) == 1  # it died where it should
    assert store.exists("journal/0.json") is there
    assert store.list() == (["journal/0.json", "other"] if there else ["other"])
    assert store.create("journal/0.json", b"next") is not there
    assert store.read("journal/0.json") == (b"mine" * 1000 if there else b"next")


def test_prove_sweeps_only_stale_temporaries(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    folder = tmp_path / TEMPORARY
    folder.mkdir()
    for name, age in (("1-stale", STALE_SECONDS + 60), ("2-fresh", 60)):
        (folder / name).write_bytes(b"half")
        then = os.stat(folder / name).st_mtime - age
        os.utime(folder / name, (then, then))
    store.prove()
    assert os.listdir(folder) == ["2-fresh"]
    assert store.list() == []


def test_an_unreadable_folder_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    store.create("a/b", b"")

    def refuse(path: str) -> Any:
        raise PermissionError(13, "denied", path)

    monkeypatch.setattr(os, "scandir", refuse)  # tests may run as root, whom no mode stops
    with pytest.raises(StoreError, match="cannot list"):
        store.list()


def test_a_directory_is_durable_before_create_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    Store(str(tmp_path / "new")).create("a/b", b"x")
    assert Path(synced[-1]) == tmp_path / "new" / "a"
    assert {str(tmp_path), str(tmp_path / "new")} <= set(synced)
    assert any(TEMPORARY in path for path in synced)
