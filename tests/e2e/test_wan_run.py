"""A run whose regions are in namespaces of their own, started as a person would start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ckpt.store import Store
from diloco.journal import Journal
from tests.e2e.cluster import SMALL
from tests.test_wan import needs_root

ROOT = Path(__file__).resolve().parents[2]


@needs_root
def test_two_regions_train_over_a_wan(tmp_path: Path) -> None:
    regions = "regions=[{name: eu, nproc: 2}, us]"
    settings = [regions, "+wan=lan", "wan.rtt=20ms", f"run.dir={tmp_path}/run", "outer.sync_every=8", "run.rounds=2"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", *settings, *SMALL],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    said = done.stdout
    assert done.returncode == 0 and "Traceback" not in said and not re.search(r"\[W\d{4} ", said), said
    assert re.search(r"^rounds +2 by eu, us$", said, re.MULTILINE), said
    assert re.search(r"^digests +equal in every round that two or more regions have seen", said, re.MULTILINE), said
    addresses = dict(re.findall(r"^wan +\| (eu|us) (10\.[0-9.]+): up 1000 Mbit/s", said, re.MULTILINE))
    hub = re.search(r"^wan +\| hub (10\.[0-9.]+):", said, re.MULTILINE)
    assert hub and f"| http://{hub[1]}:" in said, "the lighthouse listens where all regions reach it"

    journal = Journal(Store(f"{tmp_path}/run/store"))
    journal.read()
    assert journal.state is not None
    hosts = {m.region: {e.rpartition(":")[0] for e in m.endpoints} for m in journal.state.members.values()}
    assert hosts == {name: {address} for name, address in addresses.items()}
    assert not (tmp_path / "run" / "wan.json").exists()
