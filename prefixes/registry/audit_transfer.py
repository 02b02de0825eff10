"""Copies a registry's audit into its backup, and back where it is gone. Owns when it is; knows no store.

A backup has the audit as it is, without entries of its own making. A restore brings a tenant's audit back where there
is none, before its tasks, and leaves one that is there: it may be newer. Denials go the same way.
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


def restore_audit(source: Store, target: Store, passed: Collection[str]) -> Failures:
    """Bring back what the target has none of."""

    def copy(tenant: str) -> None:
        if not target.audit(tenant, limit=1):
            target.replace_audit(tenant, source.audit(tenant, limit=AUDIT_KEPT)[::-1])

    def copy_denials(tenant: str | None) -> None:
        kept = source.tenancy.denials(tenant)
        if kept and not target.tenancy.denials(tenant):
            target.tenancy.note_denials(tenant, kept[::-1])

    return _copied(source, passed, copy, copy_denials)


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
