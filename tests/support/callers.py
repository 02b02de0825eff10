"""Every kind of caller: two tenants, a blocked one, and keys that work, that do not, and with each scope alone.

Owns the keys and what each may do by its scope. Knows no route and no test.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from prefixes.tenancy.directory import Directory, later, utc_now
from prefixes.tenancy.model import Scope
from prefixes.tenancy.secret import new_id, new_secret
from prefixes.tenancy.store import TenancyStore

TENANT_SCOPES: Final = [scope.value for scope in Scope if scope not in (Scope.OPERATOR, Scope.METRICS)]
NOBODY: Final = ("no key", "malformed", "mistyped", "unknown", "expired", "revoked", "rotated away", "two that differ")


@dataclass(frozen=True)
class Callers:
    """Headers by kind. ``spare`` is the id of a key of acme that nobody needs, ``foreign`` of one of globex."""

    headers: dict[str, dict[str, str]]
    spare: str
    foreign: str


def bearer(secret: str) -> dict[str, str]:
    """The header that presents it."""
    return {"authorization": f"Bearer {secret}"}


def make_callers(store: TenancyStore) -> Callers:
    """Callers of every kind; acme is the owner of what is asked for, globex a stranger."""
    directory = Directory(store)

    def key(tenant: str, *scopes: str, expires_at: str | None = None) -> tuple[str, str]:
        made = directory.create_key(tenant, "test", scopes, expires_at=expires_at, actor="test")
        return made.key.id, made.secret

    soon = later(utc_now(), 0.2)
    _, expired = key("acme", *TENANT_SCOPES, expires_at=soon)
    revoked_id, revoked = key("acme", *TENANT_SCOPES)
    directory.revoke(revoked_id, actor="test")
    rotated_id, rotated = key("acme", *TENANT_SCOPES)
    directory.rotate(rotated_id, grace_s=0, actor="test")
    _, blocked = key("initech", *TENANT_SCOPES)
    directory.block("initech", True, actor="test")
    _, owner = key("acme", *TENANT_SCOPES)
    foreign_id, foreign = key("globex", *TENANT_SCOPES)
    _, operator = key("ops", "operator")
    while utc_now() <= soon:
        time.sleep(0.01)
    headers = {
        "no key": {},
        "malformed": bearer("pfx_x"),
        "mistyped": bearer(owner[:-1] + ("0" if owner[-1] != "0" else "1")),
        "unknown": bearer(new_secret(new_id())),
        "expired": bearer(expired),
        "revoked": bearer(revoked),
        "rotated away": bearer(rotated),
        "two that differ": {**bearer(owner), "x-api-key": foreign},
        "blocked": bearer(blocked),
        "owner": {"x-api-key": owner},
        "foreign": bearer(foreign),
        "operator": bearer(operator),
        **{f"only {scope}": bearer(key("acme", scope)[1]) for scope in Scope},
    }
    return Callers(headers, key("acme", "read")[0], foreign_id)


def expected(caller: str, needs: Scope | frozenset[Scope] | None, *, foreign: int) -> int | None:
    """The status of a refusal, None for none: of a route that needs a scope, one of some, or any key.

    ``foreign`` is what a stranger is told: 404 for what is acme's, 0 where it is about one's own.
    """
    if caller in NOBODY:
        return 401
    if caller == "blocked":
        return 403
    if caller == "operator" or needs is None:
        return None
    scopes = frozenset({needs}) if isinstance(needs, Scope) else needs
    if caller == "foreign" and foreign:
        return foreign
    if caller in ("owner", "foreign"):
        return None if scopes & set(TENANT_SCOPES) else 403
    return None if caller in ("only operator", *(f"only {scope}" for scope in scopes)) else 403
