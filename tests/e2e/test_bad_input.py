"""Bad input through the real commands: one sentence with key, value and fix, exit code 2, nothing written."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.cluster import SMALL, Cluster
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = "torch.distributed.run"
HEADS_OF_THREE = "model.args={vocab: 256, dim: 48, layers: 2, heads: 3, kv_heads: 3, ffn: 96, tied: true}"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    before: dict[str, str]
    after: dict[str, str]


def listing(directory: Path) -> dict[str, str]:
    """Every file and directory below, with a digest of what is in it."""
    files = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*"))}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for name, p in files.items()}


def command(arguments: list[str], directory: Path, module: str = "diloco.train", watch: Path | None = None) -> Done:
    """Runs it in `directory`, and looks at what that did to `watch` (default: the same)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = listing(watch or directory)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=directory,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{arguments} did not end: {process.communicate()}") from None
    return Done(process.returncode, out, err, before, listing(watch or directory))


def refused(done: Done, *parts: str) -> None:
    assert done.code == 2, done
    assert done.err.count("\n") == 1 and done.err.startswith("diloco.train: ") and done.err.endswith("\n"), done.err
    assert "Traceback" not in done.err + done.out
    for part in parts:
        assert part in done.err, f"{part!r} is not in {done.err!r}"
    assert done.after == done.before


# ---- a fresh directory ----

