"""Which source a sample comes from: a function of its index alone, exact in integers. Pure.

Sources are the leaves of a Huffman tree over their weights. An inner node hands of its first n samples
round(n p / q) to its left side, where p / q is that side's share of the node's weight. So each source's samples are
numbered 0, 1, 2, … without a gap, and after n samples a source has its share of them to within 1.5: each level adds at
most 1/2, times the shares below it, and in a Huffman tree no inner node has more than 2/3 of its parent.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any


@dataclass(frozen=True)
class Node:
    share: Fraction
    """Of the left side."""
    left: Node | int
    right: Node | int

    def to_left(self, n: int) -> int:
        """Of the first n samples: rounded, half up."""
        return (2 * n * self.share.numerator + self.share.denominator) // (2 * self.share.denominator)


class Mixture:
    """Sources by weight."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """Raises ValueError unless all weights are 0 or more, and one is above."""
        if not any(weights) or min(weights) < 0:
            raise ValueError("weights are 0 or more, and at least one is above 0")
        self.shares = [weight / sum(weights) for weight in weights]
        self._root = _huffman(self.shares)

    def locate(self, i: int) -> tuple[int, int]:
        """(source, how many samples that source had before): of sample i >= 0."""
        node = self._root
        while isinstance(node, Node):
            before = node.to_left(i)
            left = node.to_left(i + 1) > before
            node, i = (node.left, before) if left else (node.right, i - before)
        return node, i

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples come from each source."""
        counts = [0] * len(self.shares)
        todo = [(self._root, n)]
        while todo:
            node, n = todo.pop()
            if isinstance(node, Node):
                left = node.to_left(n)
                todo += [(node.left, left), (node.right, n - left)]
            else:
                counts[node] = n
        return counts


def most(samples: int, share: Fraction) -> int:
    """How many of any `samples` samples in a row are of a source with this share, at most: 1.5 more at one end, less at the
    other."""
    return min(samples, floor(samples * share + 3)) if share else 0


def _huffman(shares: Sequence[Fraction]) -> Node | int:
    heap: list[tuple[Fraction, int, Node | int]] = [(share, s, s) for s, share in enumerate(shares) if share]
    heapq.heapify(heap)
    for order in range(len(shares), len(shares) + len(heap) - 1):  # ties go by age: no two are equal
        (small, _, left), (large, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (small + large, order, Node(small / (small + large), left, right)))
    return heap[0][2]


class Schedule:
    """A mixture whose weights change at given samples."""

    def __init__(self, phases: Sequence[tuple[int, Sequence[Fraction]]]) -> None:
        """phases: (first sample, weights), from sample 0 on and ascending. Raises ValueError."""
        self._starts = [start for start, _ in phases]
        if self._starts[0] != 0 or any(a >= b for a, b in zip(self._starts, self._starts[1:], strict=False)):
            raise ValueError("phases begin at 0 and ascend")
        self.mixtures = [Mixture(weights) for _, weights in phases]
        self._before = [[0] * len(phases[0][1])]
        for k, length in enumerate(b - a for a, b in zip(self._starts, self._starts[1:], strict=False)):
            self._before.append(_add(self._before[k], self.mixtures[k].counts(length)))

    def describe(self) -> list[Any]:
        """[first sample, shares] of each phase, as JSON: equal for equal schedules only."""
        pairs = zip(self._starts, self.mixtures, strict=True)
        return [[start, [str(share) for share in mixture.shares]] for start, mixture in pairs]

    @staticmethod
    def of(described: Sequence[Any]) -> Schedule:
        """The schedule that `describe` described."""
        return Schedule([(start, [Fraction(share) for share in shares]) for start, shares in described])

    def locate(self, i: int) -> tuple[int, int]:
        """As Mixture's; a source's samples go on over the phases."""
        k = bisect_right(self._starts, i) - 1
        source, j = self.mixtures[k].locate(i - self._starts[k])
        return source, self._before[k][source] + j

    def counts(self, n: int) -> list[int]:
        """As Mixture's."""
        k = max(bisect_right(self._starts, n) - 1, 0)
        return _add(self._before[k], self.mixtures[k].counts(n - self._starts[k]))


def _add(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
