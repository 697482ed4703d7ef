"""The loop of a benchmark's process in the WAN lab: commands come as JSON lines, each is answered with one."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn


def obey(worker: Any) -> NoReturn:
    """Calls the methods of `worker` that the lines name, until they end. worker.node: its listening port."""
    print(json.dumps({"endpoint": worker.node.endpoint}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(worker, command.pop("do"))(**command)), flush=True)
    os._exit(0)