FIX = "set "
EU = "+region=eu"
CASES: dict[str, tuple[list[str], list[str]]] = {
    # name: (arguments, what the sentence must contain)
    "unknown key": ([EU, "outer.lrr=1"], ["unknown key outer.lrr", "did you mean outer.lr?"]),
    "unknown key, added": ([EU, "+outer.lrr=1"], ["unknown key outer.lrr", "did you mean outer.lr?"]),
    "unknown group": ([EU, "outre.lr=1"], ["unknown key outre.lr", "did you mean outer.lr?"]),
    "key of the model": ([EU, "+model.args.lairs=2"], ["model.args.lairs=2", "did you mean model.args.layers?"]),
    "a key that is there": ([EU, "+outer.lr=1"], ["outer.lr is in the config already", "without the plus"]),
    "not an override": ([EU, "outer.lr=[1"], ["outer.lr=[1 is not an override", "write key=value"]),
    "unknown region": (["+region=mars"], ["region=mars does not exist", "set it to one of asia, eu, us"]),
    "no region": ([], ["no region is named", "add +region=eu"]),
    "region without plus": (["region=eu"], ["region", "+region=eu"]),
    "odd region": (["region.name=a/b"], ["region.name='a/b'", "letters, digits"]),
    "unknown option": ([EU, "model=huge"], ["model=huge does not exist", "set it to one of", "tiny"]),
    "not an int": ([EU, "run.rounds=many"], ["run.rounds='many'", "int", FIX]),
    "not a float": ([EU, "outer.lr=high"], ["outer.lr='high'", "float", FIX]),
    "a number for a group": ([EU, "outer=3"], ["outer=3 cannot be composed", "must be a string"]),
    "several regions": (["+region=eu,us"], ["+region=eu,us cannot be composed", "quote"]),
    "model of one's own": ([EU, "model=own"], ["model.target is not set", "add model.target=VALUE"]),
    "args of one's own": ([EU, "model.args={dims: 2}"], ["model.args", "+model.args=VALUE"]),
    "no end": ([EU, "run.rounds=null"], ["run.rounds=null", "run.tokens=null", FIX]),
    "sequence too long": ([EU, "data.path=text.txt"], ["inner.seq_len=256", "is too long for the data", FIX]),
    "no such data": ([EU, "data.path=nowhere"], ["data.path=nowhere does not exist", FIX]),
    "empty data": ([EU, "data.path=empty"], ["data.path=empty holds no text", FIX]),
    "no data path": ([EU, "data=text"], ["data.path is not set", "add data.path=VALUE"]),
    "epochs of a mixture": (
        [EU, "run.epochs=1", "data.sources=[{path: text.txt, weight: 1}]"],
        ["run.epochs=1", "data.sources", "set run.tokens"],
    ),
    "own source without name": (
        [EU, "region.sources=[{weight: 1, path: text.txt}]"],
        ["region.sources[0]=", "has no name", "write it as"],
    ),
    "own sources of one name": (
        [EU, "region.sources=[{name: a, weight: 0.5}, {name: a, weight: 0.5}]"],
        ["region.sources[1].name=a", "give each its own"],
    ),
    "share of an own source": (
        [EU, "region.sources=[{name: a, weight: 2}]"],
        ["region.sources[0].weight=2", "set it above 0"],
    ),
    "own sources beyond all": (
        [EU, "region.sources=[{name: a, weight: 0.7}, {name: b, weight: 0.7}]"],
        ["region.sources: the weights sum to 1.4", "set them to shares"],
    ),
    "own source elsewhere": (
        [EU, "region.sources=[{name: a, weight: 1, path: nowhere}]"],
        ["region.sources[0]: data.path=nowhere does not exist", FIX],
    ),
    "workers": ([EU, "data.workers=-1"], ["data.workers=-1", FIX]),
    "evaluation set": ([EU, "run.eval_sets=[{path: text.txt}]"], ["run.eval_sets[0]", "{name: books, path: DIR}"]),
    "H": ([EU, "outer.sync_every=5", "outer.fragments=2"], ["outer.sync_every=5", "outer.fragments=2", FIX]),
    "merge": ([EU, "outer.merge=add"], ["outer.merge=add is not known", "set it to rebase or mix"]),
    "alpha": ([EU, "outer.merge=mix", "outer.alpha=1"], ["outer.alpha=1.0", "set 0 <= alpha < 1"]),
    "overlap": ([EU, "outer.max_overlap_steps=51"], ["outer.max_overlap_steps=51", "outer.sync_every=50", FIX]),
    "overlap below 0": ([EU, "outer.max_overlap_steps=-1"], ["outer.max_overlap_steps=-1", "between 0 and", FIX]),
    "outer optimizer": ([EU, "outer.optimizer=adam"], ["outer.optimizer=adam is not known", "nesterov or adamw"]),
    "ddp": ([EU, "+experiment=ddp", "outer.sync_every=2"], ["outer.optimizer=adamw", "set outer.sync_every=1"]),
    "gateway": ([EU, "elastic.gateway=here"], ["elastic.gateway", "here", "HOST:PORT"]),
    "join_inner": (
        [EU, "elastic.join_inner=mine"],
        ["elastic.join_inner=mine is not known", "set it to peer or fresh"],
    ),
    "streams": ([EU, "elastic.streams=-1"], ["elastic.streams=-1", "set it to 0 (automatic)"]),
    "fragments": ([EU, "outer.fragments=50"], ["outer.fragments=50", "4 layers", "set it to 4 or less"]),
    "TP and ranks": ([EU, "parallel.tp=2"], ["parallel.tp=2 does not divide", "1 rank", FIX]),
    "model.target": ([EU, "model.target=no.such"], ["model.target=no.such cannot be loaded", FIX]),
    "model.loss": ([EU, "model.loss=diloco.model.los"], ["model.loss=diloco.model.los cannot be loaded", FIX]),
    "data.source": ([EU, "data.source=text"], ["data.source=text cannot be loaded", FIX]),
    "model.args": ([EU, "model.args.heads=5"], ["model.args.heads=5", "set model.args.dim"]),
    "model.args are JSON": ([EU, "+model.args.norm_eps=inf"], ["model.args=", "is not plain JSON", "set them"]),
    "vocabulary": ([EU, "model.args.vocab=100"], ["model.args.vocab=100", "set model.args.vocab=256"]),
    "store": ([EU, "run.store=gopher://x/y"], ["run.store=gopher://x/y", "Protocol not known", FIX]),
    "run.dir": ([EU, "run.dir=text.txt/run"], ["run.dir=text.txt/run cannot be written to", FIX]),
    "lighthouse": ([EU, "elastic.lighthouse=here"], ["elastic.lighthouse", "'here'", "http://HOST:PORT"]),
    "public": (
        [EU, "elastic.lighthouse=http://192.0.2.1:1"],
        ["elastic.lighthouse=http://192.0.2.1:1 is not loopback", "set elastic.tls", "DILOCO_SECRET"],
    ),
    "a public host": ([EU, "elastic.host=192.0.2.1"], ["elastic.host=192.0.2.1 is not loopback", "set elastic.tls"]),
    "a public gateway": ([EU, "elastic.gateway=192.0.2.1:1"], ["elastic.gateway=192.0.2.1:1", "set elastic.tls"]),
    "no certificates": ([EU, "elastic.tls=nowhere"], ["elastic.tls=nowhere", "authority.crt is not there", FIX]),
    "two paths": ([EU, "elastic.tls=[a,b]"], ["elastic.tls=['a', 'b']", "neither a directory nor", FIX]),
    "a short secret": ([EU, "elastic.secret_file=text.txt"], ["text.txt holds fewer than 16 characters", FIX]),
    "no secret": ([EU, "elastic.secret_file=nowhere"], ["nowhere cannot be read", "set DILOCO_SECRET"]),
    "multirun": (["-m", EU], ["--multirun", "use python -m launch.sweep -m"]),
    "multirun, long": (["--multirun", EU], ["--multirun", "use python -m launch.sweep -m"]),
    "unknown flag": ([EU, "--fast"], ["--fast is not known", "--help", "KEY=VALUE"]),
    "unknown key, shown": (["--cfg", "job", "outer.lrr=1"], ["unknown key outer.lrr", "did you mean outer.lr?"]),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(2)
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def refusals(
    pool: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Future[Done]]:
    """All cases of this session, two at a time."""
    wanted = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    started = {}
    for name in [name for name in CASES if name in wanted]:
        directory = tmp_path_factory.mktemp("bad")
        (directory / "text.txt").write_text("short\n")
        (directory / "empty").mkdir()
        started[name] = pool.submit(command, CASES[name][0], directory)
    return started


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_started(refusals: dict[str, Future[Done]], case: str) -> None:
    done = refusals[case].result()
    refused(done, *CASES[case][1])
    assert done.out == ""


def test_help_and_cfg(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    helped, shown = pool.map(lambda a: command(a, tmp_path), [["--help"], ["--cfg", "job", EU, "outer.lr=0.25"]])
    assert (helped.code, shown.code, helped.err, shown.err) == (0, 0, "", "")
    for part in (
        "torchrun -m diloco.train +region=eu",
        "codec: bf16, int4, int8, none, topk",
        "sync_every:",
        "+experiment=demo",
    ):
        assert part in helped.out
    assert re.search(r"^outer:\n(  .*\n)*  lr: 0.25$", shown.out, re.MULTILINE)
    assert re.search(r"^region:\n  name: eu$", shown.out, re.MULTILINE)
    assert shown.after == shown.before == {}


# ---- the lighthouse ----


def test_lighthouses_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on another host; something mute, and something that speaks another protocol, has the port."""
    monkeypatch.setenv("DILOCO_SECRET", "needed beyond loopback")
    with socket.create_server(("127.0.0.1", 0)) as mute, socket.create_server(("127.0.0.1", 0)) as other:
        pool = ThreadPoolExecutor(4)  # they mostly wait
        pool.submit(answer_nonsense, other)
        # A name of this machine that is not loopback by its letters: nobody may start a lighthouse there unasked.
        addresses = [f"http://{socket.gethostname()}:{free_port()}"]
        addresses += [f"http://127.0.0.1:{server.getsockname()[1]}" for server in (mute, other)]
        done = pool.map(lambda a: command([EU, f"elastic.lighthouse={a}"], tmp_path), addresses)
        unreachable, *taken = list(done)
        other.shutdown(socket.SHUT_RDWR)
    refused(unreachable, f"elastic.lighthouse={addresses[0]} does not answer", "start one there with")
    for result, address in zip(taken, addresses[1:], strict=True):
        refused(result, f"elastic.lighthouse={address} cannot be used", "not a lighthouse", "name another port")


def answer_nonsense(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"220 mail.example.com ESMTP\r\n")


# ---- a run that is there ----

OTHER_MODEL = "model.args={vocab: 256, dim: 64, layers: 3, heads: 4, kv_heads: 2, ffn: 128, tied: true}"
AGAINST: dict[str, tuple[list[str], list[str]]] = {
    "another model": ([OTHER_MODEL], ["model is", "there and", "here", "set run.dir to a new directory"]),
    "another codec": (["codec=none"], ["codec is int8 there and none here", "set run.dir to a new directory"]),
    "another length": (["inner.seq_len=64"], ["inner.seq_len is 32 there and 64 here", "set run.dir"]),
    "other fragments": (["outer.fragments=2"], ["outer.fragments is 1 there and 2 here", "set run.dir"]),
    "other data": (["data.pattern=a*.py"], ["data", "there and", "here", "set run.dir"]),
    "another seed": (["run.seed=1"], ["run.seed=1, but", "was begun with 0", "set run.seed=0"]),
    "other own data": (
        ["region.sources=[{name: mine, weight: 0.5, pattern: b*.py}]"],
        ["region.sources[0] (mine) is other data", "there and", "here", "or another name"],
    ),
    "never resume": (["ckpt.resume=never"], ["ckpt.resume=never", "rounds: set run.dir to a new directory"]),
    "another store": (["run.store=elsewhere"], ["run.store=elsewhere", "run.dir=", "set run.dir to a new directory"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cluster]]:
    """One that was left, and one that is finished."""
    runs = {name: Cluster(tmp_path_factory.mktemp(name)) for name in ("left", "finished")}
    try:
        mine = "region.sources=[{name: mine, weight: 0.5, pattern: a*.py}]"
        runs["left"].start("eu", "outer.sync_every=4", "run.rounds=100000", mine)
        runs["finished"].start("eu", "outer.sync_every=4", "run.rounds=1")
        runs["finished"].finish()
        runs["left"].until(lambda: runs["left"].rounds() >= 2)
        runs["left"].regions[0].signal(signal.SIGTERM)
        runs["left"].finish()
        for run in runs.values():
            run.settle()
        yield runs
    finally:
        for run in runs.values():
            run.close()


def again(run: Cluster, directory: Path, *overrides: str) -> Done:
    arguments = [EU, f"run.dir={run.run}", f"elastic.lighthouse=http://127.0.0.1:{free_port()}", *SMALL, *overrides]
    return command([*arguments, "run.rounds=1"], directory, watch=run.run)


@pytest.mark.parametrize("case", AGAINST)
def test_what_does_not_fit_a_run_leaves_it_alone(runs: dict[str, Cluster], tmp_path: Path, case: str) -> None:
    overrides, parts = AGAINST[case]
    refused(again(runs["left"], tmp_path, *overrides), *parts)
    assert listing(tmp_path) == {}


def test_a_finished_run_stays_finished(runs: dict[str, Cluster], tmp_path: Path) -> None:
    refused(again(runs["finished"], tmp_path), "has ended (run.rounds=1 reached)", "set run.dir to a new directory")


# ---- several ranks, several regions ----


def lines_about(text: str, name: str) -> list[str]:
    return [line.split("|", 1)[1].strip() for line in text.splitlines() if re.match(rf"{name} *\|", line)]


def test_tensor_parallelism_that_does_not_divide_the_heads(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Two real ranks: one of them speaks, under torchrun and under launch.local, which hands the exit code on. torchrun
    itself ends with 1 and a traceback of its own."""
    sentence = "parallel.tp=2 does not divide model.args.heads=3: set parallel.tp to a divisor of it"
    two = ["--standalone", "--nproc-per-node=2", "-m", "diloco.train", EU, "parallel.tp=2", HEADS_OF_THREE]
    one = ["regions=[{name: eu, nproc: 2, overrides: [parallel.tp=2]}]", HEADS_OF_THREE, "run.dir=run"]
    starts = [(two, TORCHRUN), (one, "launch.local")]
    plain, local = pool.map(lambda start: command(start[0], tmp_path, start[1]), starts)
    assert plain.err.count(sentence) == 1 and re.search(r"exitcode *: 2 ", plain.err), plain.err
    assert plain.err.count("Traceback") == 1 and "diloco/" not in plain.err, "torchrun's own only"
    assert local.code == 2 and local.err == "" and "Traceback" not in local.out, local
    said = lines_about(local.out, "eu")
    assert len(said) == 2 and sentence in said[0] and said[1] == "ended with exit code 2: stopping the run"
    assert plain.after == local.after == {}


def test_two_ranks_refuse_with_one_sentence_after_they_met(runs: dict[str, Cluster], tmp_path: Path) -> None:
    """Rank 0 alone sees the run; the other must end like it, not by a broken connection."""
    run = runs["left"]
    arguments = ["regions=[{name: eu, nproc: 2}]", f"run.dir={run.run}", *SMALL, "codec=none"]
    done = command(arguments, tmp_path, "launch.local", watch=run.run)
    said = lines_about(done.out, "eu")
    assert done.code == 2 and "Traceback" not in done.out + done.err, done
    assert [line for line in said if "codec is int8 there and none here" in line] == said[:1] and len(said) == 2, said
    assert done.after == done.before


def test_multirun_under_torchrun(tmp_path: Path) -> None:
    done = command(["--standalone", "--nproc-per-node=2", "-m", "diloco.train", "-m", EU], tmp_path, TORCHRUN)
    assert done.err.count("use python -m launch.sweep -m") == 1 and "diloco/" not in done.err, done.err
    assert done.after == {}


def test_launchers(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    starts = [
        ([f"run.dir={tmp_path}/run", "outer.lrr=1"], "launch.local"),
        (["-m", EU, "outer.lrr=0.3,0.7"], "launch.sweep"),
        (["-m", "outer.lr=0.3,0.7"], "launch.sweep"),
        (["regions=[eu, {name: us, ranks: 2}]"], "launch.local"),
    ]
    local, sweep, nobody, regions = pool.map(lambda start: command(start[0], tmp_path, start[1]), starts)
    assert [done.code for done in (local, sweep, nobody, regions)] == [2, 2, 2, 2], (local, sweep, nobody, regions)
    sentences = [line for name in ("eu", "us") for line in lines_about(local.out, name) if "outer" in line]
    assert 1 <= len(sentences) <= 2 and all("did you mean outer.lr?" in line for line in sentences), local
    assert sweep.err == "launch.sweep: unknown key outer.lrr: did you mean outer.lr?\n"
    assert "add either +region=eu" in nobody.err and nobody.err.count("\n") == 1
    assert "unknown key ranks" in regions.err and regions.err.count("\n") == 1
    assert not any("Traceback" in done.out + done.err for done in (local, sweep, nobody, regions))
    assert not (tmp_path / "run").exists()
