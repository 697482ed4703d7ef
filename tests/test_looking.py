"""What a region finds before it starts: whose directory it is, and whether there is a lighthouse."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diloco import looking
from diloco.composing import compose_config
from diloco.config import Config
from diloco.errors import ConfigError
from diloco.looking import look, take_directory
from elastic.lighthouse import AwayError, LighthouseError
from tests.test_journal import Log, joining, opening


class Found:
    """A journal of this state. meanwhile: what another region does while it is read."""

    def __init__(self, state: Any, meanwhile: Any = lambda: None) -> None:
        self.state, self.read, self.proved = state, meanwhile, False
        self.store = SimpleNamespace(prove=self.prove)

    def prove(self) -> None:
        self.proved = True


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(looking, "find_or_serve", lambda *args, **kwargs: None)
    return compose_config(["region.name=eu", f"run.dir={tmp_path / 'run'}"])


def looked(cfg: Config, found: Found) -> bool:
    """Whether the store had to prove itself."""
    with ExitStack() as stack:
        look(cfg, found, stack)  # type: ignore[arg-type]
    return found.proved


def test_a_run_that_another_region_opens_at_the_same_time_is_not_another_run(cfg: Config) -> None:
    """Its directory is taken just after the journal was read, and found to hold none."""
    assert looked(cfg, Found(None, lambda: take_directory(cfg, "run")))


def test_a_directory_of_another_run_is_refused(cfg: Config) -> None:
    state = Log(opening()).state
    take_directory(cfg, "run")
    assert not looked(cfg, Found(state))
    take_directory(cfg, "other")
    for found, there in ((Found(state), "run run"), (Found(None), "none")):
        with pytest.raises(ConfigError, match=f"is of run other, but run.store=.* holds {there}: set run.dir"):
            looked(cfg, found)
        assert not found.proved


@pytest.mark.parametrize("error", [AwayError("it does not answer"), LighthouseError("it speaks something else")])
def test_only_a_run_with_members_is_joined_without_a_lighthouse(
    cfg: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: LighthouseError
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(looking, "find_or_serve", refuse)
    with_members, without = Found(Log(opening(), joining("us_1")).state), Found(Log(opening()).state)
    for found in (without, Found(None)):
        with pytest.raises(ConfigError, match=str(error)):
            looked(cfg, found)
        assert not found.proved
    if isinstance(error, AwayError):
        looked(cfg, with_members)
        assert "warning: it does not answer" in capsys.readouterr().out
    else:
        with pytest.raises(ConfigError, match=str(error)):
            looked(cfg, with_members)
