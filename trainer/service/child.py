"""The process that trains one job: ``python -m trainer.service.child FOLDER``, started by a worker.

Owns the conversation with the worker: what it does goes out as JSON lines, "stop" or the end of its input ends it. Has
no credentials and knows neither registry nor queue; everything it makes lies in the folder.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from prefixes.errors import PrefixdError
from trainer.service.process import LOG

RATE_S: Final = 10.0
"""Speed and time left are of the last so many seconds."""


class Worker:
    """The other end: told what happens, asked whether to go on."""

    def __init__(self, said: TextIO) -> None:
        self._said = said
        self._stop = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, event: str, **facts: Any) -> None:
        """One message. A worker that is gone is noticed by the thread that listens."""
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
        os._exit(1)  # the worker is dead: another takes over, and what this one does is lost


class Pace:
    """Speed over the last seconds, from counts that only grow."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int, int]] = []  # time, steps, tokens

    def at(self, step: int, tokens: int, total: int) -> Mapping[str, float]:
        """``tokens_per_s``, ``steps_per_s`` and ``seconds_left``; nothing before there are two steps."""
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
    """Train, score and report; 0, or 1 after a ``failed`` message."""
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not into the conversation
    worker = Worker(said)
    try:
        from trainer.service.run_job import run_job  # torch, only now: "stop" is heard while it is imported

        version = run_job(folder, worker, Pace())
    except PrefixdError as error:
        worker.tell("failed", code=error.code, message=error.message)
        return 1
    except Exception as error:
        # Its text may quote what is trained on: that stays in the log of the folder.
        message = f"unexpected {type(error).__name__}; {LOG} in the job's folder says more"
        worker.tell("failed", code="internal", message=message)
        raise
    worker.tell("done", version=version)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
