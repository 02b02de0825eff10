"""What can go wrong with a job, from outside and from inside."""

from __future__ import annotations

from prefixes.errors import PrefixdError


class JobNotFound(PrefixdError):
    """The tenant has no such job."""

    code = "job_not_found"

    def __init__(self, job: str) -> None:
        super().__init__(f"job {job}: expected one of the tenant's jobs, found none", job=job)


class JobConflict(PrefixdError):
    """The job is in a state in which this cannot be done."""

    code = "conflict"


class JobStoreUnavailable(PrefixdError):
    """The place where jobs are kept cannot be reached or read."""

    code = "jobs_unavailable"


class Fenced(PrefixdError):
    """A worker asks for a job that is not, or no longer, its own."""

    code = "fenced"

    def __init__(self, job: str, token: int, current: int, state: str) -> None:
        super().__init__(f"{job}: delivery {token} may not write: {current} is the newest, the job is {state}", job=job)
