"""The launcher, with stand-ins for the training loop and the lighthouse but real torchrun jobs: everything
starts, is heard, and ends, and nothing is left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diloco.errors import ConfigError
from launch.local import run_local, split_arguments
from launch.process import Job, Lines, Stop, forward, supervise
from launch.regions import Region, find_override, override, parse_override, parse_regions

ROOT = Path(__file__).resolve().parents[1]

TRAIN = r"""
    import os, signal, sys, time
    from pathlib import Path
    args = dict(a.split("=", 1) for a in sys.argv[1:])
    name, rank = args["+region"], os.environ["RANK"]
    if args.get("fail") == name:
        sys.exit(print("inner.lr=x is no number: set it to one", file=sys.stderr, flush=True) or 2)
    if args.get("crash") == name:
        folder = Path(args["run.dir"], name)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("{}\\n")
        sys.exit(7)
    def say(line):  # in one write: two ranks share the pipe, and torchrun starts them unbuffered
        sys.stdout.write(line + "\n")
    def leave(*_):
        say(f"rank {rank} leaves")
        time.sleep(0.2)  # ends later than others: torchrun must not cut it short
        say(f"rank {rank} left")
        sys.exit(0)
    signal.signal(signal.SIGTERM, leave)
    world, threads = os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]
    say(f"rank {rank} of {world} threads {threads} {' '.join(sys.argv[1:])}")
    if "crash" in args or "once" in args:
        sys.exit(0)
    signal.pause()
"""
LIGHTHOUSE = """
    import signal, sys
    assert sys.argv[1:] == ["--bind", "127.0.0.1:0"], sys.argv
    print("lighthouse http://127.0.0.1:4242", flush=True)
    signal.pause()
