"""A whole epoch while regions die, come, leave and are restarted: every sample is applied once, and the journal says by whom.

The steps behind every contribution are written down by the regions (tests/e2e/sampled.py), beside what the ledger says.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from diloco.fold import fold
from diloco.journal import main
from tests.e2e.cluster import SLOW_STEPS, Cluster, RegionProcess
from tests.e2e.sampled import contributions, lines
from tests.e2e.test_by_hand import entries, wait_for_rounds

SAMPLES, SEQ_LEN, HELDOUT = 640, 32, 16
SETTINGS = [
    "outer.sync_every=8",
    "outer.fragments=2",
    "elastic.max_local_steps=4",
    "elastic.lease_rounds=3",
    "run.rounds=null",
]
SETTINGS += ["run.epochs=1", "run.eval_every=0", "data=text", f"data.holdout={1 / HELDOUT}", SLOW_STEPS]


def start(cluster: Cluster, name: str, *overrides: str) -> RegionProcess:
    env, path = {"RECORD": str(cluster.directory / "record")}, f"data.path={cluster.directory}/text"
    return cluster.start(name, *SETTINGS, path, *overrides, module="tests.e2e.sampled", env=env)


def write_text(directory: Path) -> None:
    """Of exactly SAMPLES training windows."""
    windows = SAMPLES * HELDOUT // (HELDOUT - 1)
    text = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(windows))
    (directory / "text").write_text(text[: windows * SEQ_LEN + 1])


def mid_round(cluster: Cluster, region: str) -> bool:
    """The region's last contribution is in no round yet."""
    said = [line for line in lines(cluster.directory / "record", region) if isinstance(line, dict)]
    state = cluster.state()
    assert state is not None
    fragment, epoch, base = said[-1]["round"] if said else (0, 0, -1)
    return (state.epoch, state.fragments[fragment].base) == (epoch, base)


def applied(cluster: Cluster) -> list[tuple[dict[str, Any], str, list[int]]]:
    """(round, member, ids of the samples that the ledger counts as applied there)."""
    found, state = [], None
    for path in sorted((cluster.run / "store" / "journal").glob("*.json")):
        entry = json.loads(path.read_bytes())
        for answer in entry["answers"] if entry["kind"] == "round" else ():
            assert state is not None
            upto = dict(answer["leases"])
            leases = state.members[answer["member"]].leases
            ids = [i for lease in leases for i in range(lease.applied, upto.get(lease.id, lease.applied))]
            found.append((entry, answer["member"], ids))
        state = fold(state, path.read_bytes())
    return found


def check(cluster: Cluster, *regions: str) -> None:
    """What the ledger counts is what the contributions were made of, each sample once in a fragment."""
    record: dict[Any, list[int]] = {}
    for region in regions:
        record |= contributions(cluster.directory / "record", region)
    seen: list[Counter[int]] = [Counter(), Counter()]
    for entry, member, ids in applied(cluster):
        fragment = entry["fragment"]
        made_of = record[member, fragment, entry["epoch"], entry["base"]]
        assert sorted(ids) == sorted(i for i in made_of if not seen[0][i] + seen[1][i]), (entry["seq"], member)
        seen[fragment].update(made_of)
    assert all(max(counter.values()) == 1 for counter in seen), "work that counts twice"
    missing = set(range(SAMPLES)) - seen[0].keys() - seen[1].keys()
    assert not missing, f"never trained on: {sorted(missing)}"


def test_every_sample_of_an_epoch_counts_once(cluster: Cluster, capsys: Any) -> None:
    """asia is killed in the middle of a round and does not come back, mars joins, us leaves; then everything is killed at once
    and comes back from the store."""
    write_text(cluster.directory)
    eu, us, asia = (start(cluster, name, "elastic.start_regions=3") for name in ("eu", "us", "asia"))
    wait_for_rounds(cluster, ["asia", "eu", "us"], 2)
    cluster.kill_when(lambda: mid_round(cluster, "asia"), asia)
    mars = start(cluster, "mars")
    wait_for_rounds(cluster, ["eu", "mars", "us"], 2)
    us.signal(signal.SIGTERM)
    assert us.wait(60) == 0, us.text()
    wait_for_rounds(cluster, ["eu", "mars"], 2)
    state = cluster.state()
    assert state is not None and state.settled < SAMPLES / 2, "the restart has an epoch to finish"
    cluster.kill_when(lambda: cluster.inner_states_saved("eu", "mars"), eu, mars)
    again = [start(cluster, name) for name in ("eu", "mars")]
    cluster.finish()
    assert all("from checkpoint checkpoints/" in region.text() for region in again[:1]), again[0].text()

    state = cluster.state()
    assert state is not None and state.stopped == f"run.epochs reached: {SAMPLES:,} samples"
    assert state.settled >= SAMPLES and not entries(cluster, "rewind")
    check(cluster, "eu", "us", "asia", "mars")
    assert main(["tokens", str(cluster.run)]) == 0
    *rows, last = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    numbers = [int(n.replace(",", "")) for n in last[2:]]
    assert numbers[-1] == sum(numbers[:-1]) == state.ledger.handed * SEQ_LEN and numbers[0] == state.tokens
    assert [row[:2] for row in rows] == [[name, "data"] for name in ("asia", "eu", "mars", "us")], rows
