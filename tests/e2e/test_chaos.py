"""Some minutes of tests.bench.chaos, and a third of a large run that is killed at one instant."""

from __future__ import annotations

import json
import time
from itertools import takewhile
from pathlib import Path

from tests.bench.chaos import chaos, faults_of
from tests.chaos.schedule import FREEZE, HELD, Fault
from tests.chaos.watch import Watch
from tests.e2e.cluster import Cluster, kill
from tests.test_wan import needs_root

MINUTES, SEED, GAP, REGIONS = 3.0, 27, 5.0, 4
"""With the start and the end, about three and a half minutes on two cores; a schedule with every kind of fault and moment."""


@needs_root
def test_nothing_that_is_done_to_a_run_harms_it(tmp_path: Path) -> None:
    drill = chaos(tmp_path, MINUTES, faults_of(MINUTES, SEED, REGIONS, GAP), REGIONS, ranks=1)
    log = (tmp_path / "chaos.log").read_text()
    assert drill.violations == [], log
    assert drill.tally.all >= 15 and drill.tally.restarts >= 5, log
    assert len(drill.watch.checker.rounds) >= drill.tally.all, "a commit between faults, on average"


@needs_root
def test_a_broken_commit_rule_is_found(tmp_path: Path) -> None:
    """The member that is to append sleeps between the result and the entry; the others append, and it writes over it."""
    faults = [Fault(3.0 + 12.0 * i, FREEZE, ("a",), HELD, 7.0, after=0.3) for i in range(4)]
    drill = chaos(tmp_path, 1.0, faults, regions=3, ranks=1, module="tests.chaos.overwriting")
    found = " ".join(drill.violations)  # whichever entry is looked at first
    assert "is another one than before" in found or "does not follow" in found, (tmp_path / "chaos.log").read_text()


def test_a_third_of_the_regions_is_killed_at_one_instant(cluster: Cluster) -> None:
    """12 regions, 4 killed: the other 8 commit the next rounds as they are, and lose no inner step."""
    settings = ["outer.sync_every=10", "run.rounds=1000000", "ckpt.every=100", "run.eval_every=1000"]
    settings += ["elastic.start_regions=12"]
    regions = [cluster.start(f"r{i:02}", *settings) for i in range(12)]
    names, gone = {region.name for region in regions}, regions[1::3]
    killed = {region.name for region in gone}
    left = names - killed
    watch = Watch(cluster.run)

    def rounds(since: int = 0) -> list[set[str]]:
        """The regions of each round, from entry `since` on."""
        watch.look()
        entries = [entry for entry in map(json.loads, watch.entries[since:]) if entry["kind"] == "round"]
        return [{answer["member"].rpartition("_")[0] for answer in entry["answers"]} for entry in entries]

    cluster.until(lambda: rounds().count(names) >= 2, 280)
    head = len(watch.entries)  # all of them are older than the kill
    kill(*gone)
    died = time.monotonic()
    cluster.until(lambda: any(not found & killed for found in rounds(head)), 120)
    seconds = time.monotonic() - died
    cluster.until(lambda: rounds(head).count(left) >= 3, 120)
    after = rounds(head)
    late = list(takewhile(lambda found: found & killed, after))
    assert len(late) <= 1 and all(found >= left for found in late), "only what was under way, and with all others"
    assert all(found == left for found in after[len(late) :]), f"not the next round of all 8: {after}"
    assert {json.loads(data)["kind"] for data in watch.entries[head:]} == {"round"}, "nobody had to join again"
    survivors = [region for region in regions if region not in gone]
    assert all(region.process.poll() is None for region in survivors)
    assert watch.checker.violations == [] and watch.checker.compared > 0 and watch.checker.steps_checked > 0
    print(f"8 of 12 regions committed {seconds:.1f} s after 4 were killed")
