"""The errors of jobs: those a caller sees, and ``Fenced``, which only a worker sees."""

from __future__ import annotations

from prefixes.errors import PrefixdError


class JobNotFound(PrefixdError):
    """The tenant has no such job."""

    code = "job_not_found"

    def __init__(self, job: str) -> None:
        super().__init__(f"job {job}: expected one of the tenant's jobs, found none", job=job)


class JobConflict(PrefixdError):
    """The job's state does not allow this."""

    code = "conflict"


class JobStoreUnavailable(PrefixdError):
    """The job store cannot be reached or read."""

    code = "jobs_unavailable"


class Fenced(PrefixdError):
    """A worker asks to change a job that another delivery owns."""

    code = "fenced"

    def __init__(self, job: str, token: int, current: int, state: str) -> None:
        super().__init__(f"{job}: delivery {token} may not write: {current} is the newest, the job is {state}", job=job)
