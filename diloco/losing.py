"""What a member does that cannot get a committed round's bits from anybody. Pure; `docs/protocol.md` has the rules."""

from __future__ import annotations

from dataclasses import dataclass

from diloco.state import State


@dataclass
class Search:
    """For the bits of one round. Seconds are this member's own, of a clock that only goes forward."""

    round: int
    patience: float
    """Seconds that whoever has them gets to answer, or to upload."""
    head: int = -1
    head_at: float = 0.0
    said: tuple[int | None, int | None] = (None, None)
    said_at: float = 0.0

    def move(self, state: State, now: float) -> str:
        """over: nobody needs them any more; lost, rewind: append such an entry at the next seq; wait."""
        if state.epoch >= self.round or state.stopped is not None:
            return "over"
        self._look(state, now)
        lost, had = self.said
        if lost is not None and lost == state.seq:
            return "rewind" if now - self.head_at >= self.patience else "wait"
        if lost is None and had is None:
            return "lost"
        return "lost" if now - self.said_at >= self.patience else "wait"

    def _look(self, state: State, now: float) -> None:
        if state.seq != self.head:
            self.head, self.head_at = state.seq, now
        said = state.lost.get(self.round), state.had.get(self.round)
        if said != self.said:
            self.said, self.said_at = said, now
