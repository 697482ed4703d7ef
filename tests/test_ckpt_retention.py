"""What stays of a run's checkpoints, and how the rest goes: never under a reader, never what is not committed by somebody."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt import retention
from ckpt.checkpoint import MANIFEST, DamagedError, Piece, commit_manifest, load_manifest, save_shard
from ckpt.errors import RequestError
from ckpt.reading import Reader, newest, numbered
from ckpt.retention import TOMBSTONE, Rules, collect, pin, unpin
from ckpt.store import Store
from ckpt.tool import main
from tests.s3_server import BUCKET

ROOT = "checkpoints/run"
LONG = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def commit(store: Store, seq: int, root: str = ROOT, **body: Any) -> dict[str, Any]:
    """A checkpoint after seq // 10 rounds."""
    prefix = f"{root}/{seq}"
    records = [
        save_shard(store, prefix, f"s{n}", [Piece("theta", n, 0, 2, torch.full((2,), float(seq)))]) for n in range(2)
    ]
    whole = {"seq": seq, "counters": {"rounds": seq // 10, "applied": 0}, "origin": f"{root}/0", **body}
    return commit_manifest(store, prefix, whole, records)


def there(store: Store, root: str = ROOT) -> list[int]:
    return sorted(int(prefix.rsplit("/", 1)[-1]) for prefix in numbered(store, root))


def age(store: Store, key: str, seconds: float) -> None:
    """Make an object of a directory store so old."""
    path = Path(store.url) / key
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def age_all(store: Store, seconds: float) -> None:
    for key in store.list():
        age(store, key, seconds)


def test_the_newest_the_first_every_third_and_pins_stay(store: Store) -> None:
    for seq in range(0, 130, 10):
        commit(store, seq)
    pin(store, f"{ROOT}/50")
    dry = collect(store, ROOT, Rules(3, 4, LONG), dry_run=True)
    assert there(store) == list(range(0, 130, 10))
    gone = collect(store, ROOT, Rules(3, 4, LONG))
    assert there(store) == [0, 40, 50, 80, 100, 110, 120] and gone == dry
    assert gone.checkpoints == tuple(f"{ROOT}/{seq}" for seq in (10, 20, 30, 60, 70, 90)) and not gone.objects
    assert not collect(store, ROOT, Rules(3, 4, LONG)).checkpoints
    unpin(store, f"{ROOT}/50")
    collect(store, ROOT, Rules(3, 0, LONG))
    assert there(store) == [0, 100, 110, 120]


def test_shards_go_a_grace_period_after_their_manifest(store: Store) -> None:
    for seq in range(0, 40, 10):
        commit(store, seq)
    age_all(store, 10 * LONG)  # old shards: what counts is when the manifest went
    commit(store, 40)
    manifest, rules = load_manifest(store, f"{ROOT}/10"), Rules(1, 0, LONG)
    collect(store, ROOT, rules)
    assert there(store) == [0, 40]
    assert not collect(store, ROOT, rules).objects
    assert Reader(store, manifest).read("theta", 1, 0, 2).tolist() == [10, 10]
    age(store, f"{ROOT}/10/{TOMBSTONE}", LONG + 1)
    assert collect(store, ROOT, rules).objects == tuple(
        f"{ROOT}/10/{n}" for n in ("s0.safetensors", "s1.safetensors", TOMBSTONE)
    )
    assert store.list(f"{ROOT}/10") == [] and len(store.list(f"{ROOT}/20")) == 3
    with pytest.raises(DamagedError, match="is missing"):
        Reader(store, manifest).read("theta", 1, 0, 2)


def test_attempts_stay_as_long_as_something_of_them_is_young(store: Store) -> None:
    commit(store, 0)
    commit(store, 30)
    for n in range(2):
        save_shard(store, f"{ROOT}/20", f"s{n}", [Piece("theta", 0, 0, 2, torch.zeros(2))])
    store.create(f"{ROOT}/20/parts/eu-0.json", b"{}")
    age(store, f"{ROOT}/20/s0.safetensors", 2 * LONG)
    assert not collect(store, ROOT, Rules(1, 0, LONG)).objects
    age_all(store, 2 * LONG)
    assert len(collect(store, ROOT, Rules(1, 0, LONG)).objects) == 3
    assert store.list(f"{ROOT}/20") == [] and there(store) == [0, 30]


def test_what_lost_the_race_beside_a_manifest_goes(store: Store) -> None:
    manifest = commit(store, 10)
    save_shard(store, f"{ROOT}/10", "other", [Piece("theta", 0, 0, 2, torch.zeros(2))])
    store.create(f"{ROOT}/10/parts/eu-0.json", b"{}")
    assert not collect(store, ROOT, Rules(1, 0, LONG)).objects
    age_all(store, 2 * LONG)
    gone = collect(store, ROOT, Rules(1, 0, LONG))
    assert gone.objects == (f"{ROOT}/10/other.safetensors", f"{ROOT}/10/parts/eu-0.json")
    assert Reader(store, manifest).read("theta", 0, 0, 2).tolist() == [10, 10]


def test_a_damaged_manifest_does_not_count_among_the_newest(store: Store) -> None:
    for seq in range(0, 60, 10):
        commit(store, seq)
    store.write(f"{ROOT}/50/{MANIFEST}", b"{}")
    collect(store, ROOT, Rules(2, 0, LONG))
    assert [m["seq"] for m in newest(store, ROOT)] == [40, 30, 0]


def test_where_the_run_may_go_back_to_stays(store: Store) -> None:
    """What the newest checkpoint names, and what the journal says after it."""
    for seq in range(0, 50, 10):
        commit(store, seq, origin=f"{ROOT}/10")
    for seq, entry in ((35, {"checkpoint": f"{ROOT}/30"}), (45, {"checkpoint": f"{ROOT}/20"}), (46, {"kind": "round"})):
        store.create(f"journal/{seq:010d}.json", json.dumps(entry).encode())
    store.create(f"journal/{47:010d}.json", b"no JSON")
    collect(store, ROOT, Rules(1, 0, LONG))
    assert there(store) == [0, 10, 20, 40]


@given(st.sets(st.integers(1, 40), min_size=1), st.integers(1, 5), st.integers(0, 4), st.sets(st.integers(0, 40)))
def test_the_rules_in_any_case(seqs: set[int], keep: int, every: int, pins: set[int]) -> None:
    store = Store(f"memory://{os.urandom(8).hex()}/run")
    for seq in sorted(seqs | {0}):
        commit(store, seq)
    for seq in pins & seqs:
        pin(store, f"{ROOT}/{seq}")
    collect(store, ROOT, Rules(keep, every, LONG))
    expected = {0, *sorted(seqs)[-keep:]} | (pins & seqs)
    expected |= {seq for seq in seqs if every and seq // 10 % every == 0}
    assert set(there(store)) == expected


def test_a_pin_and_a_collection_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin comes after the collection has looked for pins: it stays; the manifest is gone when the pin looks: refused."""
    for seq in (0, 10, 20):
        commit(store, seq)
    raw, real = store.read(f"{ROOT}/10/{MANIFEST}"), store.delete

    def delete(key: str) -> None:
        if key == f"{ROOT}/10/{MANIFEST}":
            pin(store, f"{ROOT}/10")
        real(key)

    monkeypatch.setattr(store, "delete", delete)
    assert not collect(store, ROOT, Rules(1, 0, LONG)).checkpoints
    assert store.read(f"{ROOT}/10/{MANIFEST}") == raw and not store.exists(f"{ROOT}/10/{TOMBSTONE}")
    monkeypatch.undo()
    unpin(store, f"{ROOT}/10")
    collect(store, ROOT, Rules(1, 0, LONG))
    with pytest.raises(RequestError, match="is no checkpoint"):
        pin(store, f"{ROOT}/10")
    assert retention.pinned(store) == set()


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_collections_race_with_each_other_and_with_readers(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A reader that takes the newest always finds it whole, and one that holds an old manifest reads right values or is told;
    whoever collects."""
    if place == "s3":
        request.getfixturevalue("server")
    store = Store(f"s3://{BUCKET}/{tmp_path.name}" if place == "s3" else str(tmp_path))
    rules, stop, failures = Rules(1, 0, 1.0), threading.Event(), list[BaseException]()
    commit(store, 0)
    commit(store, 1)
    read = {"whole": 0, "lost": 0}

    def looping(work: Callable[[], None]) -> threading.Thread:
        def loop() -> None:
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=loop)

    def look() -> None:
        for manifest in newest(store, ROOT, lambda *_: None):
            try:
                values = [Reader(store, manifest).read("theta", f, 0, 2).tolist() for f in range(2)]
            except DamagedError as error:
                assert "is missing" in str(error)
                read["lost"] += 1
                continue
            assert values == [[manifest["seq"]] * 2] * 2
            read["whole"] += 1
            return
        raise AssertionError("no checkpoint is whole")

    threads = [looping(look), looping(look), *(looping(lambda: void(collect(store, ROOT, rules))) for _ in range(2))]
    for thread in threads:
        thread.start()
    deadline, seq = time.monotonic() + 60, 2
    while (seq < 60 or not read["whole"]) and time.monotonic() < deadline and not failures:
        commit(store, seq)
        seq += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and read["whole"] and seq >= 60, (failures, read)
    while {key.split("/")[2] for key in store.list(ROOT)} != {"0", str(seq - 1)} and time.monotonic() < deadline + 60:
        collect(store, ROOT, rules)
    assert there(store) == [0, seq - 1] and len(store.list(ROOT)) == 6


def void(value: object) -> None:
    pass


def test_the_commands(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for seq in range(0, 60, 10):
        commit(store, seq, model={"target": "t", "args": {}, "seq_len": 8})
        commit(store, seq + 1, "regions/run/eu")
    assert main(["pin", f"{store.url}@20"]) == 0
    assert main(["ls", store.url]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith("pinned")][1].split()[1] == "20"
    before = store.list()
    assert main(["gc", store.url, "--keep", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert store.list() == before and "4 checkpoint(s)" not in said and f"{ROOT}/10 · would be removed" in said
    assert main(["gc", store.url, "--keep=2", "--grace=0"]) == 0
    assert there(store) == [0, 20, 40, 50] and there(store, "regions/run/eu") == [41, 51]
    assert main(["gc", store.url, "--keep=2", "--grace=0"]) == 0
    assert "0 checkpoint(s) and " in capsys.readouterr().out and store.list(f"{ROOT}/10") == []
    assert main(["unpin", f"{store.url}@20"]) == 0
    assert main(["gc", store.url, "--keep=1", "--keep-every=5"]) == 0 and there(store) == [0, 50]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gc", "--keep", "0"], "--keep=0 is not a whole number of at least 1"),
        (["gc", "--grace", "soon"], "--grace=soon is not a whole number"),
        (["gc", "--dry-run=yes"], "--dry-run takes none"),
        (["gc", "--weights", "1"], "--weights is not known here"),
        (["pin", "--keep", "1"], "--keep is not known here"),
    ],
)
def test_bad_commands_are_one_sentence(
    store: Store, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(store, 0)
    assert main([arguments[0], store.url, *arguments[1:]]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_bad_places_are_one_sentence(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    commit(store, 10)
    for arguments, says in (
        (["gc", f"{store.url}@10"], "is one checkpoint"),
        (["pin", f"{store.url}@11"], "is no checkpoint"),
        (["unpin", store.url], "names no entry"),
        (["unpin", f"{store.url}@10"], "is not pinned"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said
