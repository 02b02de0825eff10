"""How many open jobs a tenant and a key may have. Owns the three bounds and which error each is; counts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prefixes.errors import QueueFull, QuotaExceeded


@dataclass(frozen=True)
class Room:
    """Queued and running jobs, None for any number. A job that opens beside as many is refused."""

    most: int | None = None  # of any tenant, as the service is set
    of_tenant: int | None = None  # by the tenant's limit
    of_key: int | None = None  # by the limit of the key with whose rights the job publishes

    @property
    def bounded(self) -> bool:
        """Whether there is anything to count."""
        return (self.most, self.of_tenant, self.of_key) != (None, None, None)

    def check(self, of_tenant: int, of_key: int) -> None:
        """Raise QuotaExceeded or QueueFull if there is no room for one more beside so many."""
        if self.of_tenant is not None and of_tenant >= self.of_tenant:
            raise _exceeded("tenant", self.of_tenant, of_tenant)
        if self.of_key is not None and of_key >= self.of_key:
            raise _exceeded("key", self.of_key, of_key)
        if self.most is not None and of_tenant >= self.most:
            raise QueueFull(
                f"jobs: expected at most {self.most} queued and running, got {of_tenant} and one more",
                expected=self.most,
            )


UNBOUNDED: Final = Room()


def _exceeded(whose: str, limit: int, found: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"open_jobs: the {whose}'s limit is {limit} queued and running jobs, got {found} and one more",
        limit="open_jobs", of=whose, expected=limit, got=found + 1,
    )  # fmt: skip
