"""Follows a job to its end, through broken connections and restarts of the service.

Owns when to retry and when to give up; knows neither how a request is made nor how a job is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, Final

from prefixes.errors import PrefixdError
from trainer.client.client import JobEvent, TrainerClient, TrainerUnavailable
from trainer.jobs.record import ENDED

PATIENCE_S: Final = 600.0
FIRST_WAIT_S: Final = 0.25
LONGEST_WAIT_S: Final = 5.0
PASSING: Final = frozenset({"trainer_unavailable", "shutting_down", "not_ready", "jobs_unavailable", "no_trainer"})
"""Codes of errors that may pass; ``no_trainer`` comes from a proxy."""


class JobWatch:
    """Follows one job. ``job`` is its last known record; once ``events`` has ended, its final one."""

    def __init__(
        self,
        client: TrainerClient,
        job_id: str,
        *,
        patience_s: float = PATIENCE_S,
        interrupted: Callable[[str], object] = lambda why: None,
        resumed: Callable[[], object] = lambda: None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask for the job once, without a retry: raises TrainerUnavailable, JobNotFound and the like.

        ``patience_s`` is how long to wait for a service that stopped answering. ``interrupted`` gets the reason;
        ``resumed`` is called when the service is back.
        """
        self._client, self._patience_s = client, patience_s
        self._interrupted, self._resumed, self._sleep, self._clock = interrupted, resumed, sleep, clock
        self._away_since: float | None = None
        self._wait_s = FIRST_WAIT_S
        self.job: dict[str, Any] = client.job(job_id)

    def events(self) -> Generator[JobEvent, None, None]:
        """Yield every event once, from the first to the job's end. Raises the last error when patience runs out."""
        after: str | None = None
        while True:
            told = False
            try:
                with self._client.events(self.job["id"], after) as events:
                    for event in events:
                        self._back()  # only now: a service that shuts down still opens streams, and ends them
                        if event is not None:
                            after, told = event.id, True
                            yield event
                self.job = self._client.job(self.job["id"])
            except PrefixdError as error:
                if error.code not in PASSING:
                    raise
                why = error
            else:
                if self.job["state"] in ENDED and not told:
                    return
                if told:
                    continue  # the job may have ended, or the service: ask again behind the last event
                why = TrainerUnavailable("the trainer has ended the stream, but not the job")
            self._away(why)

    def _back(self) -> None:
        self._wait_s = FIRST_WAIT_S
        if self._away_since is not None:
            self._away_since = None
            self._resumed()

    def _away(self, error: PrefixdError) -> None:
        """Wait a while, or raise ``error``."""
        now = self._clock()
        if self._away_since is None:
            self._away_since = now
            self._interrupted(error.message)
        if now - self._away_since + self._wait_s > self._patience_s:
            raise error
        self._sleep(self._wait_s)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
