"""What a registry knows of callers: tenants, their keys, the tasks they share, and the last changes of all that.

Owns the values and what is true of one at a moment. Knows neither how they change nor where they are kept. Times are
UTC, ISO 8601, with milliseconds, so that they compare as texts.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pydantic import ConfigDict

from prefixes.errors import PrefixdError
from prefixes.tenancy.limits import NO_LIMITS, Limits

FORMAT: Final = 1
MAX_TENANTS: Final = 2_000
MAX_KEYS: Final = 10_000
MAX_SHARES: Final = 20_000
"""A share of a task counts for one, and for one more with each tenant that it names."""
MAX_KEYS_OF_A_TENANT: Final = 500
MAX_SHARES_OF_A_TENANT: Final = 2_000
"""One tenant does not fill what is there for all."""
CHANGES_KEPT: Final = 1_000
"""Of these the tenant with the most gives up its oldest. With these bounds all of it is a few MiB, and every replica
has it in memory."""
WEIGHTS: Final = (0.01, 100.0)
"""Least and greatest weight of a tenant."""
_STRICT: Final = ConfigDict(extra="forbid")


class InvalidKey(PrefixdError):
    """A value of a key or a tenant, such as a scope, an expiry or a limit, or a key's file is not what it can be."""

    code = "invalid_parameter"


class KeyNotFound(PrefixdError):
    """There is no such key or tenant."""

    code = "key_not_found"


class Scope(StrEnum):
    """What a key may do. Each but the last is about its own tenant, and what others share with it."""

    GENERATE = "generate"
    READ = "read"  # list, inspect, download
    PUBLISH = "publish"  # upload, promote, roll back, share
    DELETE = "delete"  # and undelete
    TRAIN = "train"  # datasets and jobs
    KEYS = "keys"  # its own tenant's keys
    METRICS = "metrics"  # of the whole service
    OPERATOR = "operator"  # everything, for all tenants, and the admin port


SERVICE_SCOPES: Final = frozenset({Scope.OPERATOR, Scope.METRICS})
"""What only an operator gives: it is about more than one tenant."""


@dataclass(frozen=True)
class Secret:
    """One secret of a key: its digest, and until when it works, None for as long as the key does."""

    __pydantic_config__ = _STRICT

    digest: str = field(repr=False)
    expires_at: str | None = None


@dataclass(frozen=True)
class Key:
    """A key of a tenant. Its id stands for it in audit and logs, whatever its secrets are."""

    __pydantic_config__ = _STRICT

    id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_at: str
    created_by: str
    secrets: tuple[Secret, ...]  # the newest first
    expires_at: str | None = None
    revoked_at: str | None = None
    limits: Limits = NO_LIMITS

    def works(self, at: str) -> bool:
        """Whether it is neither revoked nor expired at that time."""
        return self.revoked_at is None and not _past(self.expires_at, at)

    def has(self, digest: str) -> bool:
        """Whether the secret with ``digest`` is or was one of its own. Each is compared, in constant time."""
        matches = [secrets.compare_digest(one.digest, digest) for one in self.secrets]
        return any(matches)

    def accepts(self, digest: str, at: str) -> bool:
        """Whether the secret with ``digest`` works at that time. Each is compared, in constant time."""
        matches = [secrets.compare_digest(one.digest, digest) and not _past(one.expires_at, at) for one in self.secrets]
        return any(matches) and self.works(at)


@dataclass(frozen=True)
class Tenant:
    """A customer. ``blocked`` refuses all its keys; ``weight`` is its share of a busy engine beside the others'."""

    __pydantic_config__ = _STRICT

    name: str
    created_at: str
    created_by: str
    blocked: bool = False
    weight: float = 1.0
    limits: Limits = NO_LIMITS


@dataclass(frozen=True)
class Share:
    """With whom a task is shared, beside its owner; ``download`` lets them have the artifact too."""

    __pydantic_config__ = _STRICT

    everyone: bool = False
    tenants: frozenset[str] = frozenset()
    download: bool = False

    def reaches(self, tenant: str) -> bool:
        """Whether that tenant may use the task."""
        return self.everyone or tenant in self.tenants

    @property
    def private(self) -> bool:
        """Whether it reaches nobody."""
        return not (self.everyone or self.tenants)

    @property
    def size(self) -> int:
        """What it counts for among ``MAX_SHARES``."""
        return 1 + len(self.tenants)


@dataclass(frozen=True)
class Change:
    """One change of what is kept here. No secret and no digest is in it."""

    __pydantic_config__ = _STRICT

    at: str
    actor: str
    action: str  # "tenant-create", "key-revoke", "share", …
    tenant: str  # whose it is
    what: str  # the key's id, or the task
    detail: str = ""


@dataclass(frozen=True)
class Tenancy:
    """All of it at one moment. ``shares`` are by ``tenant/task``."""

    __pydantic_config__ = _STRICT

    format: int = FORMAT
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    shares: Mapping[str, Share] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()  # the latest last

    def keys_of(self, tenant: str | None) -> list[Key]:
        """A tenant's keys, or all, the oldest first."""
        found = [key for key in self.keys.values() if tenant in (None, key.tenant)]
        return sorted(found, key=lambda key: (key.created_at, key.id))


def scopes_of(names: Iterable[str]) -> frozenset[Scope]:
    """The scopes of these names. Raises InvalidKey for an unknown one, and for none."""
    known = {scope.value for scope in Scope}
    given = list(names)
    unknown = sorted(name for name in given if name not in known)
    if unknown or not given:
        got = ", ".join(unknown) or "none"
        raise InvalidKey(f"scopes: expected some of {', '.join(Scope)}; got {got[:200]}")
    return frozenset(Scope(name) for name in given)


def _past(end: str | None, at: str) -> bool:
    return end is not None and end <= at
