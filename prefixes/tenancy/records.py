"""The JSON of a registry's tenancy. Owns its form; what it says is ``model``'s. An unknown field is damage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from prefixes.errors import RegistryUnavailable
from prefixes.spec_json import canonical_json
from prefixes.tenancy.limits import NO_LIMITS, effective
from prefixes.tenancy.model import FORMAT, Change, Key, Share, Tenancy, Tenant

_ADAPTER: Final = TypeAdapter(Tenancy)


def tenancy_to_json(tenancy: Tenancy) -> bytes:
    """One text for each value."""
    plain = _ADAPTER.dump_python(tenancy, mode="json", exclude_defaults=True)
    return canonical_json(_sorted_sets({"format": FORMAT, **plain})).encode()


def tenancy_from_json(data: bytes | None) -> Tenancy:
    """What ``data`` says; an empty one where there is none. Raises RegistryUnavailable for anything else."""
    if data is None:
        return Tenancy()
    try:
        tenancy = _ADAPTER.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:120]
        raise RegistryUnavailable(f"registry: its tenants and keys: {where}: {first['msg'][:200]}") from None
    if tenancy.format != FORMAT:
        raise RegistryUnavailable(f"registry: its tenants and keys: expected format {FORMAT}, got {tenancy.format}")
    return tenancy


def revision_of(data: bytes | None) -> str:
    """The name of a state; "" where there is none."""
    return hashlib.sha256(data).hexdigest() if data is not None else ""


def tenant_to_dict(state: Tenancy, tenant: Tenant) -> dict[str, Any]:
    """A tenant as it is shown, with the number of its keys that are not revoked."""
    return {
        "name": tenant.name,
        "blocked": tenant.blocked,
        "weight": tenant.weight,
        "limits": dict(tenant.limits.given()),
        "limits_in_force": dict(effective(tenant.limits).given()),
        "created_at": tenant.created_at,
        "created_by": tenant.created_by,
        "keys": sum(key.revoked_at is None for key in state.keys_of(tenant.name)),
    }


def key_to_dict(state: Tenancy, key: Key, used: Mapping[str, str]) -> dict[str, Any]:
    """A key as it is shown: without its secrets, and with when it was last used. Its tenant's limits hold it too."""
    tenant = state.tenants.get(key.tenant)
    of_tenant = effective(tenant.limits if tenant else NO_LIMITS)
    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "limits": dict(key.limits.given()),
        "limits_in_force": dict(key.limits.within(of_tenant).given()),
        "created_at": key.created_at,
        "created_by": key.created_by,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": used.get(key.id),
    }


def change_to_dict(change: Change) -> dict[str, Any]:
    """A change of tenants, keys and shares as it is shown."""
    return {name: getattr(change, name) for name in ("at", "actor", "action", "what", "detail")}


def share_to_dict(share: Share) -> dict[str, Any]:
    """A share as it is shown."""
    return {"everyone": share.everyone, "tenants": sorted(share.tenants), "download": share.download}


def _sorted_sets(value: Any) -> Any:
    """With the lists that were sets in order. All other lists here are of objects."""
    if isinstance(value, dict):
        return {name: _sorted_sets(item) for name, item in value.items()}
    if isinstance(value, list):
        plain = all(isinstance(item, str) for item in value)
        return sorted(value) if plain else [_sorted_sets(item) for item in value]
    return value
