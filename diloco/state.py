"""A run's global state, and the entries that it is made of. Pure.

An entry is canonical JSON with `seq`, `kind`, `prev` (the hash of its predecessor's bytes) and a `nonce`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from diloco import norms
from diloco.ledger import Lease, Ledger
from diloco.settings import Settings

PROTOCOL = 7
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Member:
    id: str
    region: str
    endpoints: tuple[str, ...]
    """Of every rank, in rank order: host:port, host:port/name behind a gateway, or empty if it cannot be dialled."""
    data: tuple[str, ...]
    """The same of the ranks' exchanges."""
    samples_per_step: int
    leases: tuple[Lease, ...]
    seen: int
    """Number of committed rounds when it joined or last contributed."""
    dropped: int = 0
    """Samples of its committed rounds that count as dropped."""
    shares: tuple[tuple[str, Fraction], ...] = (("", Fraction(1)),)
    """(source, its share of this member's samples), `data` first."""


@dataclass(frozen=True)
class FragmentState:
    base: int = 0
    """seq of its last round; 0 before any."""
    rounds: int = 0
    digest: str = ""
    """Of the pseudo-gradient that was applied last."""
    norms: norms.Norms = ()


@dataclass(frozen=True)
class State:
    """The run after entry `seq`."""

    seq: int
    hash: str
    run: str
    fingerprint: Mapping[str, Any]
    settings: Settings
    checkpoint: str
    """Prefix of the checkpoint that the epoch starts from."""
    fragments: tuple[FragmentState, ...]
    epoch: int = 0
    members: Mapping[str, Member] = field(default_factory=dict)
    rounds: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    stopped: str | None = None
    paused: bool = False
    expelled: tuple[str, ...] = ()
    """Regions that are out of the run, sorted."""
    strikes: Mapping[str, int] = field(default_factory=dict)
    """Region -> rounds in a row in which its contribution was rejected, if it was."""
    rules: int = 0
    """seq of the last `set` that changed what weights depend on: a round whose attempt is older is not valid."""
    lost: Mapping[int, int] = field(default_factory=dict)
    """Round whose bits somebody cannot get -> seq of the last `lost` that says so."""
    had: Mapping[int, int] = field(default_factory=dict)
    """Round that was lost -> seq of the `have` that answered."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Source that one region holds alone -> digest of what it was when it first came."""

    @property
    def tokens(self) -> int:
        """Committed tokens, each counted once."""
        return self.ledger.applied * self.settings.seq_len

    @property
    def spent(self) -> int:
        """Tokens that committed rounds were trained on, those dropped by `outer.merge=mix` included: what `run.tokens` and
        learning-rate schedules go by."""
        return (self.ledger.applied + self.ledger.dropped) * self.settings.seq_len

    @property
    def settled(self) -> int:
        """Samples of `data` below this will not be trained on again."""
        return min([start for start, _ in self._places()], default=self.ledger.cursor)

    @property
    def _open(self) -> int:
        """Samples of `data` that are leased or returned."""
        return sum(stop - start for start, stop in self._places())

    def _places(self) -> list[tuple[int, int]]:
        leased = [(x.applied, x.stop) for m in self.members.values() for x in m.leases if x.left and not x.source]
        return leased + [(r.start, r.stop) for r in self.ledger.pool if not r.source]

    def next_fragment(self, in_flight: Collection[int] = ()) -> int | None:
        """Whose boundary is next, of a member with these fragments in flight: they take turns. It may be in flight itself:
        then it has to wait. None: no further round is wanted."""
        limit = self.settings.rounds
        if limit is not None and self.rounds + len(in_flight) >= limit:
            return None
        turns = [fragment.rounds + (f in in_flight) for f, fragment in enumerate(self.fragments)]
        return turns.index(min(turns))

    @property
    def sync_interval(self) -> int:
        """Inner steps between two boundaries: H / fragments."""
        return self.settings.sync_every // len(self.fragments)

    @property
    def finished(self) -> str | None:
        """Why no further round is wanted, if none is: any member may append `stop` then."""
        limits = self.settings
        if limits.rounds is not None and self.rounds >= limits.rounds:
            return f"run.rounds={limits.rounds} reached"
        if limits.tokens is not None and self.spent >= limits.tokens:
            return f"run.tokens={limits.tokens} reached"
        if limits.samples is not None and self.settled >= limits.samples:
            return f"run.epochs reached: {limits.samples:,} samples"
        return None

    def weights(self, fragment: int, answers: Sequence[Entry]) -> list[float]:
        """The contributions' weights: their tokens, capped at one round's of that member; 0 for those that are rejected. If
        all are, their zeros count: the round moves nothing but momentum, and the run goes on."""
        out = self.rejected(fragment, answers)
        weights = [0.0 if answer["member"] in out else self._capped(answer) for answer in answers]
        return weights if any(weights) else [self._capped(answer) for answer in answers]

    def _capped(self, answer: Entry) -> float:
        member = self.members[answer["member"]]
        cap = self.settings.sync_every * member.samples_per_step * self.settings.seq_len
        return float(min(answer["tokens"], cap))

    def rejected(self, fragment: int, answers: Sequence[Entry]) -> frozenset[str]:
        """Members whose contributions to a round of this fragment have no weight, by their norms."""
        limits = self.settings
        return norms.rejected(self.fragments[fragment].norms, answers, limits.max_norm_ratio, limits.ahead)

    def progress(self, own_rounds: float, own_tokens: int, own_samples: int = 0) -> float:
        """Share of the run that is done, 0 to 1: what inner learning-rate schedules are functions of. own_rounds, own_tokens,
        own_samples (of `data`): what the asking member did that is in no committed round yet."""
        limits = self.settings
        done = 0.0
        if limits.rounds:
            done = (self.rounds + own_rounds) / limits.rounds
        if limits.tokens:
            done = max(done, (self.spent + own_tokens) / limits.tokens)
        if limits.samples:
            done = max(done, (self.ledger.cursor - self._open + own_samples) / limits.samples)
        return min(done, 1.0)


def own_sources(entry: Entry) -> dict[str, tuple[Fraction, str]]:
    """Of a `join`: source that the region holds alone -> (its share of the region's samples, digest of its data). Raises
    ValueError unless the shares are above 0 and 1 at most in all."""
    own = {f"{entry['region']}/{name}": (Fraction(share), digest) for name, share, digest in entry.get("sources", ())}
    shares = [share for share, _ in own.values()]
    if len(own) < len(entry.get("sources", ())) or any(share <= 0 for share in shares) or sum(shares) > 1:
        raise ValueError(
            "the shares of a region's own sources are above 0 and 1 at most in all, and each has a name of its own"
        )
    return own


def encode_entry(fields: Entry, seq: int, prev: str) -> bytes:
    """Canonical bytes of an entry, with a fresh nonce."""
    return canonical({**fields, "seq": seq, "prev": prev, "nonce": secrets.token_hex(8)}) + b"\n"


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def entry_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
