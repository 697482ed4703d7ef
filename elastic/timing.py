"""How long the coordinator waits for what."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass
class Timing:
    peer_timeout: float = 5.0
    stall_timeout: float = 30.0

    def delay(self, kind: str) -> float:
        """Seconds until an alarm of this kind."""
        bases = {
            "soon": 0.02,
            "jitter": 0.2,
            "retry": 1.0,
            "patience": 2.0,
            "resend": 5.0,
            "minority": self.peer_timeout + 5.0,
        }
        return bases[kind] * (1 + random.random())
