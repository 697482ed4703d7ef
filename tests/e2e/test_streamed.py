"""Training from a bucket: the same run as from a directory, whoever reads ahead, and whatever happens to the bucket."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from launch.summary import describe, read_summary
from tests.corpora import upload, write_folder
from tests.e2e.cluster import Cluster
from tests.s3_proxy import Proxy, Rule
from tests.s3_server import BUCKET, Server

BASE = ["data=prepared", "outer.sync_every=8", "run.rounds=3", "run.eval_every=3", "data.shuffle=200_000"]


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """2.4 MB, as bytes."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"".join(path.read_bytes() for path in paths)[:2_400_000], dtype="u1")


def test_a_run_from_a_bucket_is_that_from_a_directory(
    text: np.ndarray, weed: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digest for digest: streamed through an outage, with a worker that reads ahead, and local without; two evaluation sets."""
    for name, value in {**weed.environment, "AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    folder = write_folder(tmp_path / "corpus", {"train": np.array_split(text, 2), "heldout": [text[:5000]]}, 256, 1)
    books = write_folder(tmp_path / "books", {"train": [text[5000:9000]]}, 256, 3)
    url = upload(folder, f"s3://{BUCKET}/corpus")
    sets = f"run.eval_sets=[{{name: books, path: {books}}}]"
    streamed, local = Cluster(tmp_path / "streamed"), Cluster(tmp_path / "local")
    with proxy.fault(Rule("status", "GET", r"\.tokens")) as away:
        for cluster in (streamed, local):
            cluster.directory.mkdir()
        far = [f"data.path={url}", "data.workers=1", f"data.cache={tmp_path / 'cache'}", sets]
        eu = streamed.start("eu", *BASE, *far)
        try:
            streamed.until(lambda: f"{url}: cannot read" in eu.text(), 100)
            proxy.remove(away)
            local.start("eu", *BASE, f"data.path={folder}")
            streamed.finish()
            local.finish()
        finally:
            streamed.close()
            local.close()
    assert "trying again for 600 s" in eu.text() and "answers again after" in eu.text()
    digests = [[record["digest"] for record in cluster.records("eu", "round")] for cluster in (streamed, local)]
    assert len(digests[0]) == 3 and digests[0] == digests[1]
    found = {record["set"]: record for record in streamed.records("eu", "eval")}
    assert found.keys() == {"held-out", "books"} and found["books"]["tokens"] == 4 * 32
    for name, size in (("held-out", 1), ("books", 3)):
        loss = found[name]["loss"]
        assert found[name]["bits_per_byte"] == pytest.approx(loss / math.log(2) / size)
        assert found[name]["perplexity"] == pytest.approx(math.exp(loss))
        assert f"{name} after round 3 | loss {loss:.4f}" in eu.text()
    summary = read_summary(streamed.run)
    assert summary is not None and f"books loss     {found['books']['loss']:.4f}" in describe(summary)
    assert found["held-out"]["loss"] == local.records("eu", "eval")[0]["loss"]


def test_a_damaged_shard_ends_its_region_in_one_sentence(
    text: np.ndarray, weed: Server, proxy: Proxy, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**weed.environment, "AWS_ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(name, value)
    folder = write_folder(tmp_path / "corpus", {"train": [text]}, 256, 1)
    url = upload(folder, f"s3://{BUCKET}/damaged")
    far = [f"data.path={url}", f"data.cache={tmp_path / 'cache'}", "data.workers=1"]
    with proxy.fault(Rule("flip", "GET", r"\.tokens", at=5)):
        eu = cluster.start("eu", *BASE, *far)
        assert eu.wait(100) == 1
    said = eu.text()
    assert f"{url}/train-00000.tokens is damaged: its bytes [" in said and "Traceback" not in said