"""
DRIVER = """
    import sys
    from pathlib import Path
    from launch.local import print_line, run_local
    from launch.regions import Region
    sys.exit(run_local([Region("eu", 2, ("a=1",)), Region("us")], ["b=2"], Path(sys.argv[1]), print_line,
                       module="fake_train", lighthouse="fake_lighthouse"))
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the children's path with the stand-ins."""
    for name, text in {"fake_train": TRAIN, "fake_lighthouse": LIGHTHOUSE, "driver": DRIVER}.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("DILOCO_TEST_TREE", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def tree(modules: Path) -> list[str]:
    """Command lines of the living processes that were started for this test, whoever their parents are."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"DILOCO_TEST_TREE={modules}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# ---- whole launches ----


def start_driver(modules: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """A launcher in a process of its own, once all three ranks train, and what it said until then."""
    driver = subprocess.Popen(
        [sys.executable, str(modules / "driver.py"), str(modules / "run")], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    said: list[str] = []
    while sum(" of " in line for line in said) < 3:
        said.append(driver.stdout.readline().rstrip())
        assert said[-1], f"the launcher ended early: {said}"
    return driver, said


def test_ctrl_c_ends_every_region_cleanly(modules: Path) -> None:
    driver, said = start_driver(modules)
    settings = "run.dir={} elastic.start_regions=2 elastic.lighthouse=http://127.0.0.1:4242 b=2".format(modules / "run")
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert sorted(said) == [
        f"eu         | rank 0 of 2 threads {threads} +region=eu {settings} a=1",
        f"eu         | rank 1 of 2 threads {threads} +region=eu {settings} a=1",
        "lighthouse | http://127.0.0.1:4242",
        f"us         | rank 0 of 1 threads {threads} +region=us {settings}",
    ]
    driver.send_signal(signal.SIGINT)
    rest, _ = driver.communicate(timeout=30)
    assert sorted(rest.splitlines()) == sorted(
        f"{name:<10} | rank {rank} {what}"
        for name, rank in [("eu", 0), ("eu", 1), ("us", 0)]
        for what in ("leaves", "left")
    )
    assert driver.returncode == 0 and tree(modules) == []


def test_killing_the_launcher_leaves_nothing_behind(modules: Path) -> None:
    driver, _ = start_driver(modules)
    assert len(tree(modules)) == 1 + 1 + 2 + 3  # launcher, lighthouse, torchruns, ranks
    driver.kill()
    driver.communicate(timeout=30)
    assert eventually(lambda: not tree(modules)), tree(modules)


def launch(modules: Path, *overrides: str, lighthouse: str = "fake_lighthouse") -> tuple[int, list[str]]:
    said: list[str] = []
    regions = [Region("eu"), Region("us")]
    code = run_local(regions, overrides, modules / "run", said.append, module="fake_train", lighthouse=lighthouse)
    assert tree(modules) == []
    return code, said


def test_a_bad_config_in_one_region_stops_all_with_its_sentence(modules: Path) -> None:
    code, said = launch(modules, "fail=us", "elastic.lighthouse=http://127.0.0.1:9")
    assert code == 2
    about_us = [line for line in said if line.startswith("us")]
    assert about_us == [
        "us         | inner.lr=x is no number: set it to one",
        "us         | ended with exit code 2: stopping the run",
    ]
    assert not any(line.startswith("lighthouse") for line in said), "the user's own was named"
    assert not any("Traceback" in line or "killed" in line for line in said), said


def test_a_region_that_fails_later_does_not_stop_the_others(modules: Path) -> None:
    code, said = launch(modules, "crash=us")
    assert code == 7
    assert "us         | ended with exit code 7: the other regions go on" in said
    assert any(line.startswith("us         | rank 0 (pid ") and line.endswith("exit code 7") for line in said)
    assert any(line.startswith("eu         | rank 0 of 1") for line in said)


def test_a_lighthouse_that_does_not_start_ends_the_launch(modules: Path) -> None:
    (modules / "broken.py").write_text("import sys; sys.exit('port 1 is taken')")
    code, said = launch(modules, lighthouse="broken")
    assert code == 1 and said == [
        "lighthouse | port 1 is taken",
        "lighthouse | ended with exit code 1 before it told its address",
    ]


# ---- jobs ----


def run_jobs(*scripts: str, stop: Stop | None = None, seconds: float = 20.0) -> tuple[list[Job], list[str]]:
    lines: Lines = queue.Queue()
    said: list[str] = []
    jobs = [
        Job(str(i), [sys.executable, "-c", textwrap.dedent(script)], os.environ, lines)
        for i, script in enumerate(scripts)
    ]

    def on_line(name: str, line: str) -> None:
        said.append(f"{name} {line}")

    if stop:  # as if Ctrl-C came once all are ready
        assert eventually(lambda: forward(lines, on_line) or len(said) >= len(scripts))
        stop.times = 1
    supervise(jobs, lines, stop or Stop(), on_line, lambda job: job.code == 2, seconds)
    assert not [pid for job in jobs for pid in job.processes()]
    return jobs, said


STUBBORN = """
    import os, signal, subprocess, sys
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.argv[1:] != ["deep"]:
        code = open(f"/proc/{os.getpid()}/cmdline").read().split("\\0")[2]
        subprocess.Popen([sys.executable, "-c", code, "deep"], start_new_session=True)
    else:
        print("ready", flush=True)
    signal.pause()
"""


def test_what_does_not_stop_is_killed_with_all_its_sessions() -> None:
    jobs, said = run_jobs(STUBBORN, stop=Stop(), seconds=0.3)
    assert said == ["0 ready", "0 has not stopped in time: killed"] and jobs[0].code == 137


def test_a_second_ctrl_c_kills_at_once() -> None:
    stop = Stop()
    lines: Lines = queue.Queue()
    job = Job("a", [sys.executable, "-c", textwrap.dedent(STUBBORN)], os.environ, lines)
    with stop.on_signals():
        assert lines.get(timeout=20) == ("a", "ready")
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        supervise([job], lines, stop, lambda *_: None, lambda _: False, 3600.0)
    assert job.code == 137 and not list(job.processes())
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the handlers are what they were


def test_workers_are_told_to_stop_themselves_so_that_their_exit_code_counts() -> None:
    worker = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); "
    worker += "print('ready', flush=True); signal.pause()"
    agent = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {worker!r}]))"
    jobs, said = run_jobs(agent, stop=Stop())
    assert jobs[0].code == 5 and said == ["0 ready"]


def test_what_a_job_leaves_behind_ends_with_it() -> None:
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], "
    jobs, said = run_jobs(orphan + "start_new_session=True); print('gone'); sys.exit(3)")
    assert jobs[0].code == 3 and said == ["0 gone"]


def test_one_fatal_end_stops_the_others_and_plain_ends_do_not() -> None:
    waits = "import signal; print('ready', flush=True); signal.pause()"
    jobs, _ = run_jobs("import sys; sys.exit(2)", waits)
    assert [job.code for job in jobs] == [2, 0], "ended by the SIGTERM that was asked for"
    jobs, said = run_jobs("import sys; sys.exit(1)", "print('θ', flush=True)", "import os; os.abort()")
    assert [job.code for job in jobs] == [1, 0, 134] and said == ["1 θ"]


# ---- regions and overrides ----


def test_regions() -> None:
    assert parse_regions("[{name: eu, nproc: 4, overrides: [parallel.tp=2]}, us]") == [
        Region("eu", 4, ("parallel.tp=2",)),
        Region("us"),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "names no regions"),
        ("eu", "regions=eu names no regions: write a list like"),
        ("[eu", "is not a list in YAML"),
        ("[eu, us, eu]", "names eu more than once"),
        ("[{name: eu, npoc: 2}]", "unknown key npoc .* did you mean nproc"),
        ("[{name: eu, xyzzy: 2}]", "unknown key xyzzy .* has the keys name, nproc, overrides"),
        ("[{nproc: 2}]", "name=None"),
        ("[no]", "name=False .* in quotes"),
        ("[../eu]", "name=../eu"),
        ("[{name: eu, nproc: 0}]", "nproc=0 .* 1 or more"),
        ("[{name: eu, nproc: two}]", "nproc=two"),
        ("[{name: eu, nproc: true}]", "nproc=True"),
        ("[{name: eu, overrides: parallel.tp=2}]", "overrides=parallel.tp=2"),
    ],
)
def test_bad_regions_are_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        parse_regions(text)
    assert "\n" not in str(error.value)


def local(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.local", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("regions=[eu, eu]", "regions names eu more than once"),
        ("+region=eu", "+region=eu names one region: under launch.local write regions=[...]"),
        ("run.dir=a=[", "run.dir=a=[ is not an override"),
        ("-m", "-m is not known here"),
        ("stop_seconds=soon", "stop_seconds=soon is not a number"),
        ("run.dir=runs/${region.name}", "run.dir=runs/${region.name} differs from region to region"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(argument: str, sentence: str) -> None:
    done = local(argument)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(sentence), done
    assert done.stderr.count("\n") == 1


def test_arguments_are_split() -> None:
    regions, seconds, rest = split_arguments(["a.b=1", "regions=[asia]", "stop_seconds=5", "+c=2"])
    assert regions == [Region("asia")] and seconds == 5.0 and rest == ["a.b=1", "+c=2"]
    assert [region.name for region in split_arguments([])[0]] == ["eu", "us"]


@pytest.mark.parametrize(
    "value",
    ["/a/b", "a b", "/x,=[1]", "it's", "a\\", "a\\'b", "a\\\\b", "θ", "null", "12", "http://127.0.0.1:80"],
)
def test_overrides_arrive_as_they_are(value: str) -> None:
    assert parse_override(override("run.dir", value)).value() == value


def test_the_last_override_of_a_key_counts() -> None:
    given = ["run.dir=a", "++run.dir='b c'", "run.dirt=d", "~run.x"]
    assert find_override(given, "run.dir") == "b c" and find_override(given, "run.store") is None
