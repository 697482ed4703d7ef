"""The loop of a benchmark's process in the WAN lab: commands come as JSON lines, each is answered with one."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn


def cpu_seconds() -> float:
    """Of this process and of those that its main thread has started and that live."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
    ticks = [sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) for pid in children]
    return usage.ru_utime + usage.ru_stime + sum(ticks) / os.sysconf("SC_CLK_TCK")


def obey(worker: Any) -> NoReturn:
    """Calls the methods of `worker` that the lines name, until they end. worker.endpoint: where others reach it."""
    print(json.dumps({"endpoint": worker.endpoint}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(worker, command.pop("do"))(**command)), flush=True)
    os._exit(0)
