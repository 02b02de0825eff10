"""Copies tenants, keys and shares from a registry to its backup and back. Owns which of two documents stays.

It comes before any task, so that a restored registry is never open.
"""

from __future__ import annotations

from prefixes.errors import RegistryUnavailable
from prefixes.registry.base import Store
from prefixes.tenancy.model import Tenancy
from prefixes.tenancy.records import tenancy_to_json


def copy_keys(source: Store, target: Store | None, *, mirror: bool, dry_run: bool) -> bool:
    """Whether they were copied, or would be.

    A backup takes them as they are. A restore leaves a registry that has some, since its revocations may be newer; but
    not one that is open, where the backup is closed.
    """
    if target is not None and target.id != source.id:
        return False
    stored = source.tenancy.read()
    there = target.tenancy.read() if target is not None else None
    if stored.data is None and not stored.closed:
        return False
    if target is None or there is None:
        return True
    closing = stored.closed and not there.closed
    data = stored.data or there.data or tenancy_to_json(Tenancy())
    if not closing and (there.data == data or (there.data is not None and not mirror)):
        return False
    if not dry_run and not target.tenancy.replace(data, there.revision, closing=closing):
        raise RegistryUnavailable("registry: the target's tenants and keys were changed meanwhile; try again")
    return True
