"""A region whose contribution was rejected: what it has in flight stands, byte for byte."""

from __future__ import annotations

import torch

from diloco.averaging import Averaging
from diloco.clock import Stamp
from diloco.codec import CODECS
from diloco.fragments import Fragment, Slot
from diloco.merging import Snapshot, progress, rebase


def test_a_snapshot_in_flight_outlives_a_reset() -> None:
    torch.manual_seed(0)
    fragment = Fragment(0, (Slot("w", (200,), 0),), block=64)
    theta, flat, residual = torch.randn(200), torch.randn(200), torch.randn(200)
    averaging = Averaging([fragment], CODECS["int8"])

    def snapshot(plane: torch.Tensor) -> Snapshot:
        contribution = averaging.contribution(0, 0, fragment.blocks, theta, flat, plane)
        return Snapshot((0, 0, 3), flat, contribution, Stamp(40, 8, 16, 512), [[5, 60]])

    sent = snapshot(residual.clone()).contribution.read(0, fragment.blocks)
    before = snapshot(residual)
    after = before.restarted(theta)
    residual.zero_()  # as the reset does with the plane
    assert torch.equal(after.contribution.read(0, fragment.blocks), sent), "a retry sends the same bytes"
    after.contribution.update_residual()
    assert not residual.any(), "what compression leaves out of it is gone with the rest"
    assert (after.key, after.claims) == ((0, 0, 3), [[5, 60]])
    assert after.stamp == Stamp(40, 8, 0, 0), "its steps are not this region's any more"
    # The merge: what was done since the reset, on top of the new theta.
    new, done = torch.randn(200), torch.randn(200)
    merged = rebase(new, progress(theta + done, after.flat))
    torch.testing.assert_close(merged, new + done)
    theta.add_(1)
    assert not torch.equal(after.flat, theta), "a copy: theta moves on"
