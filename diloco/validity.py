"""What makes an entry valid on a state. Pure. Whoever creates an entry asks first; a fold refuses what is not."""

from __future__ import annotations

import math

from diloco import settings
from diloco.state import Entry, State, own_sources

KINDS = ("join", "leave", "round", "set", "lost", "have", "rewind", "stop")
"""Of entries after the first."""


def invalid(state: State, entry: Entry) -> str | None:
    """Why `entry` may not follow `state`, or None."""
    kind = entry["kind"]
    if kind not in KINDS:
        return f"unknown kind {kind!r}"
    if state.stopped is not None:
        return f"the run has stopped ({state.stopped})"
    check = {"join": _join, "leave": _leave, "round": _round, "set": _set, "rewind": _rewind}.get(kind)
    if check is None and kind in ("lost", "have"):
        return _bits(state, entry)
    return check(state, entry) if check else None


def _join(state: State, entry: Entry) -> str | None:
    if entry["region"] in state.expelled:
        return f"{entry['region']} was expelled"
    for source, (_, digest) in own_sources(entry).items():
        if state.sources.get(source, digest) != digest:
            return f"{source} is other data than it was before"
    return f"{entry['member']} is a member already" if entry["member"] in state.members else None


def _leave(state: State, entry: Entry) -> str | None:
    return None if entry["member"] in state.members else f"{entry['member']} is not a member"


def _set(state: State, entry: Entry) -> str | None:
    what = [key for key in ("settings", "paused", "expel", "admit") if key in entry]
    if len(what) != 1:
        return "a set is of settings, or a pause, or a region"
    if what == ["settings"]:
        return settings.wrong(entry["settings"], len(state.fragments))
    if what == ["paused"]:
        return None if type(entry["paused"]) is bool else "a pause is on or off"
    region = entry[what[0]]
    if type(region) is not str or not region:
        return "a region has a name"
    if (region in state.expelled) == (what == ["expel"]):
        return f"{region} is {'already' if what == ['expel'] else 'not'} expelled"
    return None


def _bits(state: State, entry: Entry) -> str | None:
    """`lost` and `have` are about a round of the current epoch."""
    if type(entry["round"]) is not int or not state.epoch < entry["round"] <= state.seq:
        return f"{entry['round']} is not a round of the current epoch"
    if entry["kind"] == "have" and entry["round"] not in state.lost:
        return f"nobody has lost round {entry['round']}"
    return None


def _rewind(state: State, entry: Entry) -> str | None:
    """By hand at any time. Because bits are lost only right after the entry that says so: whoever has them has had its time to
    answer, and nothing has come between. Because the checkpoint of the rewind before is damaged only until a round was
    committed on it."""
    if type(entry.get("skip_data", False)) is not bool:
        return "skip_data is true or false"
    if entry["reason"] == "by hand" or (entry["reason"] == "lost" and state.seq in state.lost.values()):
        return None
    if entry["reason"] == "damaged":
        gone_on = state.epoch == 0 or any(fragment.base > state.epoch for fragment in state.fragments)
        return "the run goes on from its checkpoint" if gone_on else None
    return "nobody has just said that bits are lost"


def _round(state: State, entry: Entry) -> str | None:
    if entry["epoch"] != state.epoch:
        return f"it is of epoch {entry['epoch']}, the run is in {state.epoch}"
    if not 0 <= entry["fragment"] < len(state.fragments):
        return f"there is no fragment {entry['fragment']}"
    if entry["base"] != state.fragments[entry["fragment"]].base:
        return f"fragment {entry['fragment']} has moved on from entry {entry['base']}"
    if state.paused:
        return "the run is paused"
    if type(entry["head"]) is not int or not state.rules <= entry["head"] <= state.seq:
        return f"its attempt began before entry {state.rules}, which changed what weights depend on"
    if state.finished is not None:
        return state.finished
    if state.ledger.handed == 0:
        return f"fewer than elastic.start_regions={state.settings.start_regions} members have joined"
    ids = [answer["member"] for answer in entry["answers"]]
    if not ids or ids != sorted(set(ids)):
        return "its members are not a sorted set"
    for answer in entry["answers"]:
        member = state.members.get(answer["member"])
        if member is None:
            return f"{answer['member']} is not a current member"
        if type(answer["tokens"]) is not int or answer["tokens"] < 0:
            return f"{answer['member']} has no number of tokens"
        if type(answer.get("dropped", 0)) is not int or answer.get("dropped", 0) < 0:
            return f"{answer['member']} has no number of dropped samples"
        if why := _no_norm(answer):
            return f"{answer['member']} {why}"
        held, claims = {lease.id: lease for lease in member.leases}, dict(answer["leases"])
        if len(claims) < len(answer["leases"]) or any(
            i not in held or not 0 <= upto <= held[i].stop for i, upto in claims.items()
        ):
            return f"{answer['member']} applies a lease that it does not hold"
    weights = state.weights(entry["fragment"], entry["answers"])
    return None if any(weight > 0 for weight in weights) else "no contribution has any weight"


def _no_norm(answer: Entry) -> str | None:
    norm, steps = answer.get("norm", 0.0), answer.get("steps", 0)
    if norm is not None and (type(norm) not in (int, float) or not 0 <= norm < math.inf):
        return "has no norm"
    return None if type(steps) is int and steps >= 0 else "has no number of steps"
