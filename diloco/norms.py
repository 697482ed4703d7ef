"""The norm rule: which contributions of a round get no weight, because they would throw the others off. Pure.

All members decide by the fold and the answers alone, so they decide alike. Norms are compared inside one fragment, which its
own rounds alone change: whatever else is committed between an attempt and its round, the limit is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

WINDOW = 32
"""Contributions of a fragment that its median is of."""
ENOUGH = 4
"""Of them, before anybody is judged."""
STRIKES = 3
"""Rejections in a row after which a region is expelled."""

Norms = tuple[tuple[float, float], ...]
"""(norm per inner step, norm) of a fragment's last contributions that had weight, oldest first."""


def per_step(answer: Mapping[str, Any], most: int) -> float:
    """Norm of a contribution per inner step. most: steps that a member can have taken at all, whatever it says."""
    return _norm(answer) / max(min(answer.get("steps", 1), most), 1)


def _norm(answer: Mapping[str, Any]) -> float:
    return float(answer.get("norm", 0.0))


def rejected(norms: Norms, answers: Sequence[Mapping[str, Any]], ratio: float, most: int) -> frozenset[str]:
    """Members whose contributions get no weight: not finite (norm None), or more than `ratio` x the median per inner step,
    and larger than the median one as a whole (one step after a restart is large for a step, and harms nobody).

    If nobody else were left, the ones that are merely large count: the run itself has changed then, and must go on.
    """
    broken = {a["member"] for a in answers if a.get("norm", 0.0) is None}
    if not ratio or len(norms) < ENOUGH:
        return frozenset(broken)
    step, whole = (median_low(values) for values in zip(*norms, strict=True))
    judged = [a for a in answers if a["tokens"] > 0 and a["member"] not in broken]
    large = {a["member"] for a in judged if per_step(a, most) > ratio * step and _norm(a) > whole}
    return frozenset(broken | large if len(large) < len(judged) else broken)


def extended(norms: Norms, answers: Sequence[Mapping[str, Any]], out: frozenset[str], most: int) -> Norms:
    """After a round with these answers, of which those of `out` had no weight. Zeros, as of a learning rate that only begins
    to warm up, say nothing about the ones to come."""
    used = [a for a in answers if a["tokens"] > 0 and a["member"] not in out and _norm(a) > 0]
    new = [(per_step(a, most), _norm(a)) for a in used]
    return (*norms, *new)[-WINDOW:]
