"""UsageMeter: sums what each caller's requests took, and hands the sums to the registry every few seconds.

Owns what is counted for whom, and its memory. An end costs the event loop one look-up and four additions. While the
registry is away sums grow in place; where there are too many subjects, further ones lose their names and not their
counts, and the owner of a shared task is not told of them. What was not handed over when the process is killed is lost:
the last ``flush_s`` seconds, or all since the registry went away.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from itertools import count
from typing import Final, NamedTuple

from prefixes.usage.model import OTHER, Batch, Counts, Kind, Outcome, Subject, today
from prefixes.usage.outbox import CLOSE_S, Outbox
from prefixes.usage.store import UsageStore
from server.engine.types import Failed, Finished, FinishReason, GenerationRequest, Usage

MAX_HELD: Final = 50_000
"""Subjects that are told apart until they are handed over."""
BATCH: Final = 200
"""Subjects in one batch: a step of the store that others wait for."""
_NOTHING: Final = Usage(0, 0, 0)


class _Place(NamedTuple):
    """What is told apart: a tuple, whose look-up costs little."""

    day: str
    caller: str
    key: str | None
    owner: str | None
    task: str | None
    version: str | None
    outcome: Outcome

    def subjects(self) -> Iterator[Subject]:
        """The caller's, and that of the owner of a task that is not the caller's."""
        _, caller, key, owner, task, version, outcome = self
        yield Subject(Kind.GENERATION, caller, key, task, version, outcome)
        if owner is not None and owner != caller:
            yield Subject(Kind.SHARED, owner, None, task, version, outcome)


class UsageMeter:
    """``ended`` is for the event loop; a thread hands over."""

    def __init__(self, store: UsageStore, flush_s: float) -> None:
        self._outbox = Outbox(store, self._batches, flush_s)
        self._writer, self._numbers = secrets.token_hex(8), count(1)
        self._lock = threading.Lock()  # held to add, or to take the sums away
        self._sums: dict[_Place, list[int]] = {}  # requests, then tokens of input, prefix and output

    def start(self) -> None:
        """Hand over from now on."""
        self._outbox.start()

    @property
    def recorded(self) -> bool:
        """Whether the last sums could be handed over."""
        return self._outbox.up

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Hand over what is left, within ``timeout_s``; whether that worked."""
        return self._outbox.close(timeout_s)

    def ended(self, request: GenerationRequest, end: Finished | Failed) -> None:
        """Count a request to its caller; and to the owner of the task, without saying whose it was."""
        usage, version = end.usage or _NOTHING, request.prefix.version if request.prefix else None
        place = _Place(today(), request.caller, request.key, request.owner, request.task, version, _outcome(end))
        with self._lock:
            sums = self._sums.get(place)
            if sums is None:
                if len(self._sums) >= MAX_HELD:
                    place = _Place(place.day, place.caller, None, None, OTHER, None, place.outcome)
                sums = self._sums.setdefault(place, [0, 0, 0, 0])
            sums[0] += 1
            sums[1] += usage.input_tokens
            sums[2] += usage.prefix_tokens
            sums[3] += usage.output_tokens

    def _batches(self) -> Iterator[Batch]:
        with self._lock:
            taken, self._sums = self._sums, {}
        by_day: dict[str, dict[Subject, Counts]] = {}
        for place, sums in taken.items():
            found, counts = by_day.setdefault(place.day, {}), Counts(*sums)
            for subject in place.subjects():
                found[subject] = found.get(subject, Counts()) + counts
        for day, found in sorted(by_day.items()):
            rows = list(found.items())
            for begin in range(0, len(rows), BATCH):
                yield Batch(self._writer, next(self._numbers), day, dict(rows[begin : begin + BATCH]))


def _outcome(end: Finished | Failed) -> Outcome:
    if isinstance(end, Failed):
        return Outcome.FAILED
    aborted = any(output.finish_reason is FinishReason.ABORT for output in end.outputs)
    return Outcome.ABORTED if aborted else Outcome.FINISHED
