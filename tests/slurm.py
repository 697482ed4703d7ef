"""A Slurm cluster of one node on this machine, for tests: Debian's slurmctld, slurmd and slurm-client."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.ports import free_ports

SECONDS = 60.0
"""A daemon may take to start, or a job to end."""
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
FirstJobId={first}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=main Nodes={host} Default=YES OverSubscribe=FORCE:4
"""


class Slurm:
    """Its commands find it by SLURM_CONF in `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, list[subprocess.Popen[bytes]]()
        config = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(config)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        controller, node = free_ports(2)
        host = socket.gethostname().partition(".")[0]
        cpus = len(os.sched_getaffinity(0))
        first = controller  # of job ids, by which torchrun's agents find each other: not those of another cluster here
        values = {"host": host, "controller": controller, "node": node, "folder": folder, "cpus": cpus, "first": first}
        config.write_text(CONFIG.format(**values))
        (folder / "state").mkdir()
        (folder / "spool").mkdir()

    def start(self) -> None:
        """Returns once jobs can be submitted; AssertionError with what the daemons said if that is not to be."""
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
            with (self.folder / f"{command[0]}.log").open("wb") as log:
                self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        self.until(lambda: "idle" in self.command("sinfo", "--noheader", "--format=%T", check=False))

    def command(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout

    def jobs(self) -> list[str]:
        """Names of all that are not over."""
        return self.command("squeue", "--noheader", "--format=%j").split()

    def until(self, what: Callable[[], object], seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline and all(d.poll() is None for d in self.daemons), self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """Ends all jobs, and then the daemons."""
        try:
            for name in self.jobs() if self.daemons else ():
                self.command("scancel", f"--name={name}", "--full", "--signal=KILL", check=False)
                self.command("scancel", f"--name={name}", check=False)  # if it has not started
            self.until(lambda: not self.daemons or not self.jobs())
        finally:
            for daemon in self.daemons:
                daemon.terminate()
            for daemon in self.daemons:
                with suppress(subprocess.TimeoutExpired):
                    daemon.wait(10)
                daemon.kill()
                daemon.wait()


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("slurmctld", "slurmd", "sbatch")):
        pytest.skip("no Slurm daemons, or not root to run them: apt-get install slurmctld slurmd slurm-client")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
