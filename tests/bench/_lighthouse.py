"""torchft's lighthouse at 127.0.0.1:PORT with a join timeout of MILLISECONDS, once a line comes on stdin: so that an outage lasts
as long as tests.bench.failover says, and not for the seconds that imports take."""

from __future__ import annotations

import os
import sys
import threading

os.environ.setdefault("RUST_LOG", "error")

from torchft.coordination import LighthouseServer

from elastic.lighthouse import HEARTBEAT_TIMEOUT

if __name__ == "__main__":
    port, milliseconds = map(int, sys.argv[1:])
    sys.stdin.readline()
    server = LighthouseServer(
        bind=f"127.0.0.1:{port}",
        min_replicas=1,
        join_timeout_ms=milliseconds,
        heartbeat_timeout_ms=int(1000 * HEARTBEAT_TIMEOUT),
    )
    print("serving", flush=True)
    threading.Event().wait()
