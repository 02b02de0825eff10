"""Training steps of a day: reserved when a job is queued, settled with those that ran when it has ended.

Owns the reservation of one attempt of a job and the errors of this limit. Knows no store and no queue. A reservation
counts for the day, of UTC, on which it was made, whatever the job does on later days.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from prefixes.errors import InvalidParameter, QuotaExceeded
from prefixes.limiter.base import DAY_S, Charge, Limiter, Refused
from prefixes.limiter.charges import charges_for
from prefixes.tenancy.keyring import Keyring
from trainer.jobs.record import Job

COUNTER: Final = "training_steps"
LIMIT: Final = "training_steps_per_day"
UNQUEUED_S: Final = 600.0
"""A reservation is given back after this time if its job was never queued, because the process died."""
QUEUED_S: Final = DAY_S
"""After this time it counts for no day any more."""


@dataclass(frozen=True)
class StepReservations:
    """Reserves for the jobs of all tenants. Where nobody needs a key nothing is limited."""

    limiter: Limiter
    keyring: Keyring

    @asynccontextmanager
    async def reserved(self, tenant: str, key_id: str | None, steps: int) -> AsyncIterator[str | None]:
        """Give the id of a reservation of ``steps`` for a job that the block queues, None if there is no limit.

        Nothing stays reserved if the block fails. Raises QuotaExceeded, InvalidParameter above the whole limit.
        """
        charges = self._charges(tenant, key_id, steps)
        if not charges:
            yield None
            return
        reservation = f"training:{secrets.token_hex(12)}"
        for charge in charges:
            if charge.is_impossible:
                raise _above(charge)
        answer = await asyncio.to_thread(self.limiter.take, tenant, reservation, charges, UNQUEUED_S)
        if isinstance(answer, Refused):
            raise _refused(answer)
        try:
            yield reservation
        except Exception:
            await self._settle(tenant, reservation, 0)
            raise
        await asyncio.to_thread(self.limiter.renew, tenant, [reservation], QUEUED_S)

    async def settle(self, job: Job) -> None:
        """Give back what the last attempt of a job that has ended did not use. Once: it changes nothing again."""
        if job.reservation is not None:
            await self._settle(job.tenant, job.reservation, job.steps - job.steps_before)

    async def close(self) -> None:
        """Close the limiter."""
        await asyncio.to_thread(self.limiter.close)

    def _charges(self, tenant: str, key_id: str | None, steps: int) -> tuple[Charge, ...]:
        if key_id is None:
            return ()
        of_tenant, of_key = self.keyring.limits_of(tenant, key_id)
        return charges_for({COUNTER: steps}, of_tenant, key_id, of_key)

    async def _settle(self, tenant: str, reservation: str, steps: int) -> None:
        await asyncio.to_thread(self.limiter.settle, tenant, reservation, {COUNTER: steps})


def _whose(charge: Charge) -> str:
    return "tenant" if charge.key is None else "key"


def _above(charge: Charge) -> InvalidParameter:
    return InvalidParameter(
        f"{LIMIT} of the {_whose(charge)}: expected a job of at most {charge.limit} steps, got one that may take "
        f"{charge.amount}: fewer epochs, or a larger batch_size, take less",
        parameter="hyperparameters", limit=LIMIT, of=_whose(charge), expected=charge.limit, got=charge.amount,
    )  # fmt: skip


def _refused(answer: Refused) -> QuotaExceeded:
    state = answer.by
    charge, got = state.charge, state.used + state.charge.amount
    return QuotaExceeded(
        f"{LIMIT} of the {_whose(charge)}: expected at most {charge.limit}, got {got}: {state.used} used or reserved, "
        f"and {charge.amount} that this job may take",
        limit=LIMIT, of=_whose(charge), expected=charge.limit, got=got, resets_in_s=round(state.reset_s),
    )  # fmt: skip
