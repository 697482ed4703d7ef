"""A mixture of prepared folders whose weights change, in a real run: what the journal says each source gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diloco.journal import main
from tests.corpora import write_folder
from tests.e2e.cluster import Cluster

BATCH, SEQ_LEN, STEPS, ROUNDS, PHASE = 4, 32, 4, 3, 24
"""The weights change after PHASE samples, in the middle of the second round."""


def sources(directory: Path) -> str:
    """web, and books of which some is held out and longer in bytes."""
    letters = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 400, dtype="u1")
    web = write_folder(directory / "web", {"train": [letters[:9000]]}, 256, 2)
    books = write_folder(directory / "books", {"train": [letters[9000:]], "heldout": [letters[:3000]]}, 256, 5)
    return f"data.sources=[{{name: web, weight: 3, path: {web}}}, {{name: books, weight: 1, path: {books}}}]"


def test_the_journal_knows_what_each_source_gave(cluster: Cluster, capsys: Any) -> None:
    phases = f"data.phases=[{{tokens: {PHASE * SEQ_LEN}, weights: [0, 1]}}]"
    settings = [f"outer.sync_every={STEPS}", f"run.rounds={ROUNDS}", "data=mixture", sources(cluster.directory), phases]
    eu = cluster.start("eu", *settings)
    cluster.finish()
    assert "75 %" in eu.text(), eu.text()
    assert main(["tokens", str(cluster.run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    applied = {row[1]: int(row[2].replace(",", "")) for row in rows if row[0] == "eu"}
    samples = BATCH * STEPS * ROUNDS
    assert applied == {"web": 18 * SEQ_LEN, "books": (samples - 18) * SEQ_LEN}, rows
    numbers = [[int(n.replace(",", "")) for n in row[-7:]] for row in rows]
    assert all(sum(row[:-1]) == row[-1] for row in numbers) and numbers[-1][0] == samples * SEQ_LEN
    state = cluster.state()
    assert state is not None and state.fingerprint["mixture"]["names"] == ["web", "books"]
    assert numbers[-1][-1] == state.ledger.handed * SEQ_LEN
    last = cluster.records("eu", "eval")[-1]
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / np.log(2) / 5), "of books, as web holds nothing out"
