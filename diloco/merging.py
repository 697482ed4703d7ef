"""What a region contributes to a round and how a committed one changes its local parameters. Pure.

x: local parameters, theta: the global ones, s: the snapshot that the contribution was made of; all fp32, this rank's slice.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from torch import Tensor

from diloco.averaging import Contribution
from diloco.clock import Stamp


@dataclass(frozen=True)
class Snapshot:
    """What this region put into a round that is not decided yet."""

    key: tuple[int, int, int]
    """(epoch, fragment, base)"""
    flat: Tensor
    """s"""
    contribution: Contribution
    stamp: Stamp
    claims: list[list[int]] = field(default_factory=list)
    """What the answer said of the samples behind it: [[lease id, used up to]]."""

    def restarted(self, theta: Tensor) -> Snapshot:
        """After a reset of the local parameters to theta: the contribution stands, and what the region does from now on
        counts from theta."""
        residual = self.contribution.residual
        self.contribution.residual = None if residual is None else residual.clone()  # the plane is zeroed, and stays so
        return Snapshot(self.key, theta.clone(), self.contribution, replace(self.stamp, steps=0, tokens=0), self.claims)


def progress(x: Tensor, since: Tensor) -> Tensor:
    """p = x - since, in place of x: what a region did since its snapshot, or since its base (theta before the round) if
    its contribution was not used."""
    return x.sub_(since)


def rebase(theta: Tensor, progress: Tensor) -> Tensor:
    """x <- theta' + p, in place of p: what the region did meanwhile is neither lost nor counted twice."""
    return progress.add_(theta)


def mix(x: Tensor, theta: Tensor, alpha: float) -> Tensor:
    """x <- alpha x + (1 - alpha) theta', in place of x (Streaming DiLoCo, arXiv 2501.18512, section 2.3)."""
    return x.mul_(alpha).add_(theta.mul(1 - alpha))


def rounding_seed(seed: int, fragment: int, number: int, region: str) -> int:
    """Of stochastic rounding, from 0 to 2**63 - 1: another one for every round and region, the same after a restart.
    number: the fragment's rounds before this one."""
    name = f"{seed} {fragment} {number} {region}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
