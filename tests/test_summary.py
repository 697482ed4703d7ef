"""The summary of a run, from a real journal and real metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckpt.store import Store
from diloco.fold import PROTOCOL
from diloco.journal import Journal
from diloco.metrics import EvalRecord, Metrics, RoundRecord, RunRecord, StepRecord
from launch.summary import describe, main, read_summary

PARAMETERS, STEPS, SENT = 1_000_000, 8, 1_000_100
SETTINGS = {
    "sync_every": 4, "lr": 0.7, "momentum": 0.9, "boundary": "steps", "rounds": 2, "tokens": None,
    "seq_len": 16, "seed": 0, "ahead": 8, "lease_rounds": 4, "start_regions": 2,
}  # fmt: skip
RUN = RunRecord("eu", "eu_1", 1, 1, PARAMETERS, 1, 4, "int8", 32, 1.0)
STEP = StepRecord(1, STEPS, 0.1, 5.0, 7.2, 1e-3, 1.0, 1e3, 10**8)
ROUND = RoundRecord(3, 1, 2, 0, 1, ("eu_1", "us_2"), 256, 4, SENT, SENT, 0.1, 0.0, 1.0, "a" * 64)


def write_run(run_dir: Path, us_digest: str = "b" * 64) -> None:
    """Two regions, two rounds of four steps, a restart of us that reports its first round again."""
    store = Store(str(run_dir / "store"))
    journal = Journal(store)

    def append(**entry: object) -> None:
        assert journal.append(entry) and journal.read()

    append(kind="open", protocol=PROTOCOL, run="r1", settings=SETTINGS, fingerprint={"fragments": 1},
           checkpoint="checkpoints/0")  # fmt: skip
    for member in ("eu_1", "us_2"):
        append(kind="join", member=member, region=member[:2], endpoints=["h:1"], data=["h:2"], samples_per_step=2)
    for base in (0, 3):
        assert journal.state
        leases = {name: member.leases[0] for name, member in journal.state.members.items()}
        answers = [
            {"member": name, "tokens": 128, "leases": [[lease.id, lease.applied + 8]]} for name, lease in leases.items()
        ]
        append(kind="round", epoch=0, fragment=0, base=base, head=0, answers=answers, digest="d")
    append(kind="stop", reason="run.rounds=2 reached")
    for n in (0, 2, 10):
        store.write(f"checkpoints/{n}/manifest.json", b"{}")
    store.write("checkpoints/11/shard", b"not whole")
    for region, last in (("eu", "b" * 64), ("us", us_digest)):
        with Metrics(run_dir / region / "metrics.jsonl") as metrics:
            metrics.record(replace(RUN, region=region))
            metrics.record(STEP)
            metrics.record(ROUND)
            if region == "us":
                metrics.record(ROUND)
            metrics.record(replace(STEP, step=STEPS, loss=3.0 if region == "eu" else 4.0, bits_per_byte=4.5))
            metrics.record(replace(ROUND, seq=4, round=2, step=STEPS, digest=last))
            metrics.record(EvalRecord(2, 3.25, 4.69, 25.8, 100, 1.0))
            metrics.record(EvalRecord(2, 2.0, 2.9, 7.39, 100, 1.0, "books"))


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    found = read_summary(tmp_path)
    assert found and (found.rounds, found.tokens, found.regions) == (2, 512, ("eu", "us"))
    assert found.sent == 4 * SENT and found.data_parallel == 2 * (1 / 2) * 4 * PARAMETERS * STEPS * 2
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run            r1: run.rounds=2 reached",
        "rounds         2 by eu, us",
        "tokens         512",
        "training loss  5.0000 → 3.5000 nats/token (7.200 → 4.500 bits/byte, perplexity 148.4 → 33.12)",
        "held-out loss  3.2500 → 3.2500 nats/token (4.690 → 4.690 bits/byte, perplexity 25.79 → 25.79)",
        "books loss     2.0000 → 2.0000 nats/token (2.900 → 2.900 bits/byte, perplexity 7.389 → 7.389)",
        "sent           4.00 MB by all regions; data parallel would have sent 64.0 MB, 16 times as much",
        "digests        equal in every round that two or more regions have seen (2); the last is bbbbbbbbbbbb",
        f"checkpoint     {tmp_path}/store/checkpoints/10",
        f"metrics        {tmp_path}/eu/metrics.jsonl",
        f"metrics        {tmp_path}/us/metrics.jsonl",
    ]


def test_regions_that_differ_are_shouted_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, us_digest="c" * 64)
    assert main([str(tmp_path)]) == 1
    assert "digests        DIFFER between regions after journal entries 4: this is a bug" in capsys.readouterr().out


def test_a_run_of_one_region_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "us" / "metrics.jsonl").unlink()
    found = read_summary(tmp_path)
    assert found and "one region has nobody to send to" in describe(found) and "(no round was seen" in describe(found)
    assert main([str(tmp_path / "nowhere")]) == 0 and "no run in" in capsys.readouterr().out
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_journal_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "store" / "journal" / "0000000002.json").write_text("{}")
    assert main([str(tmp_path)]) == 1
    assert "journal" in capsys.readouterr().err
