"""What `prepare` takes for damage of the input, and what not: a store that fails is none."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from diloco.corpus import prepare as preparing
from diloco.corpus import worker
from diloco.corpus.command import serve
from diloco.corpus.documents import Damage, Document, Piece, documents
from diloco.corpus.folder import read_index
from tests.corpora import texts_of


def run(*arguments: object) -> int:
    return serve([str(a) for a in arguments])


# ---- a store that fails ----


class Server(SimpleHTTPRequestHandler):
    """Ranges of one file; of the other requests after the first `good` ones it makes errors."""

    protocol_version = "HTTP/1.1"
    data = b""
    good = 0
    error = ""

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._head(200, len(self.data))

    def _head(self, code: int, length: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def do_GET(self) -> None:
        start, stop = map(int, self.headers.get("Range", f"bytes=0-{len(self.data) - 1}").split("=")[1].split("-"))
        if Server.good > 0:
            Server.good -= 1
            part = self.data[start : stop + 1]
            self._head(206, len(part))
            self.wfile.write(part)
            if Server.good == 0 and Server.error == "refused":
                self.close_connection = True
                self.server.shutdown()
                self.server.socket.close()
        elif Server.error == "status":
            self._head(503, 0)
        else:
            self._head(206, stop + 1 - start)  # and no body
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


KINDS = ["parquet", "jsonl", "jsonl.gz"]


def big(path: Path) -> int:
    """Writes a file that fsspec does not read at once, 16 MB; the number of its documents."""
    texts = [os.urandom(1 << 13).hex() for _ in range(1024)]
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=64, compression="none")
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if path.suffix == ".gz":
        import gzip

        path.write_bytes(gzip.compress(path.read_bytes(), 0))
    return len(texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", ["refused", "status", "cut off"])
def test_a_store_that_fails_is_no_damage(server: ThreadingHTTPServer, tmp_path: Path, kind: str, error: str) -> None:
    count = big(tmp_path / f"x.{kind}")
    Server.data, Server.error, Server.good = (tmp_path / f"x.{kind}").read_bytes(), error, 1
    url = f"http://127.0.0.1:{server.server_port}/x.{kind}"
    read: list[object] = []
    with pytest.raises(OSError, match=rf"^{url} cannot be read \(.+\): the same command goes on") as failure:
        read.extend(documents(Piece(url, 0, -1, len(Server.data)), "auto", "text"))
    assert len(read) < count and all(isinstance(item, Document) for item in read)
    assert "\n" not in str(failure.value)


def test_the_same_command_goes_on_when_the_store_is_back(
    server: ThreadingHTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = big(tmp_path / "x.parquet")
    Server.data, Server.error, Server.good = (tmp_path / "x.parquet").read_bytes(), "cut off", 1
    url, out = f"http://127.0.0.1:{server.server_port}/x.parquet", tmp_path / "out"
    command = ["prepare", url, out, "--on-error", "skip", "--holdout", 0]
    assert run(*command) == 2
    assert f"{url} cannot be read" in capsys.readouterr().err and not (out / "index.json").exists()
    Server.good = 1000
    assert run(*command) == 0
    index = read_index(out, "OUT")
    assert (index.skipped, sum(index.train.documents)) == (0, count)


def test_arrows_own_errors_are_damage(tmp_path: Path) -> None:
    count = big(tmp_path / "x.parquet")
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[9 << 20 : 11 << 20] = bytes(2 << 20)
    (tmp_path / "x.parquet").write_bytes(data)
    *good, last = documents(Piece(str(tmp_path / "x.parquet"), 0, -1, 0), "auto", "text")
    assert 0 < len(good) < count and isinstance(last, Damage) and "Parquet file is damaged" in last.reason


# ---- zstd ----


@pytest.mark.parametrize("window", [27, 28, 31])
def test_zstd_of_long_windows_is_read(tmp_path: Path, window: int) -> None:
    """As of zstd --long=31."""
    zstandard = pytest.importorskip("zstandard")
    small = {"chain_log": 10, "hash_log": 10, "strategy": zstandard.STRATEGY_FAST}
    options = zstandard.ZstdCompressionParameters(window_log=window, **small)
    frame = zstandard.ZstdCompressor(compression_params=options).compressobj()
    data = frame.compress(b'{"text": "spam"}\n' * 1000) + frame.flush()
    assert zstandard.get_frame_parameters(data).window_size == 1 << window
    (tmp_path / "x.jsonl.zst").write_bytes(data * 2)
    read = documents(Piece(str(tmp_path / "x.jsonl.zst"), 0, -1, len(data)), "auto", "text")
    assert [getattr(item, "text", item) for item in read] == ["spam"] * 2000


# ---- the end inside of a text ----


def test_a_nul_in_the_text_is_damage_for_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "TASK_BYTES", (64, 64))
    lines = [json.dumps({"text": text}) for text in ("a" * 50, "b", "c\0d", "e" * 50, "\0", "f")]
    (tmp_path / "x.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "y.txt").write_text("one\0two")
    command = ["prepare", tmp_path / "x.jsonl", tmp_path / "y.txt", tmp_path / "out", "--holdout", 0, "--workers", 1]
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/x.jsonl:3: " in error and "token that ends documents" in error and error.count("\n") == 1
    assert run(*command, "--on-error", "skip") == 0
    assert texts_of(tmp_path / "out", "train") == [b"a" * 50, b"b", b"e" * 50, b"f"]
    index = read_index(tmp_path / "out", "OUT")
    assert (index.skipped, sum(index.train.bytes), sum(index.train.documents)) == (3, 102, 4)
    named = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in named] == ["x.jsonl:3", "x.jsonl:5", "y.txt:1"]
    assert run(*command[:-5], tmp_path / "none", "--holdout", 0, "--end", "none") == 0
    assert sum(read_index(tmp_path / "none", "OUT").train.documents) == 7


def test_no_tokenizer_may_end_a_document_inside_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A unigram model finds its </s> in the text, where special tokens are text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "ab</s>")]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), 0))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n{"text": "a</s>b"}\n')
    command = ["prepare", tmp_path / "x.jsonl", tmp_path / "out", "--tokenizer", tmp_path, "--holdout", 0]
    assert run(*command) == 2
    assert f"{tmp_path}/x.jsonl:2: " in capsys.readouterr().err
    assert run(*command, "--on-error", "skip") == 0
    assert read_index(tmp_path / "out", "OUT").skipped == 1


# ---- what is named ----


def test_only_the_first_damages_of_a_task_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + "x\n" * (worker.NAMED + 5))
    command = ["prepare", tmp_path / "x.jsonl", tmp_path / "out", "--holdout", 0, "--on-error", "skip"]
    assert run(*command) == 0
    assert "1,005 damaged skipped" in (told := capsys.readouterr().out)
    assert f"skipped.txt names the first {worker.NAMED:,} of each task" in told
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == worker.NAMED
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\nx\n')
    assert run(*command[:2], tmp_path / "few", *command[3:]) == 0
    assert "1 damaged skipped" in (told := capsys.readouterr().out) and "skipped.txt names them\n" in told
