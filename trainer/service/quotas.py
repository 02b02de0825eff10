"""What a tenant and a key may have at the trainer, by their limits as they are now; anything where no key is needed.

Owns which limit bounds what; counts nothing. Knows neither route nor store.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.limits import NO_LIMITS, Limits
from trainer.data.quota import ByteQuota
from trainer.jobs.room import Room
from trainer.service.settings import TrainerSettings


@dataclass(frozen=True)
class Quotas:
    """The limits of whoever asks, beside the bounds that the service has for everybody."""

    settings: TrainerSettings
    keyring: Keyring

    def room(self, tenant: str, key_id: str | None) -> Room:
        """For open jobs of ``tenant`` with the rights of that key."""
        of_tenant, of_key = self._limits(tenant, key_id)
        return Room(self.settings.max_open_jobs, of_tenant.open_jobs, of_key.open_jobs)

    def dataset_bytes(self, tenant: str, key_id: str | None) -> ByteQuota:
        """For datasets of ``tenant`` that are uploaded with that key."""
        of_tenant, of_key = self._limits(tenant, key_id)
        return ByteQuota(of_tenant.dataset_bytes, of_key.dataset_bytes, key_id)

    def _limits(self, tenant: str, key_id: str | None) -> tuple[Limits, Limits]:
        return (NO_LIMITS, NO_LIMITS) if key_id is None else self.keyring.limits_of(tenant, key_id)
