"""What the doctor looks at on its own machine, in the store and at the lighthouse: each check returns what it found."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cryptography import x509

from ckpt.store import Store, StoreError
from diloco.config import Config, build_module, build_security, store_url
from diloco.errors import ConfigError
from elastic.security import Security

OK, WARN, FAIL = "ok", "warn", "fail"
PACKAGES = ("torch", "torchft", "fsspec", "s3fs")
SLOW = 0.8
"""A device with less than this share of what others of its kind reach is slow."""
SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied."""
SECONDS = 0.5
EXPIRING, DAY = 14, 86400
"""Days before a certificate ends at which that is worth a warning."""
SKEW = (1.0, 300.0)
"""Seconds by which clocks may differ without a word; and at all, for S3 refuses what is signed at another time."""
OBJECTS, OBJECT = 4, 4 << 20
"""Objects, and bytes of each, that measure the store's rate."""
SHARED = 64 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    state: str
    found: str
    remedy: str = ""
    """What to do, unless the state is ok."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The numbers, for --json."""


def software() -> Finding:
    values = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return Finding("software", OK, ", ".join(f"{name} {value}" for name, value in values.items()), values=values)


def devices(cfg: Config) -> list[torch.device]:
    wanted = cfg.parallel.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def kind(device: torch.device) -> str:
    """Which devices should be equally fast."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu with {torch.get_num_threads()} threads"
    )


def matmul(device: torch.device, dtype: str) -> float:
    """FLOP/s that a product of two matrices reaches, the best of some."""
    n = SIZE[device.type]
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    best, until = 0.0, time.monotonic() + SECONDS
    a @ a
    while time.monotonic() < until:
        _wait(device)
        begin = time.perf_counter()
        a @ a
        _wait(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slow(here: str, rates: Sequence[Mapping[str, Any]]) -> Finding:
    """rates: {where, device, kind, flops} of all devices that are known; `here` is this machine's `where`. A device is compared
    with the median of its kind."""
    mine = [rate for rate in rates if rate["where"] == here]
    if not mine:
        return Finding("devices", FAIL, "no GPU is seen", "set parallel.device=cpu, or mend the driver (nvidia-smi)")
    found = ", ".join(f"{r['device']} {r['flops'] / 1e12:.2f} TFLOP/s" for r in mine)
    late = []
    for rate in rates:
        usual = statistics.median_high(
            [r["flops"] for r in rates if r["kind"] == rate["kind"]]
        )  # of two, the faster one
        if rate["flops"] < SLOW * usual:
            late.append(f"{rate['where']} {rate['device']} at {rate['flops'] / usual:.0%} of the usual")
    values = {"devices": mine, "slow": late}
    if late:
        remedy = "look there for heat, power limits and other processes: all wait for the slowest"
        return Finding("devices", WARN, f"{found}; slow: {', '.join(late)}", remedy, values)
    return Finding("devices", OK, f"{mine[0]['kind']}: {found}", values=values)


def disk(cfg: Config) -> Finding:
    """For run.dir, and for the checkpoints if the store is a directory in it."""
    path = Path(cfg.run.dir).absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    count = 0
    with suppress(ConfigError, RuntimeError), torch.device("meta"):  # what is wrong with it is for `validate` to say
        count = sum(p.numel() for p in build_module(cfg, 1).parameters())
    need = GIB if "://" in store_url(cfg) else GIB + (cfg.ckpt.keep + 1) * 16 * count  # θ, momentum and AdamW's moments
    found, values = f"{free / GIB:.0f} GiB free for run.dir={cfg.run.dir}", {"free": free, "needed": need}
    if free < need:
        return Finding(
            "disk", FAIL, found, f"set run.dir to a place with {need / GIB:.0f} GiB, or lower ckpt.keep", values
        )
    return Finding("disk", OK, found, values=values)


def shared_memory() -> Finding:
    """NCCL's and torch's own, /dev/shm; ours is in anonymous files."""
    if not Path("/dev/shm").is_dir():
        return Finding("shared memory", FAIL, "there is no /dev/shm", "mount one: in a container, --shm-size=8g")
    free = shutil.disk_usage("/dev/shm").free
    found, values = f"{free / GIB:.2f} GiB free in /dev/shm", {"free": free}
    if free <= SHARED:
        return Finding(
            "shared memory", WARN, found, "give the container more, such as --shm-size=8g: NCCL needs it", values
        )
    return Finding("shared memory", OK, found, values=values)


def proofs(cfg: Config) -> tuple[Finding, Security | None]:
    """Certificates, or the run secret."""
    try:
        security = build_security(cfg)
    except ConfigError as error:
        sentence, _, remedy = str(error).rpartition(": ")
        return Finding("proofs", FAIL, sentence, remedy), None
    if not security.tls:
        return Finding("proofs", OK, "the run secret" if security.secret_from else "none, all on loopback"), security
    certificate = x509.load_pem_x509_certificate(Path(security.certificate).read_bytes())
    left = (certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds() / DAY
    found, values = f"the certificate of {cfg.region.name} is valid for {left:.0f} days", {"days": left}
    if left < EXPIRING:
        return Finding("proofs", WARN, found, "make a new one with python -m launch.certs", values), security
    return Finding("proofs", OK, found, values=values), security


def store_findings(store: Store) -> list[Finding]:
    """Credentials, conditional PUT, clock and rate. What fails keeps the rest from being looked at."""
    found = []
    for check in (_conditional, _store_clock, _store_rate):
        try:
            found.append(check(store))
        except StoreError as error:
            remedy = "set run.store to a bucket or directory of yours, and the credentials (AWS_ACCESS_KEY_ID and so on) for it"
            return [*found, Finding("store", FAIL, str(error), remedy)]
    return found


def _conditional(store: Store) -> Finding:
    store.write("probe/doctor", b"")  # who may not write at all is told so, and not that creations are not refused
    store.delete("probe/doctor")
    try:
        store.prove()
    except StoreError as error:
        sentence, _, remedy = str(error).rpartition(": ")
        return Finding("store", FAIL, sentence, remedy)
    return Finding("store", OK, f"{store.url} refuses to create an object twice")


def _store_clock(store: Store) -> Finding:
    begin = time.time()
    theirs = store.clock()
    mine = (begin + time.time()) / 2
    return clock("the store's", theirs - mine)


def clock(whose: str, ahead: float) -> Finding:
    """ahead: s."""
    found, values = f"{whose} clock is {abs(ahead):.2f} s {'ahead' if ahead > 0 else 'behind'}", {"ahead": ahead}
    remedy = "set this machine's clock by NTP, and theirs: certificates and S3 signatures go by it"
    rounded = SKEW[0] + 1.0  # stores tell whole seconds
    state = FAIL if abs(ahead) > SKEW[1] else WARN if abs(ahead) > rounded else OK
    return Finding("clock", state, found, "" if state == OK else remedy, values)


def _store_rate(store: Store) -> Finding:
    keys = [f"probe/doctor-{os.getpid()}-{index}" for index in range(OBJECTS)]
    data = os.urandom(OBJECT)
    try:
        with ThreadPoolExecutor(OBJECTS) as pool:
            up = _rate(lambda: list(pool.map(lambda key: store.write(key, data), keys)))
            down = _rate(lambda: list(pool.map(store.read, keys)))
    finally:
        for key in keys:
            store.delete(key)
    values = {"up": up, "down": down}
    return Finding("store rate", OK, f"{up / 1e6:.0f} MB/s up, {down / 1e6:.0f} MB/s down", values=values)


def _rate(move: Callable[[], object]) -> float:
    begin = time.monotonic()
    move()
    return OBJECTS * OBJECT / (time.monotonic() - begin)
