"""TrainerClient: a running trainer service over HTTP.

Owns the caller's side of its routes: paths, bodies, the upload's bytes, the form of a job's events. The service's error
codes become its named errors. Never waits or retries; ``watch`` does. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

import trainer.data.errors
import trainer.jobs.errors  # noqa: F401  # what the service's codes mean here
from prefixes.errors import InvalidName, PrefixdError
from prefixes.event_stream import EventDecoder, ServerSentEvent
from prefixes.remote import Remote
from trainer.data.files import DatasetNotFound, check_digest
from trainer.data.lines import InvalidData

CHUNK: Final = 1 << 20
"""Bytes of a dataset that are in memory at a time."""
_JOB: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}")


class TrainerUnavailable(PrefixdError):
    """The trainer cannot be reached, or the answer is not a trainer's."""

    code = "trainer_unavailable"


@dataclass(frozen=True)
class JobEvent:
    """A ``state`` or ``progress`` event of a job. ``id`` serves as ``after`` to continue behind it."""

    id: str
    name: str
    data: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """JSON values: ``id``, ``event``, ``data``."""
        return {"id": self.id, "event": self.name, "data": dict(self.data)}


class TrainerClient:
    """A context manager. Every method raises TrainerUnavailable and the errors that the service names."""

    def __init__(self, url: str, *, api_key: str | None = None, client: httpx.Client | None = None) -> None:
        """``url`` is the service's address, such as ``http://localhost:8100``."""
        self._trainer = Remote("trainer", TrainerUnavailable, url, api_key=api_key, client=client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the connections."""
        self._trainer.close()

    # --- datasets ---

    def dataset(self, digest: str) -> dict[str, Any] | None:
        """Return a dataset's facts, or None if the service does not have it."""
        try:
            return self._object(self._trainer.json("GET", f"/datasets/{check_digest(digest)}"), "dataset", str)
        except DatasetNotFound:
            return None

    def datasets(self, *, tenant: str | None = None) -> list[dict[str, Any]]:
        """Return the facts of every dataset, newest first: one's own, an operator's those of ``tenant`` or of all."""
        return self._listed(self._trainer.json("GET", "/datasets", params=_of(tenant)), "datasets", "dataset")

    def upload(
        self, path: Path, size: int, *, name: str | None = None, sent: Callable[[int], object] = lambda count: None
    ) -> dict[str, Any]:
        """Upload the first ``size`` bytes of a file and return the dataset's facts.

        ``sent`` gets the number of bytes of each part. Raises InvalidData if the file cannot be read or is shorter.
        """
        answer = self._trainer.json(
            "POST",
            "/datasets",
            params={} if name is None else {"name": name},
            headers={"content-type": "application/x-ndjson", "content-length": str(size)},
            content=_parts(path, size, sent),
        )
        return self._object(answer, "dataset", str)

    def delete_dataset(self, digest: str, *, tenant: str | None = None) -> None:
        """Delete a dataset, one's own or for an operator ``tenant``'s. Raises DatasetNotFound, Conflict if a job needs
        it.
        """
        self._trainer.send("DELETE", f"/datasets/{check_digest(digest)}", params=_of(tenant))

    # --- jobs ---

    def submit(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Submit ``body``, the service's JobBody, and return the queued job."""
        return self._job(self._trainer.json("POST", "/jobs", json=dict(body)))

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job. Raises JobNotFound."""
        return self._job(self._trainer.json("GET", _path(job_id)))

    def jobs(self, *, state: str | None = None, tenant: str | None = None, limit: int) -> list[dict[str, Any]]:
        """Return the newest ``limit`` jobs, or the newest in ``state``, from as many pages as it takes.

        One's own tenant's; an operator's those of ``tenant`` or of all.
        """
        found: list[dict[str, Any]] = []
        before = None
        while len(found) < limit:
            wanted = {"state": state, "limit": min(1000, limit - len(found)), "before": before}
            given = {name: value for name, value in wanted.items() if value is not None}
            page = self._trainer.json("GET", "/jobs", params={**given, **_of(tenant)})
            found += map(self._job, self._listed(page, "jobs", "id"))
            before = page.get("next")
            if before is None:
                break
        return found[:limit]

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job; return it, cancelled or with the cancel requested. Raises JobNotFound, Conflict."""
        return self._job(self._trainer.json("POST", f"{_path(job_id)}/cancel"))

    def retry(self, job_id: str) -> dict[str, Any]:
        """Queue a job again and return it. Raises JobNotFound, Conflict."""
        return self._job(self._trainer.json("POST", f"{_path(job_id)}/retry"))

    def delete(self, job_id: str) -> None:
        """Delete an ended job. Raises JobNotFound, Conflict."""
        self._trainer.send("DELETE", _path(job_id))

    def report(self, job_id: str, form: str) -> bytes:
        """Return a finished job's report; ``form`` is html or json. Raises JobNotFound, Conflict."""
        return self._trainer.send("GET", f"{_path(job_id)}/report", params={"format": form}).content

    @contextmanager
    def events(self, job_id: str, after: str | None = None) -> Iterator[Iterator[JobEvent | None]]:
        """Stream the job's events from the first, or from behind the one with the id ``after``. None is a heartbeat.

        The stream ends with the job or with the service. It is empty if the job has ended and no event is left. The
        service has answered when the block begins; the iterator raises the same errors as every method.
        """
        headers = {"accept": "text/event-stream"} | ({} if after is None else {"last-event-id": after})
        with self._trainer.stream("GET", f"{_path(job_id)}/events", headers=headers) as response:
            yield self._events(response.iter_bytes())

    # --- inside ---

    def _events(self, pieces: Iterable[bytes]) -> Iterator[JobEvent | None]:
        decoder = EventDecoder()
        for piece in pieces:
            for event in decoder.feed(piece):
                yield None if event is None else self._job_event(event)

    def _job_event(self, event: ServerSentEvent) -> JobEvent:
        try:
            data = json.loads(event.data)
        except ValueError:
            data = None
        if not isinstance(data, dict) or event.id is None or event.name is None:
            raise self._trainer.foreign("an event of a job")
        return JobEvent(event.id, event.name, data)

    def _job(self, answer: Any) -> dict[str, Any]:
        job = self._object(answer, "id", str)
        self._object(job, "state", str)
        return job

    def _object(self, answer: Any, field: str, kind: type) -> dict[str, Any]:
        if not isinstance(answer, dict) or not isinstance(answer.get(field), kind):
            raise self._trainer.foreign(f"an object with {field!r}")
        return answer

    def _listed(self, answer: Any, field: str, within: str) -> list[dict[str, Any]]:
        items: list[Any] = self._object(answer, field, list)[field]
        return [self._object(item, within, str) for item in items]


def _of(tenant: str | None) -> dict[str, str]:
    return {} if tenant is None else {"tenant": tenant}


def _path(job_id: str) -> str:
    """Check the id, so that no input reaches another route. Raises InvalidName."""
    if not _JOB.fullmatch(job_id):
        raise InvalidName(f"job: expected an id, job-…, got {job_id[:80]!r}", got=job_id[:80])
    return f"/jobs/{job_id}"


def _parts(path: Path, size: int, sent: Callable[[int], object]) -> Iterator[bytes]:
    left = size
    try:
        with path.open("rb", buffering=0) as file:
            while left:
                part = file.read(min(CHUNK, left))
                if not part:
                    found = size - left
                    raise InvalidData(f"{path}: expected {size} bytes, found {found}: it changed while it was sent")
                left -= len(part)
                yield part
                sent(len(part))
    except OSError as error:
        raise InvalidData(f"{path}: expected a file, got {error.strerror or error}") from error
