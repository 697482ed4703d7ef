"""A rank's own end of its uploader: hands it jobs, hears its answers, replaces it when it dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckpt.arena import Arena
from ckpt.uploader import DISMISSED

TRIES = 5
"""Uploaders that a job gets."""
OVERTIME = 60.0
"""Seconds after its deadline at which an uploader that does not answer is ended."""


class Uploads:
    """One job at a time. Any thread."""

    def __init__(self, arena: Arena, url: str) -> None:
        self.arena, self.url = arena, url
        self._turn = threading.Condition()
        self._job: dict[str, Any] | None = None
        self._tries = 0
        self._said = set[str]()
        """Prefixes of the job that have been answered."""
        self._answers: list[dict[str, Any]] = []
        self._process: subprocess.Popen[str] | None = self._start()

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def busy(self) -> bool:
        """Whether the arena is still being uploaded."""
        with self._turn:
            late = self._job is not None and time.monotonic() > self._job["until"] + OVERTIME
            if late and self._process is not None:
                self._process.kill()  # its answers end, and with them the job
            return self._job is not None

    def submit(self, job: dict[str, Any]) -> None:
        """job: as ckpt.uploader takes it, with `id`, `until` and `attempts`; no other may be under way."""
        with self._turn:
            assert self._job is None
            self._job, self._tries = job, 0
            self._said.clear()
            self._process = self._process or self._start()
            self._send(self._process)

    def answers(self) -> list[dict[str, Any]]:
        """Those since the last call."""
        if not self._answers:
            return []
        with self._turn:
            found, self._answers = self._answers, []
        return found

    def wait(self, seconds: float) -> bool:
        """Until the job is done, if that is so in time."""
        with self._turn:
            return self._turn.wait_for(lambda: self._job is None, seconds)

    def dismiss(self) -> None:
        """The uploader keeps nothing for a successor."""
        with self._turn:
            if self._process is not None and self._process.stdin is not None:
                with suppress(OSError, ValueError):
                    self._process.stdin.write(json.dumps(DISMISSED) + "\n")
                    self._process.stdin.flush()

    def close(self) -> None:
        """The uploader ends by itself, after its job, and after it has kept the arena for a while unless it was dismissed."""
        with self._turn:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def _start(self) -> subprocess.Popen[str]:
        path = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-m", "ckpt.uploader", str(self.arena.descriptor), self.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[self.arena.descriptor],
            start_new_session=True,  # a signal to this rank's group is none to it: it finishes
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )
        threading.Thread(target=self._listen, args=(process,), name="uploads", daemon=True).start()
        return process

    def _send(self, process: subprocess.Popen[str]) -> None:
        """In a thread: the uploader may still be starting, or clean up after the last job, and a pipe does not hold much."""
        line = json.dumps(self._job) + "\n"

        def send() -> None:
            assert process.stdin is not None
            with suppress(OSError, ValueError):  # it has died: whoever listens to it sends the job to the next one
                process.stdin.write(line)
                process.stdin.flush()

        threading.Thread(target=send, name="job", daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{") and line.endswith("}\n"):  # not a library's word, and not cut off by a kill
                self._heard(json.loads(line))
        code = process.wait()
        with self._turn:
            self._process = None
            if code:
                self._answers.append({"died": f"the uploader of checkpoints has ended ({code})"})
            if self._job is not None and self._gives_up():
                self._fail()
            if self._job is None:
                return  # the next job starts one
        time.sleep(min(0.1 * 2**self._tries, 5.0))
        with self._turn:
            self._tries += 1
            self._process = self._start()
            self._send(self._process)

    def _gives_up(self) -> bool:
        assert self._job is not None
        return self._tries + 1 >= TRIES or time.monotonic() > self._job["until"]

    def _heard(self, answer: dict[str, Any]) -> None:
        with self._turn:
            if "done" in answer:
                self._job = None
                self._turn.notify_all()
            elif "prefix" not in answer or answer["prefix"] not in self._said:
                self._said.add(answer.get("prefix", ""))
                self._answers.append(answer)

    def _fail(self) -> None:
        assert self._job is not None
        reason = f"{self._tries + 1} uploader(s) have died of it, or it took too long"
        for attempt in self._job["attempts"]:
            if attempt["prefix"] not in self._said:
                self._answers.append({"prefix": attempt["prefix"], "kind": "failed", "mine": False, "reason": reason})
        self._job = None
        self._turn.notify_all()
