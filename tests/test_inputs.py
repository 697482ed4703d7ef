"""Which files `prepare` reads: links, hidden names, and listings that do not tell the sizes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from diloco.corpus.command import serve
from diloco.corpus.folder import read_index
from diloco.corpus.inputs import inputs
from diloco.errors import ConfigError
from tests.corpora import texts_of


def run(*arguments: object) -> int:
    return serve([str(a) for a in arguments])


def names(tmp_path: Path, *sources: object) -> list[str]:
    """Of the files found, below tmp_path."""
    files, lost = inputs([str(source) for source in sources], tmp_path / "out")
    assert not lost
    return [str(Path(path).relative_to(tmp_path)) for path, _ in files]


# ---- links ----


def linked(root: Path) -> Path:
    """A directory as Hugging Face's hub cache has it: links into another one, of files and of a directory."""
    blobs, snapshot = root / "blobs", root / "snapshot"
    for name in ("one", "deep/two"):
        (blobs / name).parent.mkdir(parents=True, exist_ok=True)
        (blobs / name).write_text(name)
    snapshot.mkdir()
    (snapshot / "plain.txt").write_text("plain")
    (snapshot / "link.txt").symlink_to("../blobs/one")
    (snapshot / "sub").symlink_to(blobs / "deep")
    return snapshot


def test_links_are_followed(tmp_path: Path) -> None:
    snapshot = linked(tmp_path)
    files = ["snapshot/link.txt", "snapshot/plain.txt"]
    assert names(tmp_path, snapshot) == [*files, "snapshot/sub/two"]
    assert names(tmp_path, snapshot / "*") == files
    assert names(tmp_path, snapshot / "**") == [*files, "snapshot/sub/two"]
    assert names(tmp_path, snapshot / "link.txt", f"file://{snapshot}/sub") == [files[0], "snapshot/sub/two"]
    assert inputs([str(snapshot / "link.txt")], tmp_path / "out") == ([(f"{snapshot}/link.txt", 3)], [])


@pytest.mark.parametrize("target", ["../nowhere", "circle.txt", "..", "../snapshot", "plain.txt/x"])
def test_a_link_that_leads_nowhere_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    snapshot, out = linked(tmp_path), tmp_path / "out"
    (snapshot / "circle.txt").symlink_to(target)
    for source in (snapshot, snapshot / "**"):
        assert run("prepare", source, out, "--holdout", 0) == 2
        error = capsys.readouterr().err
        assert f"{snapshot}/circle.txt: " in error and target in error and "--on-error skip" in error
        assert error.count("\n") == 1 and not out.exists()
    assert run("prepare", snapshot, out, "--holdout", 0, "--on-error", "skip") == 0
    index = read_index(out, "OUT")
    assert (index.skipped, texts_of(out, "train")) == (1, [b"one", b"plain", b"deep/two"])
    assert (out / "skipped.txt").read_text().startswith(f"{snapshot}/circle.txt: ")
    assert names(tmp_path, snapshot / "[lp]*") == ["snapshot/link.txt", "snapshot/plain.txt"]


def test_a_link_that_was_named_leads_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").symlink_to("gone")
    assert run("prepare", tmp_path / "x.txt", tmp_path / "out") == 2
    assert f"{tmp_path}/x.txt: its link to gone " in capsys.readouterr().err


def test_out_is_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ConfigError, match="contains OUT"):
        inputs([str(tmp_path / "in")], tmp_path / "out")


@pytest.mark.parametrize("source", ["in", "in/**/*.txt"])
def test_a_directory_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Root may read all, so the system's answer is made up."""
    (tmp_path / "in" / "shut").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("x")

    def scandir(path: str, real: Any = os.scandir) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"SRC .* cannot be read \(.*Permission denied.*shut.*\): check"):
        inputs([str(tmp_path / source)], tmp_path / "out")


# ---- hidden ----


@pytest.mark.parametrize("hidden", [".cache", ".cache/deep", "open/.deep"])
def test_only_what_is_hidden_below_the_source_is(tmp_path: Path, hidden: str) -> None:
    folder = tmp_path / hidden
    for name in ("a.txt", ".b.txt", ".git/c.txt", "sub/d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert names(tmp_path, folder) == [f"{hidden}/a.txt", f"{hidden}/sub/d.txt"]
    assert names(tmp_path, folder / "sub") == [f"{hidden}/sub/d.txt"]
    assert names(tmp_path, folder / "*.txt") == [f"{hidden}/a.txt"]
    assert names(tmp_path, folder / "**/*.txt") == [f"{hidden}/a.txt", f"{hidden}/sub/d.txt"]
    assert names(tmp_path, folder / ".b.txt") == [f"{hidden}/.b.txt"]
    assert names(tmp_path, folder / ".[b-c]*") == [f"{hidden}/.b.txt"]
    assert names(tmp_path, folder / ".g*/*") == [f"{hidden}/.git/c.txt"]
    with pytest.raises(ConfigError, match=r"SRC .*c\.txt is no file"):
        names(tmp_path, folder / "*/c.txt")


# ---- sizes ----


class Server(SimpleHTTPRequestHandler):
    """Links as Apache has them besides; files whose names begin with `unsized` come without a Content-Length."""

    def log_message(self, *args: Any) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Length" or "/unsized" not in self.path:
            super().send_header(keyword, value)

    def list_directory(self, path: Any) -> Any:
        links = [f"{p.name}/" if p.is_dir() else p.name for p in sorted(Path(path).iterdir())]
        page = "".join(f'<a href="{link}">{link}</a>\n' for link in ["?C=N;O=D", "/", *links]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    root = tmp_path / "site"
    root.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", root
        server.shutdown()


def test_a_web_servers_files_have_sizes(site: tuple[str, Path], tmp_path: Path) -> None:
    """Its listings tell none."""
    url, root = site
    (root / "data" / "sub").mkdir(parents=True)
    for name, text in (("a.txt", "one"), ("b.txt", "three"), ("sub/c.txt", "four"), ("empty.txt", "")):
        (root / "data" / name).write_text(text)
    (root / "data" / "unsized.jsonl").write_text('{"text": "five"}\n{"text": "six"}\n')
    files, lost = inputs([f"{url}/data"], tmp_path / "out")
    sizes = {path.removeprefix(f"{url}/data/"): size for path, size in files}
    assert not lost and sizes == {"a.txt": 3, "b.txt": 5, "empty.txt": 0, "sub/c.txt": 4, "unsized.jsonl": None}
    assert run("prepare", f"{url}/data/*", tmp_path / "glob", "--holdout", 0) == 0
    assert texts_of(tmp_path / "glob", "train") == [b"one", b"three", b"five", b"six"]
    assert run("prepare", f"{url}/data", tmp_path / "all", "--holdout", 0) == 0
    assert texts_of(tmp_path / "all", "train") == [b"one", b"three", b"four", b"five", b"six"]
    assert run("prepare", f"{url}/data/unsized.jsonl", tmp_path / "one", "--holdout", 0) == 0
    assert texts_of(tmp_path / "one", "train") == [b"five", b"six"]


def test_a_listed_file_that_does_not_answer_is_no_damage(
    site: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, root = site
    (root / "a.txt").write_text("one")
    (root / "gone.txt").symlink_to("nowhere")
    assert run("prepare", url, tmp_path / "out", "--on-error", "skip") == 2
    error = capsys.readouterr().err
    assert f"SRC {url}: {url}/gone.txt" in error and error.count("\n") == 1
