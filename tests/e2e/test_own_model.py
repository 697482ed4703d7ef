"""Model, loss and data source of the user's own, by dotted path, in two regions of unlike shape."""

from __future__ import annotations

from tests.e2e.cluster import SHORT, Cluster

OWN = [
    "model=own",
    "model.target=tests.e2e.own_model.Gru",
    "+model.args={vocab: 10, dim: 32, layers: 2}",
    "model.loss=tests.e2e.own_model.smooth_loss",
    "+model.loss_args={smoothing: 0.05}",
    "data.source=tests.e2e.own_model.Counting",
    "+data.args={digits: 4}",
    "outer.fragments=2",
    "outer.sync_every=20",
    "run.rounds=12",
    "run.eval_every=4",
    "elastic.start_regions=2",
    "inner.lr=0.01",
]


def test_a_gru_learns_to_count(cluster: Cluster) -> None:
    cluster.start("eu", *OWN, nproc=2, base=SHORT)
    cluster.start("us", *OWN, base=SHORT)
    cluster.finish()
    digests = {name: [r["digest"] for r in cluster.records(name, "round")] for name in ("eu", "us")}
    assert len(digests["eu"]) == 12 and digests["us"] == digests["eu"]
    assert all(len(r["members"]) == 2 for r in cluster.records("eu", "round"))
    held_out = [r["loss"] for r in cluster.records("us", "eval")]
    assert held_out[-1] < held_out[0] < 2.4, held_out
    state = cluster.state()
    assert state is not None and state.fingerprint["model"].startswith("tests.e2e.own_model.Gru:")
