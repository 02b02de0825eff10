"""Directory: makes and changes tenants, keys and shares in a registry.

Owns the loop around a change, secrets on their way out, and when a registry is closed: with its first key. Knows
neither HTTP nor who may ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from prefixes.errors import RegistryUnavailable
from prefixes.tenancy import changes
from prefixes.tenancy.model import InvalidKey, Key, Secret, Share, Tenancy, Tenant, scopes_of
from prefixes.tenancy.records import tenancy_from_json, tenancy_to_json
from prefixes.tenancy.secret import digest_of, new_id, new_secret
from prefixes.tenancy.store import TenancyStore

ATTEMPTS: Final = 20
GRACE_S: Final = 86_400.0
"""How long a rotated secret goes on working, by default."""
MAX_GRACE_S: Final = 90 * 86_400.0


@dataclass(frozen=True)
class NewKey:
    """A key, and its secret, which is shown once."""

    key: Key
    secret: str = field(repr=False)


class Directory:
    """Every method raises RegistryUnavailable; a change that raises it was made whole or not at all."""

    def __init__(self, store: TenancyStore) -> None:
        self._store = store

    def load(self) -> Tenancy:
        """All of it, now."""
        return tenancy_from_json(self._store.read().data)

    @property
    def closed(self) -> bool:
        """Whether a key was ever made."""
        return self._store.read().closed

    def used(self) -> dict[str, str]:
        """When keys were last used."""
        return self._store.used()

    def create_tenant(self, name: str, *, actor: str) -> Tenant:
        """A new tenant. Raises Conflict, InvalidName."""
        return self._change(lambda state, at: changes.with_tenant(state, name, at=at, actor=actor)).tenants[name]

    def block(self, name: str, blocked: bool, *, actor: str) -> Tenant:
        """Refuse all keys of the tenant, or no longer. Raises KeyNotFound."""
        after = self._change(lambda state, at: changes.with_block(state, name, blocked, at=at, actor=actor))
        return after.tenants[name]

    def set_weight(self, name: str, weight: float, *, actor: str) -> Tenant:
        """Give the tenant another weight in busy engines. Raises KeyNotFound, InvalidKey."""
        after = self._change(lambda state, at: changes.with_weight(state, name, weight, at=at, actor=actor))
        return after.tenants[name]

    def create_key(
        self, tenant: str, name: str, scopes: Iterable[str], *, expires_at: str | None = None, actor: str
    ) -> NewKey:
        """A new key, and its tenant if that is new. Raises InvalidKey, InvalidName."""
        key_id = new_id()
        secret = new_secret(key_id)
        given, end = scopes_of(scopes), moment(expires_at) if expires_at is not None else None

        def plan(state: Tenancy, at: str) -> Tenancy:
            secrets = (Secret(digest_of(secret)),)
            return changes.with_key(state, Key(key_id, tenant, name, given, at, actor, secrets, end))

        return NewKey(self._change(plan, closing=True).keys[key_id], secret)

    def adopt(self, key_id: str, digest: str, tenant: str, name: str, scopes: Iterable[str], *, actor: str) -> Key:
        """A key whose secret was made elsewhere. One that is here, revoked or not, is left as it is."""
        given = scopes_of(scopes)

        def plan(state: Tenancy, at: str) -> Tenancy:
            if key_id in state.keys:
                return state
            return changes.with_key(state, Key(key_id, tenant, name, given, at, actor, (Secret(digest),)))

        return self._change(plan, closing=True).keys[key_id]

    def rotate(self, key_id: str, *, grace_s: float = GRACE_S, actor: str, tenant: str | None = None) -> NewKey:
        """A new secret for the key; the one before works for ``grace_s`` more. Raises KeyNotFound, Conflict."""
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidKey(f"grace: expected 0 to {MAX_GRACE_S:.0f} seconds, got {grace_s:.0f}")
        secret = new_secret(key_id)

        def plan(state: Tenancy, at: str) -> Tenancy:
            until = later(at, grace_s)
            return changes.with_rotation(
                state, key_id, digest_of(secret), old_until=until, at=at, actor=actor, tenant=tenant
            )

        return NewKey(self._change(plan).keys[key_id], secret)

    def revoke(self, key_id: str, *, actor: str, tenant: str | None = None) -> Key:
        """End the key for good. Raises KeyNotFound."""
        return self._change(
            lambda state, at: changes.with_revocation(state, key_id, at=at, actor=actor, tenant=tenant)
        ).keys[key_id]

    def share(self, task: str, share: Share, *, actor: str) -> Share:
        """Share ``tenant/task`` so; a private share ends its share."""
        wanted = Share() if share.private else share
        self._change(lambda state, at: changes.with_share(state, task, wanted, at=at, actor=actor))
        return wanted

    def _change(self, plan: Callable[[Tenancy, str], Tenancy], *, closing: bool = False) -> Tenancy:
        for _ in range(ATTEMPTS):
            stored = self._store.read()
            before = tenancy_from_json(stored.data)
            after = plan(before, utc_now())
            if after == before:
                return after
            if self._store.replace(tenancy_to_json(after), stored.revision, closing=closing):
                if gone := before.keys.keys() - after.keys.keys():
                    self._store.forget_used(gone)
                return after
        raise RegistryUnavailable("registry: its tenants and keys change all the time; try again")


def utc_now() -> str:
    """The time as it is kept."""
    return shown(datetime.now(UTC))


def later(at: str, seconds: float) -> str:
    """The time so long after ``at``."""
    return shown(datetime.fromisoformat(at) + timedelta(seconds=seconds))


def shown(time: datetime) -> str:
    """UTC, ISO 8601, milliseconds."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(text: str) -> str:
    """A time as it is kept. Raises InvalidKey unless ``text`` is ISO 8601 with its zone."""
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise ValueError("no zone")
        return shown(time)
    except (ValueError, OverflowError):
        raise InvalidKey(f"time: expected one such as 2030-01-31T00:00:00Z, got {text[:60]!r}") from None
