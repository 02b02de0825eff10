"""The registry's Protocol: immutable blobs named by digest, aliases that point at them with history.

Owns the contract that every store keeps; knows no store. Calls are synchronous and thread-safe; the server calls them
off its event loop. ``tests/contract/`` runs the same tests against every implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from prefixes.spec import DEFAULT_ALIAS, PrefixSpec, TaskRef


@dataclass(frozen=True)
class HistoryEntry:
    """One move of an alias, oldest first in a history."""

    version: str
    at: str  # UTC, ISO 8601
    action: str  # "publish", "promote" or "rollback"


@dataclass(frozen=True)
class VersionInfo:
    """One published version of a task: its metadata and the record beside it (scores, times, who)."""

    version: str
    size: int  # bytes of the artifact
    published_at: str  # UTC, ISO 8601
    spec: PrefixSpec
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskInfo:
    """A task of a tenant: where its aliases point, and every version, newest first."""

    tenant: str
    name: str
    aliases: Mapping[str, str]  # alias -> version
    history: Mapping[str, tuple[HistoryEntry, ...]]  # alias -> moves, oldest first
    versions: tuple[VersionInfo, ...]


@dataclass(frozen=True)
class Resolved:
    """What a reference means now: the version a request pins at admission, and its metadata."""

    tenant: str
    name: str
    version: str
    spec: PrefixSpec


class Registry(Protocol):
    """Every method raises RegistryUnavailable when the store cannot be reached or read."""

    def resolve(self, ref: TaskRef) -> Resolved:
        """The version behind ``ref`` now. TaskNotFound when the tenant has no such task, alias or version."""

    def fetch(self, tenant: str, version: str) -> bytes:
        """The artifact's bytes, reachable only through the tenant's own index: a foreign digest is TaskNotFound."""

    def publish(
        self, tenant: str, name: str, data: bytes, *, alias: str | None = DEFAULT_ALIAS, record: Mapping[str, Any]
    ) -> VersionInfo:
        """Validate ``data``, store it, then move ``alias`` (None moves none). Idempotent for the same content.

        Blob first, pointer last: a publish killed at any point leaves nothing half-visible. Raises InvalidArtifact.
        """

    def promote(
        self, tenant: str, name: str, version: str, *, alias: str = DEFAULT_ALIAS, expected_current: str | None = None
    ) -> TaskInfo:
        """Point ``alias`` at ``version``. Conflict when ``expected_current`` is given and is not where it points."""

    def rollback(self, tenant: str, name: str, *, alias: str = DEFAULT_ALIAS) -> TaskInfo:
        """Point ``alias`` at the version before the current one. Conflict when there is none."""

    def delete(self, tenant: str, name: str) -> None:
        """Remove the task from the tenant's index. TaskNotFound when there is none."""

    def inspect(self, tenant: str, name: str) -> TaskInfo:
        """One task. TaskNotFound when there is none."""

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        """All tasks of one tenant, or of all, sorted by tenant and name."""

    def check(self) -> None:
        """Raise RegistryUnavailable unless the store answers and can be read."""

    def close(self) -> None:
        """Release connections and locks."""
