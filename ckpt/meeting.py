"""Where the uploaders of a checkpoint meet: the store. Each puts its parts there and looks for the others'; then any commits."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ckpt.checkpoint import MANIFEST, commit_manifest
from ckpt.format import FormatError
from ckpt.parts import FOLDER, Attempt, Part, Settlement, decode_part, settle, skipped_key, to_hex
from ckpt.retention import TOMBSTONE
from ckpt.store import MissingError, Store, StoreError

FIRST_LOOK, LOOK = 0.02, 2.0
"""Seconds between two looks into the store, at first and later."""
T = TypeVar("T")


class LateError(StoreError):
    """The deadline of an upload has passed."""


@dataclass(frozen=True)
class Outcome:
    """Of an attempt: stored, differ (members hold different states), removed (it was stored, and removed since) or failed.
    mine: this uploader has created the manifest."""

    kind: str
    mine: bool = False
    reason: str = ""


def persist(action: Callable[[], T], until: float) -> T:
    """What `action` returns, however often the store refuses it. Raises LateError at `until` (time.monotonic)."""
    pause = 0.25
    while True:
        try:
            return action()
        except StoreError as error:
            left = until - time.monotonic()
            if left <= 0:
                raise LateError(f"{error}; given up at the deadline of the upload") from error
            time.sleep(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, 30.0)


@dataclass
class Meeting:
    """Of one attempt; make_up uploads what this rank has of a share. began: when its own share was there, which took `took`
    seconds. Times are those of time.monotonic."""

    store: Store
    attempt: Attempt
    until: float
    took: float
    make_up: Callable[[int], None]
    began: float = field(default_factory=time.monotonic)
    _parts: dict[str, Part | None] = field(default_factory=dict)
    _made_up: set[int] = field(default_factory=set)
    _whole_since: float | None = None
    _skipped: dict[int, float] = field(default_factory=dict)
    """Share -> when it was seen that its member skips this attempt."""

    def run(self) -> Outcome:
        pause = FIRST_LOOK
        while time.monotonic() < self.until:
            if (outcome := persist(self._look, self.until)) is not None:
                return outcome
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(1.3 * pause, LOOK)
        return Outcome("failed", reason=f"{self.attempt.prefix} has no manifest at the deadline: {self._lacking()}")

    def _look(self) -> Outcome | None:
        prefix = self.attempt.prefix
        keys = set(self.store.list(prefix))
        parts = self._read(sorted(key for key in keys if key.startswith(f"{prefix}/{FOLDER}/")))
        settled = settle(parts, self.attempt.members)
        if settled.differ:
            return Outcome("differ", reason=settled.differ)
        if f"{prefix}/{MANIFEST}" in keys:
            return Outcome("stored")
        if f"{prefix}/{TOMBSTONE}" in keys:
            return Outcome("removed")
        if settled.missing:
            self._help(settled.missing, keys)
            return None
        return self._commit(settled)

    def _read(self, keys: list[str]) -> list[Part]:
        """A part that is no part is none: its share is made up for."""
        for key in keys:
            if key not in self._parts:
                try:
                    self._parts[key] = decode_part(self.store.read(key))
                except (FormatError, MissingError):
                    self._parts[key] = None
        return [part for part in self._parts.values() if part is not None]

    def _help(self, missing: list[int], keys: set[str]) -> None:
        """One after the other has its turn, lest all upload the same: of those that are here, if a member has skipped this
        attempt, else of all, after a while. Members that waited for each other at different attempts would stay so."""
        attempt = self.attempt
        if not attempt.compare:
            return
        for index in missing:
            if skipped_key(attempt.prefix, attempt.members[index]) in keys:
                self._skipped.setdefault(index, time.monotonic())
        turn = self.began + max(attempt.patience, 2 * self.took) + attempt.place * attempt.stagger
        for index in missing:
            early = self._skipped.get(index, math.inf) + self._place() * attempt.stagger
            if index not in self._made_up and time.monotonic() >= min(turn, early):
                self.make_up(index)
                self._made_up.add(index)

    def _place(self) -> int:
        """Of this member among those that have uploaded something."""
        here = {part.member for part in self._parts.values() if part is not None}
        return sorted(here | {self.attempt.member}).index(self.attempt.member)

    def _commit(self, settled: Settlement) -> Outcome | None:
        """Rank 0 of the first at once, of the others later, in case that those are gone."""
        now, attempt = time.monotonic(), self.attempt
        if self._whole_since is None:
            self._whole_since = now
        if attempt.rank or now < self._whole_since + self._place() * attempt.stagger:
            return None
        body = attempt.body | {"by": attempt.member} | ({"totals": to_hex(settled.totals)} if settled.totals else {})
        if now >= self.until:  # it was stopped for a while: others have gone on
            return None
        try:
            commit_manifest(self.store, attempt.prefix, body, settled.shards)
        except ValueError as error:
            return Outcome("failed", reason=f"the parts do not make a checkpoint: {error}")
        except StoreError:
            if self.store.exists(f"{attempt.prefix}/{MANIFEST}"):
                return Outcome("stored")
            raise
        return Outcome("stored", mine=True)

    def _lacking(self) -> str:
        parts = [part for part in self._parts.values() if part is not None]
        missing = settle(parts, self.attempt.members).missing
        return (
            f"no parts of {', '.join(self.attempt.members[i] for i in missing)}" if missing else "nobody committed it"
        )
