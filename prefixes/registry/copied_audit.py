"""Copies a registry's audit into its backup, and back where it is gone. Owns when it is; knows no store.

A backup has the audit as it is, without entries of its own making. A restore brings a tenant's audit back where there
is none, and leaves one that is there: it may be newer. Denials go the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from prefixes.errors import RegistryUnavailable
from prefixes.registry.base import Store
from prefixes.registry.failed_tenants import FailedTenants
from prefixes.registry.limits import AUDIT_KEPT
from prefixes.tenancy.records import tenancy_from_json

Failures = list[tuple[str, str]]
"""Tenants whose audit was not copied ("*": perhaps several), and why."""


def back_up_audit(source: Store, target: Store, passed: Collection[str]) -> Failures:
    """Make the target's audit the source's, but that of tenants to be ``passed``."""

    def copy(tenant: str) -> None:
        target.replace_audit(tenant, source.audit(tenant, limit=AUDIT_KEPT)[::-1])

    def copy_denials(tenant: str | None) -> None:
        there = set(target.tenancy.denials(tenant))
        new = [denial for denial in source.tenancy.denials(tenant) if denial not in there]
        if new:
            target.tenancy.note_denials(tenant, new[::-1])

    return _copied(source, passed, copy, copy_denials)


class AuditRestore:
    """Made before the first task is restored: what the target has of its own then stays as it is."""

    def __init__(self, source: Store, target: Store) -> None:
        self._source, self._target = source, target
        # While a registry is being restored nobody else writes to it: all that is there is a restore's.
        self._empty = None if target.restoring else {name for name in source.tenants() if _is_empty(target, name)}

    def finish(self, passed: Collection[str]) -> Failures:
        """Bring back what there was none of, before the entries of the restore, but that of tenants to be ``passed``.

        Call it after the tasks: a tenant that lost its data and got none of it back stays lost.
        """
        source, target = self._source, self._target

        def copy(tenant: str) -> None:
            if self._empty is None or tenant in self._empty:
                entries = source.audit(tenant, limit=AUDIT_KEPT)
                known = set(entries)
                new = [entry for entry in target.audit(tenant, limit=AUDIT_KEPT) if entry not in known]
                if entries:
                    target.replace_audit(tenant, [*entries[::-1], *new[::-1]])

        def copy_denials(tenant: str | None) -> None:
            there = set(target.tenancy.denials(tenant))
            missing = [denial for denial in source.tenancy.denials(tenant) if denial not in there]
            if missing and (self._empty is None or not there):
                target.tenancy.note_denials(tenant, missing[::-1])

        return _copied(source, passed, copy, copy_denials)


def _is_empty(target: Store, tenant: str) -> bool:
    try:
        return not target.audit(tenant, limit=1)
    except RegistryUnavailable:  # of a tenant whose data is damaged: the restore of its tasks tells
        return False


def _copied(
    source: Store,
    passed: Collection[str],
    copy: Callable[[str], None],
    copy_denials: Callable[[str | None], None],
) -> Failures:
    failed = FailedTenants(source)
    try:
        for tenant in source.tenants():
            if tenant not in passed:
                with failed.skip_failed(tenant):
                    copy(tenant)
        for caller in (None, *tenancy_from_json(source.tenancy.read().data).tenants):
            copy_denials(caller)
    except RegistryUnavailable as error:
        failed.reasons["*"] = error.message
    return [(tenant, f"its audit: {why}") for tenant, why in failed.reasons.items()]
