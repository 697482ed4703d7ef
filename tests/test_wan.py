"""The WAN lab: real sockets in real namespaces, measured against what was asked for, and its end."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from diloco.errors import ConfigError
from launch.wan import Lab, LabError, WanConfig
from tests.test_launch import eventually, modules, tree
from tests.test_wan_links import binomial

__all__ = ["modules"]  # a fixture
ROOT = Path(__file__).resolve().parents[1]
NET_ADMIN, SYS_ADMIN = 12, 21  # <linux/capability.h>


def able() -> bool:
    """Whether this process may have a lab at all."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    return Path("/dev/net/tun").exists() and all(effective >> bit & 1 for bit in (NET_ADMIN, SYS_ADMIN))


needs_root = pytest.mark.skipif(not able(), reason="needs root and /dev/net/tun")

ECHO = """
    import socket
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("", 7))
    print("ready", flush=True)
    while True:
        data, sender = server.recvfrom(9000)
        server.sendto(data, sender)
"""
PING = """
    import socket, sys, time
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(5)
    for _ in range(9):
        start = time.monotonic()
        client.sendto(b"x" * 56, (sys.argv[1], 7))
        client.recv(100)
        print(time.monotonic() - start)
"""
SINK = """
    import socket, time
    server = socket.create_server(("", 9))
    print("ready", flush=True)
    client, _ = server.accept()
    total, told = 0, time.monotonic()
    while data := client.recv(1 << 20):
        total += len(data)
        if time.monotonic() > told + 1:
            print(total / (time.monotonic() - told), flush=True)
            total, told = 0, time.monotonic()
"""
SOURCE = """
    import socket, sys
    client = socket.create_connection((sys.argv[1], 9))
    while True:
        client.sendall(bytes(1 << 18))
"""
FLOOD = """
    import socket, sys, time
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for i in range(int(sys.argv[2])):
        client.sendto(bytes(1000), (sys.argv[1], 9))
        if i % 100 == 99:
            time.sleep(0.005)  # not to wait for anything, but not to fill the device's queue
"""
CONNECT = """
    import socket, sys
    try:
        socket.create_connection((sys.argv[1], 9), timeout=5).close()
    except OSError as error:
        sys.exit(error.strerror or "timeout")
"""


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


