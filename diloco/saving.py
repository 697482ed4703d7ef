"""Saving without waiting: a region copies its planes into the arena, and the uploader makes checkpoints of it meanwhile."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ckpt.arena import Arena
from ckpt.parts import ITEM, Attempt, Held, skipped_key
from ckpt.retention import Rules
from ckpt.store import StoreError
from ckpt.survivor import Survivor, find
from ckpt.uploads import Uploads
from diloco.checkpointing import CkptConfig
from diloco.checkpoints import MOMENTS, RESIDUAL, Checkpoints, selections
from diloco.errors import ConfigError
from diloco.fold import State, counters
from diloco.inner import Inner
from diloco.planes import Planes

HERE = "this machine's memory"
"""In place of a checkpoint's prefix: what was found."""


@dataclass(frozen=True)
class Among:
    """Who attempts a checkpoint of all: `members` have a share of it each, the others that are there only help out."""

    members: tuple[str, ...]
    others: tuple[str, ...] = ()

    def place(self, member: str) -> int:
        """-1: not among them."""
        everyone = [*self.members, *self.others]
        return everyone.index(member) if self.members and member in everyone else -1


class Saver:
    """One rank's arena and uploader. All methods but `answers` and `close` are collective."""

    def __init__(self, checkpoints: Checkpoints, planes: Planes, inner: Inner, member: str, name: str) -> None:
        """member, name: of this region. Takes the memory that all later saves need."""
        self.checkpoints, self.planes, self.inner = checkpoints, planes, inner
        self.member, self.name = member, name
        self.cfg: CkptConfig = checkpoints.keep
        self.blocked = 0.0
        """Seconds that training waited for the last save."""
        self.skipped = 0
        """Saves that were due while the one before was still being uploaded."""
        names = [*selections(inner), *([RESIDUAL] if planes.residual else [])]
        self.common, size = self._layout(planes.names, 0)
        self.own, size = self._layout(names, size)
        self._guard = Held("guard", 0, 0, 1, 1, size)
        """One element more: 0, or the rank has disowned the rest."""
        survivor = self._survivor() if self.cfg.linger else None
        self.found = self._agreed(survivor)
        """What a rank of this one's place had saved when it died, if that is still on this machine, on all ranks."""
        self._left = _memory(survivor.arena) if survivor else torch.empty(0)
        arena = (survivor and survivor.memory) or _arena(size + ITEM, name)
        if checkpoints.region.device.type == "cuda":
            arena.pin()
        self._memory = _memory(arena)
        self.uploads = Uploads(arena, checkpoints.store.url)

    def _survivor(self) -> Survivor | None:
        found = find(self._place, self._kept)
        return None if found is None or _part(_memory(found.arena), self._guard).any() else found

    @property
    def _kept(self) -> list[Held]:
        return [*self.common, *self.own, self._guard]

    @property
    def _place(self) -> str:
        """Of this rank, the same for its successor."""
        region = self.checkpoints.region
        what = f"{self.checkpoints.own_root}/{self.name} {region.rank} {region.world}"
        return f"ckpt-{hashlib.sha256(what.encode()).hexdigest()[:32]}"

    def _agreed(self, survivor: Survivor | None) -> dict[str, Any] | None:
        keys = ("seq", "hash", "common", "bases", "progress")
        mine = {key: survivor.what[key] for key in keys} if survivor else None
        said = self.checkpoints.region.gather_bytes(json.dumps(mine).encode())
        return {**mine, "prefix": HERE} if mine and len(set(said)) == 1 else None

    def forget(self) -> None:
        """Nobody needs what was found any more."""
        self.found, self._left = None, torch.empty(0)

    def _layout(self, names: Iterable[str], at: int) -> tuple[list[Held], int]:
        """This rank's slices of these planes, one after the other from byte `at`; and where they end."""
        found = []
        for name in names:
            for f, fragment in enumerate(self.checkpoints.shards.fragments):
                start, stop = self.checkpoints.shards.span(f)
                found.append(Held(name, f, start, stop, fragment.elements, at))
                at += ITEM * (stop - start)
        return found, at

    def free(self) -> bool:
        """Whether no rank's arena is being uploaded. If one is, the save is skipped."""
        busy = b"busy" if self.uploads.busy() else b""
        return not any(self.checkpoints.region.gather_bytes(busy))

    def skip(self, state: State, among: Among) -> None:
        """The others hear of it, if the store answers: they would wait for this region's share."""
        self.skipped += 1
        if self.checkpoints.region.rank == 0 and self.member in among.members and len(among.members) > 1:
            key = skipped_key(f"{self.checkpoints.root}/{state.seq}", self.member)
            threading.Thread(target=self._say, args=(key,), name="skipped", daemon=True).start()

    def _say(self, key: str) -> None:
        with suppress(StoreError):
            self.checkpoints.store.create(key, b"")

    def wait(self, progress: Callable[[], None]) -> None:
        """Until the arena is free, which it is once the deadline of the upload has passed. progress: called meanwhile."""
        while self.uploads.busy() and not self.uploads.wait(0.5):
            progress()
        while not self.free():
            progress()
            time.sleep(0.1)

    def save(
        self, state: State, among: Among, progress: dict[str, Any], stored: dict[int, str], proven: bool = True
    ) -> None:
        """The state after entry `state.seq`, and the region's own planes with `progress` (JSON), as they are now. stored: seq
        -> attempt of the rounds whose bits may be in the store. proven: the journal has confirmed θ and momentum. The arena
        must be free."""
        began, attempts = time.monotonic(), []
        if (place := among.place(self.member)) >= 0:
            self._copy_common()
            attempts.append(self._attempt_common(state, among, place))
        self._copy_own()
        _part(self._memory, self._guard).zero_()
        attempts.append(self._attempt_own(state, progress))
        now = time.monotonic()
        job = {
            "id": state.seq,
            "since": now,
            "until": now + self.cfg.upload_deadline,
            "attempts": [attempt.message() for attempt in attempts],
            "rules": self._rules(),
            "bits": self._bits(stored),
            **self._keep(state, progress, place >= 0 and proven),
        }
        self.uploads.submit(job)
        self.blocked = now - began

    def _copy_common(self) -> None:
        for held in self.common:
            _part(self._memory, held).copy_(getattr(self.planes, held.plane)[held.fragment])

    def _copy_own(self) -> None:
        select = selections(self.inner)
        for held in self.own:
            if held.plane == RESIDUAL:
                assert self.planes.residual is not None
                _part(self._memory, held).copy_(self.planes.residual[held.fragment])
            else:
                self.checkpoints.shards.read(held.fragment, select[held.plane], out=_part(self._memory, held))

    def load(self, found: dict[str, Any], planes: Planes) -> None:
        """θ and momentum of what was found; as Checkpoints.load."""
        for held in self.common:
            getattr(planes, held.plane)[held.fragment].copy_(_part(self._left, held))
        for f, base in enumerate(found["bases"]):
            planes.forget(f)
            planes.arrived(f, base, ())

    def load_own(self, found: dict[str, Any], inner: Inner, planes: Planes, moments_only: bool) -> None:
        """The rest of it; as Checkpoints.load_own."""
        inner.materialise()
        select = selections(inner)
        for held in self.own:
            if held.plane in MOMENTS or not moments_only:
                if held.plane == RESIDUAL:
                    assert planes.residual is not None
                    planes.residual[held.fragment].copy_(_part(self._left, held))
                else:
                    self.checkpoints.shards.write(held.fragment, _part(self._left, held), select[held.plane])
        inner.set_updates(found["progress"]["adam"])

    def _attempt_common(self, state: State, among: Among, place: int) -> Attempt:
        entry = {"seq": state.seq, "hash": state.hash, "epoch": state.epoch, "counters": counters(state)}
        entry["origin"] = state.checkpoint  # where the run goes back to, for who removes checkpoints
        body = {**entry, **self.checkpoints.what}
        alone = len(among.members) + len(among.others) == 1
        prefix = f"{self.checkpoints.root}/{state.seq}"
        return self._attempt(prefix, body, among.members, place, not alone, self.common)

    def _attempt_own(self, state: State, progress: dict[str, Any]) -> Attempt:
        body = {"seq": state.seq, "hash": state.hash, "progress": progress}
        prefix = f"{self.checkpoints.own_root}/{self.name}/{state.seq}"
        return self._attempt(prefix, body, (self.member,), 0, False, self.own)

    def _attempt(
        self,
        prefix: str,
        body: dict[str, Any],
        members: tuple[str, ...],
        place: int,
        compare: bool,
        held: Sequence[Held],
    ) -> Attempt:
        region, block = self.checkpoints.region, self.checkpoints.shards.fragments[0].block
        patience, stagger = self.cfg.make_up_after, self.cfg.make_up_after / 5
        full = tuple(each for each in held if each.start < each.stop)
        who = self.member, region.rank, region.world
        return Attempt(prefix, body, *who, members, place, compare, block, patience, stagger, full)

    def _rules(self) -> dict[str, dict[str, Any]]:
        """What is marked by its rounds are the run's own checkpoints."""
        cfg, own = self.cfg, f"{self.checkpoints.own_root}/{self.name}"
        common = Rules(cfg.keep, cfg.keep_every, cfg.grace)
        return {self.checkpoints.root: asdict(common), own: asdict(Rules(cfg.keep, 0, cfg.grace))}

    def _bits(self, stored: dict[int, str]) -> dict[str, Any]:
        where = {"after": self.checkpoints.root, "folder": self.checkpoints.bits_root}
        return {**where, "keep": self.cfg.keep, "stored": {str(seq): attempt for seq, attempt in stored.items()}}

    def _keep(self, state: State, progress: dict[str, Any], common: bool) -> dict[str, Any]:
        """For who comes in this rank's place if it dies."""
        if not self.cfg.linger:
            return {}
        what = {"seq": state.seq, "hash": state.hash, "progress": progress, "common": common}
        what["bases"] = [fragment.base for fragment in state.fragments]
        what["held"] = [vars(held) for held in self._kept]
        return {"keep": {"name": self._place, "linger": self.cfg.linger, "what": what}}

    def answers(self) -> list[dict[str, Any]]:
        """What this rank's uploader has said since the last call."""
        return self.uploads.answers()

    def is_common(self, answer: dict[str, Any]) -> bool:
        return str(answer.get("prefix", "")).startswith(f"{self.checkpoints.root}/")

    def disown(self) -> None:
        """Whoever comes in this rank's place is to fetch its state: this one ends for a reason that may be in it."""
        _part(self._memory, self._guard).fill_(1)

    def dismiss(self) -> None:
        """The region leaves: what its arenas hold is in the store, and nobody comes in their ranks' place."""
        self.uploads.dismiss()

    def close(self) -> None:
        self.uploads.close()


def _arena(size: int, name: str) -> Arena:
    """Raises ConfigError: there is no such memory."""
    try:
        return Arena.create(size)
    except OSError as error:
        raise ConfigError(
            f"{name}: there are no {size / 1e9:.2f} GB of shared memory for this rank's checkpoints ({error}): use more "
            "ranks or more memory"
        ) from error


def _memory(arena: Arena) -> Tensor:
    return torch.frombuffer(arena.bytes, dtype=torch.float32) if arena.size else torch.empty(0)


def _part(memory: Tensor, held: Held) -> Tensor:
    return memory[held.at // ITEM :][: held.stop - held.start]
