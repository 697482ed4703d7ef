"""`python -m ckpt.uploader FD URL`: uploads what a rank has copied into its arena, which is the file FD, to the store at URL.

Jobs come as lines of JSON on stdin, answers go as such to stdout. A rank that dies loses nothing that it has handed over:
this process goes on from the arena until the job is done or its deadline has passed, and keeps it for a while after (see
ckpt.survivor) unless it was dismissed. It needs no torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ckpt import parts
from ckpt.arena import Arena
from ckpt.checkpoint import MANIFEST, shard_key
from ckpt.format import Span, encode_header, shard_record
from ckpt.meeting import LateError, Meeting, Outcome, persist
from ckpt.parts import ITEM, Attempt, Held, Part
from ckpt.retention import Rules, collect
from ckpt.store import Store, StoreError
from ckpt.survivor import Keeper, digests

UPLOADS = 3
"""Shards that are uploaded at once: so many are in memory."""
NICE = 10
DISMISSED = {"dismissed": True}
"""In place of a job: the rank ends, and nobody will come in its place."""


class ConflictError(Exception):
    """An object of the name of ours has other contents: trying again will not help."""


@dataclass
class Upload:
    """One rank's attempt, on its way from the arena to the store."""

    store: Store
    arena: memoryview
    attempt: Attempt
    until: float
    pool: ThreadPoolExecutor
    hashing: ThreadPoolExecutor
    took: float = 0.0
    sent: int = 0
    _totals: Future[dict[str, int]] = field(init=False)

    def start(self) -> None:
        """The shards and the parts of what it is to upload. Raises LateError."""
        began = time.monotonic()
        self._totals = self.hashing.submit(self._sum)  # beside the uploads
        for index in self.attempt.shares:
            self.put(index)
        self.took = time.monotonic() - began

    def meet(self) -> Outcome:
        return Meeting(self.store, self.attempt, self.until, self.took, self.put).run()

    def put(self, index: int) -> None:
        """What this rank has of a share, and the part that says so; the shards are left out if others have made up for them and
        committed. Raises LateError."""
        late = persist(lambda: self.store.exists(f"{self.attempt.prefix}/{MANIFEST}"), self.until)
        groups = () if late else parts.shards(parts.portion(self.attempt, index))
        records = tuple(self.pool.map(self._put_shard, groups))
        self.sent += sum(record["bytes"] for record in records)
        a = self.attempt
        part = Part(a.member, a.rank, a.ranks, a.members, index, records, self._totals.result())
        name, data = parts.encode_part(part)
        self._create(f"{a.prefix}/{parts.FOLDER}/{name}", data)

    def _put_shard(self, pieces: tuple[Held, ...]) -> dict[str, Any]:
        header = encode_header([(f"{p.plane}/{p.fragment}/{p.start}", "F32", [p.stop - p.start]) for p in pieces])
        data = b"".join([header, *map(self._bytes, pieces)])
        name = parts.shard_name(self.attempt, pieces)
        self._create(shard_key(self.attempt.prefix, name), data)
        return shard_record(name, data, [Span(p.plane, p.fragment, p.start, p.stop, name) for p in pieces])

    def _create(self, key: str, data: bytes) -> None:
        if not persist(lambda: self.store.create(key, data), self.until):
            raise ConflictError(f"{self.store.url}: {key} exists with other contents")

    def _sum(self) -> dict[str, int]:
        """Digests of all that this rank holds; of nothing if there is nobody to compare with."""
        totals: dict[str, int] = {}
        for held in self.attempt.held if self.attempt.compare else ():
            size = self.attempt.block
            total = parts.block_sum(self._bytes(held), held.start // size, ITEM * size)
            totals = parts.add(totals, {f"{held.plane}/{held.fragment}": total})
        return totals

    def _bytes(self, piece: Held) -> memoryview:
        return self.arena[piece.at : piece.at + ITEM * (piece.stop - piece.start)]


def run(store: Store, arena: memoryview, job: dict[str, Any], keeper: Keeper) -> Iterable[dict[str, Any]]:
    """The answers to a job: one for each of its attempts, which are uploaded one after the other, and what was cleaned up.
    The arena is done with after the one that says `done`."""
    attempts, keeper.busy = [parts.parse_attempt(each) for each in job["attempts"]], True
    with ThreadPoolExecutor(UPLOADS) as pool, ThreadPoolExecutor(1) as hashing:
        uploads = [Upload(store, arena, attempt, job["until"], pool, hashing) for attempt in attempts]
        if keep := job.get("keep"):
            held = [Held(**each) for each in keep["what"]["held"]]
            keeper.hold(keep["name"], keep["what"], hashing.submit(digests, arena, held))
        outcomes = [_tried(upload) for upload in uploads]
        won = []
        tried = [*zip(uploads, outcomes, strict=True)]
        for upload, failed in reversed(tried):  # a region's own first: it waits for nobody
            outcome = failed or _met(upload)
            won += [upload.attempt.prefix.rpartition("/")[0]] if outcome.mine else []
            numbers = {"bytes": upload.sent, "seconds": time.monotonic() - job["since"], "took": upload.took}
            yield {"id": job["id"], "prefix": upload.attempt.prefix, **vars(outcome), **numbers}
    keeper.busy = False
    yield {"id": job["id"], "done": True}
    for root in won:
        yield from _clean_up(store, root, job)


def _tried(upload: Upload) -> Outcome | None:
    try:
        upload.start()
    except (LateError, ConflictError) as error:
        return Outcome("failed", reason=str(error))
    return None


def _met(upload: Upload) -> Outcome:
    try:
        return upload.meet()
    except (LateError, ConflictError) as error:
        return Outcome("failed", reason=str(error))


def _clean_up(store: Store, root: str, job: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """What a new checkpoint makes needless. What is left behind, the next one finds."""
    try:
        if root in job["rules"]:
            collect(store, root, Rules(**job["rules"][root]))
        if job["bits"] and root == job["bits"]["after"]:
            yield {"id": job["id"], "dropped": drop_bits(store, root, **job["bits"])}
    except StoreError as error:
        print(f"clean-up: {error}; left for the next one", file=sys.stderr, flush=True)


def drop_bits(store: Store, root: str, after: str, folder: str, keep: int, stored: dict[str, str]) -> list[int]:
    """Deletes the bits of rounds that the `keep` newest checkpoints include. stored: seq -> name. Returns the seqs."""
    found = [key for key in store.list(root) if key.endswith("/manifest.json")]
    numbers = sorted(int(key.split("/")[-2]) for key in found)
    # Not of the few that stay for longer: a run that falls back to one of those goes on from there.
    oldest = min(numbers[1:][-keep:], default=0)
    dropped = [int(seq) for seq in stored if int(seq) <= oldest]
    for seq in dropped:
        for key in store.list(f"{folder}/{stored[str(seq)]}/"):
            store.delete(key)
    return dropped


def main(arguments: list[str]) -> int:
    # Slurm sends it to all processes of a job; this one ends with its work.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(NICE)  # training comes first
    arena, store = Arena.attach(int(arguments[0])), Store(arguments[1])
    keeper = Keeper(arena.descriptor)
    alive, linger = True, 0.0
    for line in sys.stdin:
        if not line.endswith("\n"):
            break  # the rank has died while it said it
        job = json.loads(line)
        if job == DISMISSED:
            return 0
        linger = job.get("keep", {}).get("linger", 0.0)
        for answer in run(store, arena.bytes, job, keeper):
            try:
                if alive:
                    print(json.dumps(answer), flush=True)
            except BrokenPipeError:  # the rank has died: what it has handed over is stored all the same
                alive = False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    keeper.linger(linger)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)  # stdout may be gone, and a client's threads may hang
