"""Whom a region that starts takes for alive."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from diloco import restoring
from diloco.restoring import _alive
from elastic.node import Identity, Node


def test_who_has_the_port_of_a_dead_member_is_not_that_member() -> None:
    """This rank itself, even: a free port may be the one that a killed process had."""
    node = Node("127.0.0.1")
    try:
        node.identity = Identity("run", "{}", "eu_2")
        node.handlers["fetch"] = lambda connection, hello: None

        def alive(name: str) -> list[Any]:
            member = SimpleNamespace(id=name, endpoints=(node.endpoint,))
            state: Any = SimpleNamespace(members={name: member})
            return _alive(node, state)

        assert alive("eu_2") == [("eu_2", (node.endpoint,))]
        assert alive("eu_1") == []
    finally:
        node.close()


class Attempts:
    """What `restore` makes of attempts that end as `script` says: f: in vain, n: in vain, with a new entry, s: with a state."""

    def __init__(self, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.asked, self.entries = iter(script), "", list[bytes]()
        monkeypatch.setattr(restoring, "_restore", self.attempt)
        nothing: Any = None
        restoring.restore(nothing, nothing, self.entries)

    def attempt(self, trainer: Any, journal: Any, entries: list[bytes], ask: bool) -> bool:
        self.asked += "m" if ask else "s"
        outcome = next(self.script)
        if outcome == "n":
            entries.append(b"")
        return outcome == "s"


@pytest.mark.parametrize(
    ("outcomes", "asked"),
    [
        ("s", "m"),
        ("fffffs", "mmmmms"),  # two members that disagree for ever: the store knows
        ("ffffnfffffs", "mmmmmmmmmms"),  # an entry may decide between them
        ("fffffffffffs", "mmmmmsmmmmms"),  # the store has nothing whole either, for now
    ],
)
def test_the_store_is_asked_if_members_are_in_vain(outcomes: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Attempts(outcomes, monkeypatch).asked == asked
