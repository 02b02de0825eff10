"""UsageMeter: sums what each caller's requests took, and hands the sums to the registry every few seconds.

Owns what is counted for whom, and its memory. An end costs the event loop one addition. While the registry is away
sums grow in place; where there are too many subjects, further ones lose their names and not their counts. What was not
handed over when the process is killed is lost: the last ``flush_s`` seconds, or all since the registry went away.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from itertools import count
from typing import Final

from prefixes.usage.model import Batch, Counts, Kind, Outcome, Subject, today
from prefixes.usage.outbox import CLOSE_S, Outbox
from prefixes.usage.store import UsageStore
from server.engine.types import Failed, Finished, FinishReason, GenerationRequest, Usage

MAX_HELD: Final = 50_000
"""Subjects that are told apart until they are handed over."""
BATCH: Final = 200
"""Subjects in one batch: a step of the store that others wait for."""
_NOTHING: Final = Usage(0, 0, 0)


class UsageMeter:
    """``ended`` is for the event loop; a thread hands over."""

    def __init__(self, store: UsageStore, flush_s: float) -> None:
        self._outbox = Outbox(store, self._batches, flush_s)
        self._writer, self._numbers = secrets.token_hex(8), count(1)
        self._lock = threading.Lock()  # held for an addition, or to take the sums away
        self._sums: dict[tuple[str, Subject], Counts] = {}

    def start(self) -> None:
        """Hand over from now on."""
        self._outbox.start()

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Hand over what is left, within ``timeout_s``; whether that worked."""
        return self._outbox.close(timeout_s)

    def ended(self, request: GenerationRequest, end: Finished | Failed) -> None:
        """Count a request to its caller; and to the owner of the task, without saying whose it was."""
        usage = end.usage or _NOTHING
        counts = Counts(1, usage.input_tokens, usage.prefix_tokens, usage.output_tokens)
        version = request.prefix.version if request.prefix else None
        outcome, day = _outcome(end), today()
        with self._lock:
            who = Subject(Kind.GENERATION, request.caller, request.key, request.task, version, outcome)
            self._add(day, who, counts)
            if request.owner is not None and request.owner != request.caller:
                self._add(day, Subject(Kind.SHARED, request.owner, None, request.task, version, outcome), counts)

    def _add(self, day: str, subject: Subject, counts: Counts) -> None:
        place = day, subject
        if place not in self._sums and len(self._sums) >= MAX_HELD:
            place = day, subject.folded
        before = self._sums.get(place)
        self._sums[place] = counts if before is None else before + counts

    def _batches(self) -> Iterator[Batch]:
        with self._lock:
            sums, self._sums = self._sums, {}
        by_day: dict[str, dict[Subject, Counts]] = {}
        for (day, subject), counts in sums.items():
            by_day.setdefault(day, {})[subject] = counts
        for day, found in sorted(by_day.items()):
            rows = list(found.items())
            for begin in range(0, len(rows), BATCH):
                yield Batch(self._writer, next(self._numbers), day, dict(rows[begin : begin + BATCH]))


def _outcome(end: Finished | Failed) -> Outcome:
    if isinstance(end, Failed):
        return Outcome.FAILED
    aborted = any(output.finish_reason is FinishReason.ABORT for output in end.outputs)
    return Outcome.ABORTED if aborted else Outcome.FINISHED
