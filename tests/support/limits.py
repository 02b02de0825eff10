"""Gives tenants and keys limits of their own, in the registry's tenancy. Knows no test."""

from __future__ import annotations

from dataclasses import replace

from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import NO_LIMITS, Limits
from prefixes.tenancy.model import Tenancy
from prefixes.tenancy.store import TenancyStore


def set_limits(
    store: TenancyStore, tenant: str, limits: Limits = NO_LIMITS, keys: dict[str, Limits] | None = None
) -> None:
    """To a tenant that is there, and to some of the keys, by id."""

    def plan(state: Tenancy, at: str) -> Tenancy:
        tenants = {**state.tenants, tenant: replace(state.tenants[tenant], limits=limits)}
        own = {key_id: replace(state.keys[key_id], limits=one) for key_id, one in (keys or {}).items()}
        return replace(state, tenants=tenants, keys={**state.keys, **own})

    Directory(store)._change(plan)
