"""TenancyStore: where a registry keeps its tenants and keys, and who was refused. Owns the contract; knows no store.

Tenants and keys are one document. A change replaces it whole, if nobody else has changed it meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prefixes.tenancy.denial import Denial


@dataclass(frozen=True)
class Stored:
    """The document and its revision; ``closed`` says that a key was made once, whatever is left of it."""

    closed: bool
    revision: str
    data: bytes | None


class TenancyStore(Protocol):
    """Every method raises RegistryUnavailable where the store cannot be reached or is not the one that was opened."""

    def read(self, known: Stored | None = None) -> Stored:
        """What is kept now; ``known`` itself where nothing has changed since."""

    def replace(self, data: bytes, planned_on: str, *, closing: bool = False) -> bool:
        """Put ``data`` in the place of the document of revision ``planned_on``; False where another one is there.

        ``closing`` closes the registry for good, at the latest together with the change.
        """

    def used(self) -> dict[str, str]:
        """When keys were last used, by their ids, to the minute."""

    def note_used(self, times: Mapping[str, str]) -> None:
        """Note that keys were used. An older time replaces no newer one."""

    def forget_used(self, keys: Collection[str]) -> None:
        """Forget when these keys were used: they are no more."""

    def note_denials(self, tenant: str | None, denials: Sequence[Denial]) -> None:
        """Keep denials of a tenant's callers, None those without a known key; the oldest beyond DENIALS_KEPT go."""

    def denials(self, tenant: str | None) -> list[Denial]:
        """Those that are kept, the latest first."""
