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
from diloco.reading import SOURCE
from tests.e2e.cluster import SLOW_STEPS, Cluster, RegionProcess
from tests.e2e.sampled import contributions, lines
from tests.e2e.test_by_hand import entries, wait_for_rounds

SAMPLES, SEQ_LEN, HELDOUT = 960, 32, 16
SETTINGS = [
    "outer.sync_every=8",
    "outer.fragments=2",
    "elastic.max_local_steps=4",
    "elastic.lease_rounds=3",
    "run.rounds=null",
]
SETTINGS += ["run.epochs=1", "run.eval_every=0", "data=text", f"data.holdout={1 / HELDOUT}"]


Sample = tuple[str, int]
"""(source, index)."""
OWN = "region.sources=[{name: own, weight: 0.25, path: %s/own}]"


def start(cluster: Cluster, name: str, *overrides: str) -> RegionProcess:
    env, path = {"RECORD": str(cluster.directory / "record")}, f"data.path={cluster.directory}/text"
    return cluster.start(name, *SETTINGS, path, *overrides, module="tests.e2e.sampled", env=env)


def write_text(directory: Path) -> None:
    """`data`, of exactly SAMPLES training windows; and what only eu has."""
    windows = SAMPLES * HELDOUT // (HELDOUT - 1)
    text = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(windows))
    (directory / "text").write_text(text[: windows * SEQ_LEN + 1])
    (directory / "own").write_text("Ten green bottles hanging on the wall.\n" * 600)


def mid_round(cluster: Cluster, region: str) -> bool:
    """The region's last contribution is in no round yet."""
    said = [line for line in lines(cluster.directory / "record", region) if isinstance(line, dict)]
    state = cluster.state()
    assert state is not None
    fragment, epoch, base = said[-1]["round"] if said else (0, 0, -1)
    return (state.epoch, state.fragments[fragment].base) == (epoch, base)


def applied(cluster: Cluster) -> list[tuple[dict[str, Any], str, list[Sample]]]:
    """(round, member, the samples that the ledger counts as applied there)."""
    found, state = [], None
    for path in sorted((cluster.run / "store" / "journal").glob("*.json")):
        entry = json.loads(path.read_bytes())
        for answer in entry["answers"] if entry["kind"] == "round" else ():
            assert state is not None
            upto = dict(answer["leases"])
            leases = state.members[answer["member"]].leases
            samples = [(x.source, i) for x in leases for i in range(x.applied, upto.get(x.id, x.applied))]
            found.append((entry, answer["member"], samples))
        state = fold(state, path.read_bytes())
    return found


def check(cluster: Cluster, *regions: str) -> None:
    """What the ledger counts is what the contributions were made of, each sample once in a fragment."""
    record: dict[Any, list[Sample]] = {}
    for region in regions:
        for key, ids in contributions(cluster.directory / "record", region).items():
            record[key] = [(f"{region}/own" if i >= SOURCE else "", i % SOURCE) for i in ids]
    seen: list[Counter[Sample]] = [Counter(), Counter()]
    for entry, member, samples in applied(cluster):
        fragment = entry["fragment"]
        made_of = record[member, fragment, entry["epoch"], entry["base"]]
        assert sorted(samples) == sorted(x for x in made_of if not seen[0][x] + seen[1][x]), (entry["seq"], member)
        seen[fragment].update(made_of)
    assert all(max(counter.values()) == 1 for counter in seen), "work that counts twice"
    everything = seen[0].keys() | seen[1].keys()
    missing = [i for i in range(SAMPLES) if ("", i) not in everything]
    assert not missing, f"never trained on: {missing}"
    own = sorted(i for source, i in everything if source)
    assert own == list(range(len(own))) and len(own) > 20, "eu's own are used in their order, without a gap"


def test_every_sample_of_an_epoch_counts_once(cluster: Cluster, capsys: Any) -> None:
    """asia is killed in the middle of a round and does not come back, mars joins, us leaves; then everything is killed at once
    and comes back from the store."""
    write_text(cluster.directory)
    own = OWN % cluster.directory
    eu = start(cluster, "eu", SLOW_STEPS, "elastic.start_regions=3", own)
    us, asia = (start(cluster, name, SLOW_STEPS, "elastic.start_regions=3") for name in ("us", "asia"))
    wait_for_rounds(cluster, ["asia", "eu", "us"], 2)
    cluster.kill_when(lambda: mid_round(cluster, "asia"), asia)
    assert main(["pause", str(cluster.run)]) == 0, "lest the epoch is over before mars is there"
    mars = start(cluster, "mars", SLOW_STEPS)
    cluster.until(lambda: len(entries(cluster, "join")) == 4)
    assert main(["resume", str(cluster.run)]) == 0
    wait_for_rounds(cluster, ["eu", "mars", "us"], 2)
    us.signal(signal.SIGTERM)
    assert us.wait(60) == 0, us.text()
    wait_for_rounds(cluster, ["eu", "mars"], 2)
    state = cluster.state()
    assert state is not None and state.ledger.applied < SAMPLES * 0.7, "what is restarted has something to do"
    cluster.kill_when(lambda: cluster.inner_states_saved("eu", "mars"), eu, mars)
    again = [start(cluster, "eu", own), start(cluster, "mars")]
    cluster.finish()
    assert any("from checkpoint checkpoints/" in region.text() for region in again), again[0].text()

    state = cluster.state()
    assert state is not None and state.stopped == f"run.epochs reached: {SAMPLES:,} samples"
    assert state.settled >= SAMPLES and not entries(cluster, "rewind")
    check(cluster, "eu", "us", "asia", "mars")
    capsys.readouterr()
    assert main(["tokens", str(cluster.run)]) == 0
    *rows, last = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    numbers = [int(n.replace(",", "")) for n in last[2:]]
    assert numbers[-1] == sum(numbers[:-1]) == state.ledger.handed * SEQ_LEN and numbers[0] == state.tokens
    places = [["asia", "data"], ["eu", "data"], ["eu", "eu/own"], ["mars", "data"], ["us", "data"]]
    assert [row[:2] for row in rows[:-2]] == places, rows