def serve(lab: Lab, region: str, script: str) -> IO[str]:
    """Starts a server in a region and returns what it says, once it listens."""
    process = lab.popen(region, python(script), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process.stdout


def run(lab: Lab, region: str, script: str, *arguments: object) -> str:
    process = lab.popen(region, python(script, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process.communicate(timeout=30)[0]


def delivered(lab: Lab, source: str, target: str) -> tuple[float, int]:
    """The forwarder's clock in seconds, and IP bytes until then."""
    status = lab.status()
    return status["seconds"], status["links"][source][target]["delivered_bytes"]


def measure(lab: Lab, seconds: float, source: str = "eu", target: str = "us") -> float:
    """Bits per second of IP that come out of a path over the next so many seconds."""
    start = end = delivered(lab, source, target)
    while end[0] < start[0] + seconds:
        select.select([], [], [], 0.02)
        end = delivered(lab, source, target)
    return (end[1] - start[1]) * 8 / (end[0] - start[0])


@needs_root
def test_round_trips_take_as_long_as_asked_for() -> None:
    config = WanConfig(rtt=0.08, pairs={"asia-us": {"rtt": 0.2}, "asia-eu": {"rtt": 0.02}})
    with Lab(config, ["eu", "us", "asia"]) as lab:
        for region in lab.regions:
            serve(lab, region, ECHO)
        for a, b, rtt in (("eu", "us", 0.08), ("us", "asia", 0.2), ("asia", "eu", 0.02)):
            for _ in range(5):  # a machine that is busy elsewhere adds milliseconds of its own
                times = sorted(map(float, run(lab, a, PING, lab.address(b)).split()))
                assert rtt < times[0], (a, b, times)
                if times[4] < 1.05 * rtt:
                    break
            assert times[4] < 1.05 * rtt, (a, b, times)
        for a, b in (("hub", "us"), ("us", "hub")):
            if b == "hub":
                serve(lab, "hub", ECHO.replace('""', f'"{lab.hub}"'))
            times = sorted(map(float, run(lab, a, PING, lab.address(b)).split()))
            assert times[4] < 0.005, (a, b, times)


@needs_root
@pytest.mark.parametrize(
    ("mtu", "up", "down", "queue"), [(1500, 50e6, 400e6, 0.0), (9000, 400e6, 200e6, 0.0), (1500, 60e6, 50e6, 0.1)]
)
def test_one_tcp_stream_reaches_the_rate_asked_for(mtu: int, up: float, down: float, queue: float) -> None:
    """The rate counts IP packets with their headers."""
    with Lab(WanConfig(up=up, down=down, rtt=0.03, mtu=mtu, queue=queue), ["eu", "us"]) as lab:
        sink = serve(lab, "us", SINK)
        lab.popen("eu", python(SOURCE, lab.address("us")))
        payload = (mtu - 52) / mtu  # less the headers of IP and TCP with timestamps
        seen: list[float] = []
        while not (len(seen) > 2 and all(0.95 < share < 1.05 for share in seen[-2:])):
            assert len(seen) < 15, seen  # slow start, and what other work on these cores disturbs
            seen.append(float(sink.readline()) * 8 / payload / min(up, down))
        assert lab.status()["cpu_seconds"] < 0.8 * lab.status()["seconds"]


@needs_root
def test_loss_by_the_counters_is_in_its_interval() -> None:
    with Lab(WanConfig(rtt=0.01, loss=0.02, up=1e9, down=1e9), ["eu", "us"]) as lab:
        run(lab, "eu", FLOOD, lab.address("us"), 4000)

        def counts() -> dict[str, Any]:
            return lab.counters()["eu"]["us"]

        assert eventually(lambda: counts()["sent"] == 4000 == counts()["delivered"] + counts()["lost"]), counts()
        low, high = binomial(0.02, 4000)
        assert low < counts()["lost"] < high and counts()["dropped"] == counts()["cut"] == 0
        assert counts()["sent_bytes"] == 4000 * 1028


@needs_root
def test_live_links_are_cut_restored_slowed_and_unslowed() -> None:
    with Lab(WanConfig(up=100e6, down=100e6, rtt=0.02, mtu=9000), ["eu", "us", "asia"]) as lab:
        serve(lab, "us", SINK)
        lab.popen("eu", python(SOURCE, lab.address("us")))

        def becomes(low: float, high: float, seconds: float = 0.4) -> bool:
            return eventually(lambda: low < measure(lab, seconds) / 100e6 <= high)

        assert becomes(0.9, 1.05)
        for names in (["eu", "us"], ["us"]):
            lab.cut(*names)
            assert measure(lab, 0.2) == 0.0 and lab.counters()["eu"]["us"]["cut"] > 0
            lab.restore(*names)
            assert becomes(0.8, 1.2)
            lab.slow(*names, 0.1)
            assert becomes(0.09, 0.105, 0.5)
            lab.unslow(*names)
            assert becomes(0.8, 1.2)
        lab.cut("eu", "asia")
        assert measure(lab, 0.2) > 0, "another link"


@needs_root
def test_nothing_else_can_be_reached_from_a_region() -> None:
    with Lab(WanConfig(), ["eu", "us"]) as lab:
        with socket.create_server((lab.hub, 9)):
            assert run(lab, "eu", CONNECT, lab.hub) == ""
        assert "refused" in run(lab, "eu", CONNECT, lab.hub)
        for elsewhere in ("192.0.2.1", "8.8.8.8", "10.255.255.1"):
            assert "unreachable" in run(lab, "eu", CONNECT, elsewhere)
        with pytest.raises(ConfigError, match="there is no such region"):
            lab.cut("mars")


@needs_root
def test_two_labs_do_not_meet() -> None:
    with Lab(WanConfig(), ["eu"]) as one, Lab(WanConfig(), ["eu"]) as two:
        assert one.hub != two.hub
        with pytest.raises(ConfigError, match=r"wan.subnet=.* is in use"), Lab(WanConfig(subnet=subnet(one)), ["eu"]):
            pass


def subnet(lab: Lab) -> str:
    return lab.hub.rpartition(".")[0] + ".0"


# ---- its end ----

OWNER = """
    import subprocess, sys, time
    from launch.wan import Lab, WanConfig
    stubborn = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    stubborn += "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], start_new_session=True); "
    stubborn += "print('ready', flush=True); signal.pause()"
    with Lab(WanConfig(), ["eu", "us"]) as lab:
        started = lab.popen("eu", [sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
        started.stdout.readline()
        print(lab.job.process.pid, flush=True)
        time.sleep(600)
"""


def devices() -> set[str]:
    return {entry.name for entry in Path("/sys/class/net").iterdir()}


def links(pid: int | str) -> set[str]:
    """net:[INODE] of every network namespace that a process is in, or holds open."""
    try:
        return {os.readlink(link) for link in (f"/proc/{pid}/ns/net", *map(str, Path(f"/proc/{pid}/fd").iterdir()))}
    except OSError:
        return set()


def namespaces(pid: int) -> set[str]:
    return {link for link in links(pid) if link.startswith("net:")} - {os.readlink("/proc/self/ns/net")}


Start = Callable[[list[str]], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command from the checkout. What still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(command: list[str]) -> subprocess.Popen[str]:
        out = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, cwd=ROOT))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def is_gone(device: str, names: set[str], modules: Path) -> bool:
    visible = set().union(*(links(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()))
    return not tree(modules) and device not in devices() and not names & visible


@needs_root
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_nothing_of_a_lab_outlives_its_owner(start: Start, modules: Path, end: signal.Signals) -> None:
    process = start(python(OWNER))
    assert process.stdout is not None
    forwarder = int(process.stdout.readline())
    device, names = f"wan{forwarder}", namespaces(forwarder)
    assert eventually(lambda: len(tree(modules)) == 4) and device in devices() and len(names) == 2
    assert not is_gone(device, names, modules)
    process.send_signal(end)
    assert process.wait(timeout=30) != 0
    assert eventually(lambda: is_gone(device, names, modules)), (tree(modules), devices(), names)


@needs_root
def test_a_lab_whose_forwarder_was_killed_says_so_and_leaves_nothing(modules: Path) -> None:
    with Lab(WanConfig(), ["eu"]) as lab:
        device, names = f"wan{lab.job.process.pid}", namespaces(lab.job.process.pid)
        started = lab.popen("eu", ["sh", "-c", "setsid sleep 600 & echo ready; wait"], stdout=subprocess.PIPE)
        assert started.stdout is not None and started.stdout.readline() == b"ready\n"
        os.kill(lab.job.process.pid, signal.SIGKILL)
        with pytest.raises(LabError, match="the WAN lab has ended"):
            lab.cut("eu")
    assert is_gone(device, names, modules)


# ---- under the launcher ----


def local(modules: Path, *arguments: str) -> list[str]:
    """The command that calls run_local with two regions with test_launch's stand-in for the training loop."""
    script = """
        import sys
        from pathlib import Path
        from diloco.errors import ConfigError
        from launch.local import print_line, run_local
        from launch.regions import Region
        regions, rest = [Region("eu", 2), Region("us")], ["elastic.lighthouse=http://10.1.1.1:1", *sys.argv[2:]]
        try:
            sys.exit(run_local(regions, rest, Path(sys.argv[1]), print_line, module="fake_train"))
        except ConfigError as error:
            sys.exit(print(error) or 2)
    """
    return python(script, modules / "run", *arguments)


def wan(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "launch.wan", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, timeout=30,
    )  # fmt: skip
    return done.returncode, done.stdout


@needs_root
def test_a_launch_is_controlled_by_command_and_stops_with_its_forwarder(start: Start, modules: Path) -> None:
    process = start(local(modules, "+wan=atlantic", "wan.regions.us.up=50mbit"))
    assert process.stdout is not None
    said: list[str] = []
    while sum(" of " in line and "rank " in line for line in said) < 3:
        said.append(process.stdout.readline())
        assert said[-1], said
    text = "".join(said)
    assert "us 10." in text and "up 50 Mbit/s, down 200 Mbit/s" in text and "eu – us: RTT 90 ± 1 ms, loss 0 %" in text
    for line in said:
        if "rank " in line:
            region, address = line.split()[0], line.split("elastic.host='")[1].split("'")[0]
            assert f"{region} {address}: up" in text and "wan=" not in line

    code, table = wan(str(modules / "run"), "cut", "eu", "us")
    rows = [line.split() for line in table.splitlines()]
    assert code == 0 and rows[0][:6] == ["link", "up", "down", "RTT", "state", "sent"]
    assert rows[1][:10] == ["eu", "→", "us", "200", "Mbit/s", "200", "Mbit/s", "90", "ms", "cut"]
    assert wan(str(modules / "run"), "slow", "us", "0.1")[1].splitlines()[2].split()[3:5] == ["5", "Mbit/s"]
    for arguments, sentence in [
        (["cut", "mars"], "cut mars: there is no such region, only eu, us, hub"),
        (["slow", "us"], "slow needs a share of the rate at its end: write slow eu 0.1, or slow eu us 0.1"),
        (["melt"], "melt is not a command: write cut, restore, slow, unslow or status"),
    ]:
        assert wan(str(modules / "run"), *arguments) == (2, sentence + "\n")

    os.kill(int(json.loads((modules / "run" / "wan.json").read_text())["socket"].split("-")[2]), signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 137 and "wan        | ended with exit code 137: stopping the run" in rest
    assert rest.count(" left\n") == 3, "the ranks left by themselves"
    assert tree(modules) == []
    code, told = wan(str(modules / "run"), "status")
    assert code == 2 and told.startswith("no WAN lab runs in ") and told.count("\n") == 1


@needs_root
@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (["setpriv", "--bounding-set=-net_admin"], "+wan needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN), "),
        (["setpriv", "--bounding-set=-sys_admin"], "+wan needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN), "),
        (
            ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"],
            "+wan needs /dev/net/tun, which is not there: load the kernel module tun",
        ),
    ],
)
def test_what_a_machine_lacks_is_one_sentence(start: Start, modules: Path, head: list[str], sentence: str) -> None:
    process = start([*head, *local(modules, "+wan=lan")])
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and said.startswith(sentence) and said.count("\n") == 1, said


def test_what_cannot_be_is_refused_before_anything_starts(start: Start, modules: Path) -> None:
    for arguments, sentence in [
        (["+wan=lan", "elastic.lighthouse=http://127.0.0.1:9"], "elastic.lighthouse=http://127.0.0.1:9 is loopback"),
        (["wan.up=1mbit"], "wan.up=1mbit needs a WAN to change"),
    ]:
        said, _ = start(local(modules, *arguments)).communicate(timeout=60)
        assert said.startswith(sentence) and said.count("\n") == 1, said
