"""When a region saves, what it hears of it later, and what it keeps when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diloco.control import Order
from diloco.fold import State
from diloco.lineage import origin
from diloco.saving import Among
from elastic.pulse import ENTRIES

if TYPE_CHECKING:
    from diloco.trainer import Trainer


def among_all(state: State, entry: dict[str, Any]) -> Among:
    """After a round all members hold the same: those share the work that were there for the round."""
    answered = {answer["member"] for answer in entry["answers"]}
    return Among(tuple(sorted(answered)), tuple(sorted(state.members.keys() - answered)))


def alone(trainer: Trainer) -> Among:
    return Among((trainer.links.member,))


def save(trainer: Trainer, among: Among, wait: bool = False) -> None:
    """Copies the region's own planes, and the global ones if it is among those that save them; the rest is the uploader's. A
    store that is away costs this checkpoint, not the run: the bits of its rounds stay until a later one is whole. Skipped if
    the one before is still being uploaded; wait: waits for that instead. Collective."""
    saver, state = trainer.links.saver, trainer.state
    hear(trainer)
    if wait:
        finish(trainer)
    if not saver.free():
        saver.skip(state, among)
        trainer.report.not_saved(state.seq, f"the one before is still being uploaded; {saver.skipped} skipped so far")
        return
    member = state.members.get(trainer.links.member)  # not one yet, if it has just come
    progress = {
        "clock": trainer.clock.save(len(trainer.snapshots), 0 if member is None else member.dropped),
        "taken": trainer.reader.ranges(),
        "at_theta": sorted(trainer.at_theta),
        "adam": trainer.inner.updates,
    }
    saver.save(state, among if member else Among(()), progress, trainer.stored, proven=not trainer.unproven)


def finish(trainer: Trainer) -> None:
    """Waits for what is being uploaded, and hears of it. Collective."""
    control = trainer.links.control

    def on() -> None:
        if control is not None:
            control.pulse.out(ENTRIES)

    trainer.links.saver.wait(on)
    hear(trainer)


def hear(trainer: Trainer) -> None:
    """What has become of what was handed over."""
    for answer in trainer.links.saver.answers():
        if "died" in answer:
            print(f"{trainer.links.member}: {answer['died']}; another one goes on from the arena", flush=True)
        elif "dropped" in answer:
            for seq in answer["dropped"]:
                trainer.stored.pop(seq, None)
        elif answer["kind"] == "stored":
            _stored(trainer, answer)
        elif trainer.region.rank == 0:
            alarm = "ALARM: regions hold different states, " if answer["kind"] == "differ" else ""
            trainer.report.not_saved(origin(answer["prefix"]), f"{alarm}{answer['reason'] or 'it was removed since'}")
        else:
            print(f"{trainer.links.member}, rank {trainer.region.rank}: {answer['reason']}", flush=True)


def _stored(trainer: Trainer, answer: dict[str, Any]) -> None:
    if trainer.links.saver.is_common(answer):
        trainer.saved = max(trainer.saved, origin(answer["prefix"]))
        numbers = {key: answer[key] for key in ("mine", "bytes", "seconds", "took")}
        numbers["blocked"] = trainer.links.saver.blocked  # the next save is not before this is heard of
        trainer.report.saved(answer["prefix"], origin(answer["prefix"]), **numbers)


def disown(trainer: Trainer) -> None:
    """This rank ends for a reason that may be in its state: whoever comes in its place is to fetch one."""
    if (links := getattr(trainer, "links", None)) is not None:  # not there before it is connected
        links.saver.disown()


def keep(trainer: Trainer, order: Order) -> None:
    """What nothing else would keep: a run that was stopped by hand has not saved its last state, and without `ckpt.durable`
    no round's bits are in the store. And what is being uploaded. Collective."""
    if not order.clean:
        return  # the uploader goes on by itself
    finish(trainer)
    state, member = trainer.state, trainer.links.member
    saved = int(trainer.region.broadcast_bytes(str(trainer.saved).encode()))
    by_hand = state.stopped is not None and state.finished is None
    leaving = state.stopped is None and not trainer.cfg.ckpt.durable
    newest = max(fragment.base for fragment in state.fragments)
    if trainer.in_step and newest > saved and (by_hand or leaving):
        mine = leaving or member == min(state.members, default="")
        save(trainer, alone(trainer) if mine else Among(()))
        finish(trainer)
    trainer.links.saver.dismiss()
