"""The process that trains one job, started by a worker: ``python -m trainer.service.child FOLDER``.

Owns the messages between it and the worker. It reports progress as JSON lines. "stop" on its input ends it before the
next training step, and the end of its input ends it at once. It has no credentials and knows neither registry nor
queue, and reaches no file but those that the job needs; all its results lie in the folder. Where memory runs out it is
the one that dies, and not the service.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from prefixes.errors import PrefixdError
from trainer.service.confinement import confine
from trainer.service.process import CONFINED, LOG, MAX_MEMORY

RATE_S: Final = 10.0
"""Speed and time left are averages over this many seconds."""


class Worker:
    """The worker at the other end of the pipes: takes messages, and may ask to stop."""

    def __init__(self, said: TextIO) -> None:
        self._said = said
        self._stop = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, event: str, **facts: Any) -> None:
        """Send one message. If the worker is gone, end this process."""
        try:
            self._said.write(json.dumps({"event": event, **facts}) + "\n")
            self._said.flush()
        except OSError:
            os._exit(1)

    def should_stop(self) -> bool:
        """Whether the worker asked to stop."""
        return self._stop.is_set()

    def _listen(self) -> None:
        for line in sys.stdin:
            if line.strip() == "stop":
                self._stop.set()
        os._exit(1)  # the worker is dead: another takes over, and the work of this process is lost


class Pace:
    """Speed over the last ``RATE_S`` seconds, from rising counts."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int, int]] = []  # time, steps, tokens

    def at(self, step: int, tokens: int, total: int) -> Mapping[str, float]:
        """Return ``tokens_per_s``, ``steps_per_s`` and ``seconds_left``; nothing before the second step."""
        now = time.monotonic()
        self._marks.append((now, step, tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] > RATE_S:
            self._marks.pop(0)
        began, first, counted = self._marks[0]
        if now <= began or step == first:
            return {}
        steps = (step - first) / (now - began)
        return {
            "tokens_per_s": round((tokens - counted) / (now - began), 1),
            "steps_per_s": round(steps, 3),
            "seconds_left": round((total - step) / steps, 1),
        }


def main(folder: Path) -> int:
    """Train, score and report. Return 0, or 1 after a ``failed`` message."""
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of libraries go to the log, not among the messages
    worker = Worker(said)
    try:
        from trainer.service.run_job import run_job  # imports torch; the thread above already hears "stop"

        version = run_job(folder, worker, Pace())
    except PrefixdError as error:
        worker.tell("failed", code=error.code, message=error.message)
        return 1
    except Exception as error:
        # The error's text may quote training data, so it stays in the folder's log.
        message = f"unexpected {type(error).__name__}; {LOG} in the job's folder says more"
        worker.tell("failed", code="internal", message=message)
        raise
    worker.tell("done", version=version)
    return 0


def give_way(max_memory: int | None) -> None:
    """Be the first that the system kills for want of memory, and allocate ``max_memory`` bytes at most.

    What this process starts inherits both. The limit counts private memory that can be written, not mapped files.
    """
    with contextlib.suppress(OSError):  # a system without /proc
        Path("/proc/self/oom_score_adj").write_text("1000")
    if max_memory is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        least = max_memory if hard == resource.RLIM_INFINITY else min(max_memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (least, least))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument(MAX_MEMORY, type=int)
    parser.add_argument(CONFINED, action="store_true")
    asked = parser.parse_args()
    give_way(asked.max_memory)
    if asked.confined:
        confine(asked.folder)  # before there is a second thread
    sys.exit(main(asked.folder))
