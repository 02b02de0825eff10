"""Pages of jobs, a tenant's or all: so many jobs, or so many bytes of them, whichever is less.

Owns how much one look reads and one answer holds; knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from server.web.responses import to_json
from trainer.jobs.base import PAGE, JobStore
from trainer.jobs.record import Job
from trainer.service.schemas import JobsQuery

PAGE_BYTES: Final = 1 << 20
"""A page ends with the job that reaches so many bytes of JSON."""


async def page_of(
    store: JobStore, tenant: str | None, query: JobsQuery, body: Callable[[Job], dict[str, Any]]
) -> tuple[list[dict[str, Any]], str | None]:
    """Return the jobs that ``query`` asks for, as ``body`` makes them, and the ``before`` of the next page, if any."""
    shown: list[dict[str, Any]] = []
    before, size = query.before, 0
    while True:
        wanted = min(PAGE, query.limit - len(shown) + 1)  # one more tells whether there is a next page
        found = await store.jobs(tenant, limit=wanted, before=before, state=query.state)
        bodies, sizes = await asyncio.to_thread(_measured, found, body)
        for told, length in zip(bodies, sizes, strict=True):
            if len(shown) == query.limit or size >= PAGE_BYTES:
                return shown, shown[-1]["id"]
            shown.append(told)
            size += length
        if len(found) < wanted:
            return shown, None
        before = shown[-1]["id"]


def _measured(jobs: list[Job], body: Callable[[Job], dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    bodies = [body(job) for job in jobs]
    return bodies, [len(to_json(told)) for told in bodies]
