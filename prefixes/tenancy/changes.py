"""How tenants, keys and shares change: pure functions from Tenancy to Tenancy, each with its entry in ``changes``.

Owns the rules. Knows no store and makes no secret; ``at`` is now, and ``actor`` who asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from prefixes.errors import Conflict
from prefixes.spec import check_name
from prefixes.tenancy.limits import MAX_LIMIT, NAMES, NO_LIMITS, Limits
from prefixes.tenancy.model import (
    CHANGES_KEPT,
    MAX_KEYS,
    MAX_KEYS_OF_A_TENANT,
    MAX_SHARES,
    MAX_SHARES_OF_A_TENANT,
    MAX_TENANTS,
    SERVICE_SCOPES,
    WEIGHTS,
    Change,
    InvalidKey,
    Key,
    KeyNotFound,
    Secret,
    Share,
    Tenancy,
    Tenant,
)
from prefixes.tenancy.secret import without_secrets

MAX_KEY_NAME = 100


def with_tenant(state: Tenancy, name: str, *, at: str, actor: str) -> Tenancy:
    """``state`` with that tenant. Raises Conflict where there is one."""
    check_name("tenant", name)
    if name in state.tenants:
        raise Conflict(f"tenant {name}: expected a new one, found it here")
    _bounded("tenants", len(state.tenants) + 1, MAX_TENANTS)
    tenants = {**state.tenants, name: Tenant(name, at, actor)}
    return _noted(replace(state, tenants=tenants), Change(at, actor, "tenant-create", name, name))


def with_block(state: Tenancy, name: str, blocked: bool, *, at: str, actor: str) -> Tenancy:
    """``state`` with the tenant blocked, or no longer."""
    tenant = tenant_of(state, name)
    if tenant.blocked == blocked:
        return state
    tenants = {**state.tenants, name: replace(tenant, blocked=blocked)}
    action = "tenant-block" if blocked else "tenant-unblock"
    return _noted(replace(state, tenants=tenants), Change(at, actor, action, name, name))


def with_tenant_limits(
    state: Tenancy,
    name: str,
    given: Mapping[str, int | None],
    *,
    weight: float | None = None,
    at: str,
    actor: str,
) -> Tenancy:
    """``state`` with these limits of the tenant, and that weight if one is given. Raises InvalidKey, KeyNotFound."""
    tenant = tenant_of(state, name)
    changed = replace(tenant, limits=limits_with(tenant.limits, given))
    told = _told(tenant.limits, changed.limits)
    if weight is not None:
        least, most = WEIGHTS
        if not least <= weight <= most:
            raise InvalidKey(f"weight: expected {least:g} to {most:g}, got {weight:g}")
        if weight != tenant.weight:
            changed, told = replace(changed, weight=float(weight)), [f"weight {weight:g}", *told]
    if changed == tenant:
        return state
    change = Change(at, actor, "tenant-limits", name, name, ", ".join(told))
    return _noted(replace(state, tenants={**state.tenants, name: changed}), change)


def with_key_limits(
    state: Tenancy, key_id: str, given: Mapping[str, int | None], *, at: str, actor: str, tenant: str | None = None
) -> Tenancy:
    """``state`` with these limits of the key. One above its tenant's is taken; the tenant's holds beside it.

    Raises InvalidKey, KeyNotFound.
    """
    key = key_of(state, key_id, tenant)
    changed = replace(key, limits=limits_with(key.limits, given))
    if changed == key:
        return state
    detail = ", ".join(_told(key.limits, changed.limits))
    return _with(state, changed, Change(at, actor, "key-limits", key.tenant, key_id, detail))


def limits_with(own: Limits, given: Mapping[str, int | None]) -> Limits:
    """``own`` with what is given; None takes a limit away, and 0 forbids. Raises InvalidKey."""
    for name, value in given.items():
        if name not in NAMES:
            raise InvalidKey(f"limits: expected some of {', '.join(NAMES)}; got {name[:60]}")
        if value is not None and (isinstance(value, bool) or not 0 <= value <= MAX_LIMIT):
            raise InvalidKey(
                f"{name}: expected a whole number from 0 to {MAX_LIMIT}, or nothing; got {value}",
                parameter=name, expected=[0, MAX_LIMIT], got=value,
            )  # fmt: skip
    return replace(own, **given)


def with_key(state: Tenancy, key: Key) -> Tenancy:
    """``state`` with a new key, and its tenant if that is new too. Raises InvalidKey, Conflict.

    Where its tenant has no room the oldest of its keys that have ended is forgotten.
    """
    at, actor = key.created_at, key.created_by
    check_name("tenant", key.tenant)
    if not key.name or len(key.name) > MAX_KEY_NAME or not key.name.isprintable():
        raise InvalidKey(f"key name: expected 1 to {MAX_KEY_NAME} printable characters, got {key.name[:120]!r}")
    if key.expires_at is not None and key.expires_at <= at:
        raise InvalidKey(f"expiry: expected a time to come, got {key.expires_at}")
    if key.id in state.keys:
        raise Conflict(f"key {key.id}: expected a new one, found it here")
    keys = _with_room(state, key.tenant, at)
    if key.tenant not in state.tenants:
        state = with_tenant(state, key.tenant, at=at, actor=actor)
    detail = ", ".join([",".join(sorted(key.scopes)), *_told(NO_LIMITS, key.limits)])
    return _noted(
        replace(state, keys={**keys, key.id: key}), Change(at, actor, "key-create", key.tenant, key.id, detail)
    )


def with_rotation(
    state: Tenancy, key_id: str, digest: str, *, old_until: str, at: str, actor: str, tenant: str | None = None
) -> Tenancy:
    """``state`` with a new secret for the key; the one before works until ``old_until``, all older ones no more."""
    key = key_of(state, key_id, tenant)
    if not key.works(at):
        raise Conflict(f"key {key_id}: expected one that works, got one that is revoked or has expired")
    old = key.secrets[0]
    kept = () if old_until <= at else (replace(old, expires_at=min(old_until, old.expires_at or old_until)),)
    changed = replace(key, secrets=(Secret(digest), *kept))
    detail = f"the old secret works until {old_until}" if kept else "the old secret ends"
    return _with(state, changed, Change(at, actor, "key-rotate", key.tenant, key_id, detail))


def with_revocation(state: Tenancy, key_id: str, *, at: str, actor: str, tenant: str | None = None) -> Tenancy:
    """``state`` with the key revoked for good; its record stays, so that nothing brings it back."""
    key = key_of(state, key_id, tenant)
    if key.revoked_at is not None:
        return state
    return _with(state, replace(key, revoked_at=at), Change(at, actor, "key-revoke", key.tenant, key_id))


def with_share(state: Tenancy, task: str, share: Share, *, at: str, actor: str) -> Tenancy:
    """``state`` with the task shared so; a private share ends its share. Whether there are such tenants is not told."""
    owner = task.partition("/")[0]
    for name in share.tenants:
        check_name("tenant", name)
    if state.shares.get(task, Share()) == share:
        return state
    shares = {name: one for name, one in state.shares.items() if name != task}
    if share.private:
        return _noted(replace(state, shares=shares), Change(at, actor, "unshare", owner, task))
    shares[task] = share
    own = sum(one.size for name, one in shares.items() if name.partition("/")[0] == owner)
    _bounded(f"shares of {owner}", own, MAX_SHARES_OF_A_TENANT, "; make another task private first")
    _bounded("shares", sum(one.size for one in shares.values()), MAX_SHARES)
    whom = "everyone" if share.everyone else ", ".join(sorted(share.tenants))
    detail = f"with {whom}{', download' if share.download else ''}"[:500]
    return _noted(replace(state, shares=shares), Change(at, actor, "share", owner, task, detail))


def tenant_of(state: Tenancy, name: str) -> Tenant:
    """The tenant. Raises KeyNotFound."""
    check_name("tenant", name)
    if name not in state.tenants:
        raise KeyNotFound(f"tenant {name}: expected a tenant, found none of that name")
    return state.tenants[name]


def key_of(state: Tenancy, key_id: str, tenant: str | None = None) -> Key:
    """The key, of that tenant if one is given. Raises KeyNotFound."""
    key = state.keys.get(key_id)
    if key is None or tenant not in (None, key.tenant):
        raise KeyNotFound(f"key {without_secrets(key_id)[:40]}: expected the id of a key, found none of that id")
    return key


def _with(state: Tenancy, key: Key, change: Change) -> Tenancy:
    return _noted(replace(state, keys={**state.keys, key.id: key}), change)


def _with_room(state: Tenancy, tenant: str, at: str) -> dict[str, Key]:
    """The keys, with room for one more of the tenant. A key of the service stays: a file may make it again."""
    keys, own = dict(state.keys), state.keys_of(tenant)
    if len(own) >= MAX_KEYS_OF_A_TENANT:
        ended = next((key for key in own if not key.works(at) and not key.scopes & SERVICE_SCOPES), None)
        if ended is None:
            _bounded(f"keys of {tenant}", len(own) + 1, MAX_KEYS_OF_A_TENANT, "; revoke one that nobody needs")
        else:
            del keys[ended.id]
    _bounded("keys", len(keys) + 1, MAX_KEYS)
    return keys


def _told(before: Limits, after: Limits) -> list[str]:
    """The limits that differ and what they are now, for the history."""
    now, past = dict(after.given()), dict(before.given())
    return [f"{name} {now.get(name, 'unset')}" for name in NAMES if now.get(name) != past.get(name)]


def _noted(state: Tenancy, change: Change) -> Tenancy:
    """Beyond CHANGES_KEPT the oldest of the tenant that has the most goes: no tenant pushes out another's."""
    kept = [*state.changes, change]
    if len(kept) > CHANGES_KEPT:
        ((most, _),) = Counter(one.tenant for one in kept).most_common(1)
        kept.remove(next(one for one in kept if one.tenant == most))
    return replace(state, changes=tuple(kept))


def _bounded(what: str, wanted: int, most: int, advice: str = "") -> None:
    if wanted > most:
        raise Conflict(f"{what}: expected at most {most}, got {wanted}{advice}", expected=most, got=wanted)
