"""Whom a region that starts takes for alive."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
