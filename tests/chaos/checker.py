"""What must hold after every entry of a run under fire, whatever was done to it. Pure: entries and reports in, violations out.

The fold is the product's, and says whether an entry is valid at all; everything else is counted here anew, from the entries'
own facts and from what the regions wrote in their metrics. All of it is of one epoch: a run that stores its rounds' bits
never rewinds.
"""

from __future__ import annotations

import json
from bisect import bisect, bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from diloco.fold import JournalError, Member, State, entry_hash, fold

Report = dict[str, Any]
"""A line of metrics.jsonl."""


@dataclass
class Life:
    """What one member has reported so far."""

    fragments: dict[int, int] = field(default_factory=dict)
    """Fragment -> inner steps at its last snapshot that was used."""
    last: int | None = None
    """seq of its last report. It may skip rounds after it, whose bits were not kept, but none that holds its work."""


class Checker:
    """`entry` and `report` in any order, entries among themselves and a region's reports among themselves in theirs."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.state: State | None = None
        self.rounds: list[int] = []
        """seqs of the rounds, in order."""
        self.compared = 0
        """Reports whose digest was compared with another's, or with an entry's."""
        self.steps_checked = 0
        self._hashes: list[str] = []
        self._round_at: dict[int, dict[str, Any]] = {}
        self._digests: dict[int, tuple[str, str]] = {}
        """seq -> digest of theta after it, and who said so first."""
        self._based: dict[int, list[int]] = defaultdict(list)
        """seq -> rounds that were made on it and whose theta has not been compared with anybody's yet."""
        self._applied = Samples()
        self._samples: dict[str, int] = defaultdict(int)
        """Region -> samples that the ledger applied."""
        self._contributed: dict[tuple[str, int], int] = defaultdict(int)
        """(region, fragment) -> samples behind its contributions."""
        self._now: dict[str, str] = {}
        """Region -> the member that reports."""
        self._lives: dict[str, Life] = defaultdict(Life)
        self._early: list[tuple[str, Report]] = []
        """Reports on entries that are not read yet."""
        self._said: dict[int, set[str]] = defaultdict(set)
        """seq -> members that have reported on it."""

    def wrong(self, text: str) -> None:
        self.violations.append(text)

    # The journal

    def entry(self, data: bytes) -> None:
        before, seq = self.state, len(self._hashes)
        self._hashes.append(entry_hash(data))
        try:
            self.state = fold(before, data)
        except JournalError as error:
            self.wrong(f"entry {seq}: {error}")
            return
        entry = json.loads(data)
        if entry["kind"] == "rewind":
            self.wrong(f"entry {seq}: the run went back to {entry['checkpoint']}, and committed rounds are lost")
        if entry["kind"] == "round" and before is not None:
            self._round(before, entry)
        early, self._early = self._early, []
        for region, report in early:
            self.report(region, report)

    def again(self, seq: int, data: bytes) -> None:
        """Entry `seq` as it is now: nothing that was created may change."""
        if (found := entry_hash(data)) != self._hashes[seq]:
            self._hashes[seq] = found  # to be told once
            self.wrong(f"entry {seq} is another one than before: two states at one seq")

    def _round(self, before: State, entry: dict[str, Any]) -> None:
        seq, fragment = entry["seq"], entry["fragment"]
        self.rounds.append(seq)
        self._round_at[seq] = entry
        for answer in entry["answers"]:
            self._answer(seq, fragment, before.members[answer["member"]], answer, before.settings.seq_len)
        if entry["base"] in self._digests:
            self._compare_base(seq, entry["base"])
        elif entry["base"]:
            self._based[entry["base"]].append(seq)

    def _answer(self, seq: int, fragment: int, member: Member, answer: dict[str, Any], seq_len: int) -> None:
        """The ledger: no sample twice, and no work in a contribution without samples of its own."""
        claims = dict(answer["leases"])
        for lease in member.leases:
            upto = claims.get(lease.id, lease.applied)
            if upto > lease.applied:
                self._samples[member.region] += upto - lease.applied
                if not self._applied.add(lease.applied, upto):
                    self.wrong(f"entry {seq}: samples [{lease.applied}, {upto}) of {member.id} are applied twice")
        if answer["tokens"] != answer["steps"] * member.samples_per_step * seq_len:
            self.wrong(f"entry {seq}: {answer['tokens']} tokens of {member.id} are not {answer['steps']} steps")
        key = (member.region, fragment)
        self._contributed[key] += answer["tokens"] // seq_len
        assert self.state is not None
        single = len(self.state.fragments) == 1
        mine, applied = self._contributed[key], self._samples[member.region]
        if mine > applied or (single and mine < applied):
            what = "more" if mine > applied else "less"
            self.wrong(
                f"entry {seq}: {member.region} has put {mine} samples' work into fragment {fragment}, {what} than the "
                f"{applied} of its samples that are applied"
            )

    # The regions

    def report(self, region: str, report: Report) -> None:
        if report["kind"] == "run":
            self._now[region] = report["member"]
        elif report["kind"] == "round":
            if report["seq"] >= len(self._hashes):
                self._early.append((region, {**report, "member": self._now[region]}))
            else:
                self._merged(report.get("member", self._now[region]), report)

    def _merged(self, member: str, report: Report) -> None:
        seq = report["seq"]
        entry = self._round_at.get(seq)
        if entry is None:
            self.wrong(f"{member} reports a round at entry {seq}, which is none")
            return
        self._said[seq].add(member)
        digest, first = self._digests.setdefault(seq, (report["digest"], member))
        if first != member:
            self.compared += 1
        if digest != report["digest"]:
            self.wrong(f"entry {seq}: theta is {digest[:12]} at {first} and {report['digest'][:12]} at {member}")
        for later in self._based.pop(seq, []):
            self._compare_base(later, seq)
        self._steps(member, entry, report)

    def _compare_base(self, seq: int, base: int) -> None:
        """The members of a round at `seq` said what they applied it to; so did who reported on `base`."""
        self.compared += 1
        digest, member = self._digests[base]
        if self._round_at[seq]["theta"] != digest:
            theta = self._round_at[seq]["theta"]
            self.wrong(f"entry {seq} applies to theta {theta[:12]}, but {member} had {digest[:12]} after entry {base}")

    def _steps(self, member: str, entry: dict[str, Any], report: Report) -> None:
        """A member that lives loses no inner step and contributes none twice: a contribution holds the steps between its
        snapshot and that of the one before, of the same fragment."""
        life, seq, fragment = self._lives[member], entry["seq"], entry["fragment"]
        if life.last is not None:
            since = self.rounds[bisect(self.rounds, life.last) : bisect_left(self.rounds, seq)]
            skipped = [n for n in since if member in self._members(n)]
            if skipped:
                self.wrong(f"{member} reports entry {seq} but has skipped {skipped}, which hold its work")
        life.last = seq
        answer = next((a for a in entry["answers"] if a["member"] == member), None)
        if answer is None:
            return
        at = report["step"] - report["overlap"]
        if fragment in life.fragments:
            self.steps_checked += 1
            since = at - life.fragments[fragment]
            if since != answer["steps"]:
                verb = "lost" if since > answer["steps"] else "counted twice"
                self.wrong(
                    f"entry {seq}: {member} has taken {since} inner steps since its last contribution to fragment "
                    f"{fragment} and contributes {answer['steps']}: {abs(since - answer['steps'])} {verb}"
                )
        life.fragments[fragment] = at

    def common(self, members: set[str | None], newest: int = 8) -> list[int]:
        """The last rounds that hold the work of all `members`."""
        last = self.rounds[-newest:]
        return [n for n in last if self._members(n) >= members]

    def _members(self, seq: int) -> set[str]:
        return {answer["member"] for answer in self._round_at[seq]["answers"]}

    def reported(self, seq: int) -> set[str]:
        return self._said[seq]

    def finish(self) -> None:
        """The checks that were to be made were made."""
        if self._early:
            self.wrong(f"{self._early[0][0]} reports entry {self._early[0][1]['seq']}, which is not in the journal")
        if len(self.rounds) > 1 and not (self.compared and self.steps_checked):
            self.wrong("nothing was compared: no two members reported on one round")


class Samples:
    """A set of sample indices, as ranges."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def add(self, start: int, stop: int) -> bool:
        """False if some of [start, stop) are in it already."""
        new = all(stop <= a or b <= start for a, b in self.ranges)
        self.ranges.append((start, stop))
        self.ranges.sort()
        merged: list[tuple[int, int]] = []
        for a, b in self.ranges:
            if merged and a <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(b, merged[-1][1])
            else:
                merged.append((a, b))
        self.ranges = merged
        return new


@dataclass
class Deadline:
    """Something that has to happen again and again, while it can."""

    what: str
    limit: float
    """Seconds."""
    since: float | None = None
    longest: float = 0.0
    missed: list[str] = field(default_factory=list)
    _told: bool = False

    def happened(self, now: float) -> None:
        self.waited(now)
        self.since, self._told = now, False

    def waited(self, now: float) -> None:
        if self.since is None:
            self.since = now
        self.longest = max(self.longest, now - self.since)
        if now - self.since > self.limit and not self._told:
            self._told = True
            self.missed.append(f"{self.what}: not for {self.limit:g} s")

    def excused(self, now: float) -> None:
        """It cannot happen now: its time begins anew."""
        self.since, self._told = now, False
