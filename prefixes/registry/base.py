"""The registry's Protocol: immutable blobs named by digest, aliases that point at them with history.

Owns the contract that every store keeps; knows no store. ``Registry`` is what tasks need, of a store or of a server in
front of one; ``Store`` adds what those need who run it. Calls are synchronous and thread-safe; the server calls
them off its event loop. ``tests/contract/`` runs the same tests against every implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from prefixes.spec import DEFAULT_ALIAS, PrefixSpec, TaskRef

UNKNOWN_ACTOR: Final = "unknown"
RETENTION_S: Final = 7 * 86400.0
"""How long a deleted task can be brought back, where nobody says otherwise."""
KEYS_KEPT: Final = 100
"""How many publish keys a task remembers, the newest."""


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
class PublishKey:
    """A key that a publish was made with, so that its repetition changes nothing, and the version that it made."""

    key: str
    version: str


@dataclass(frozen=True)
class TaskInfo:
    """A task of a tenant: where its aliases point, and every version, newest first."""

    tenant: str
    name: str
    aliases: Mapping[str, str]  # alias -> version
    history: Mapping[str, tuple[HistoryEntry, ...]]  # alias -> moves, oldest first
    versions: tuple[VersionInfo, ...]
    once: tuple[PublishKey, ...] = ()  # oldest first, KEYS_KEPT at most; a version may have several


@dataclass(frozen=True)
class Resolved:
    """What a reference means now: the version a request pins at admission, and its metadata."""

    tenant: str
    name: str
    version: str
    spec: PrefixSpec


@dataclass(frozen=True)
class AuditEntry:
    """One change of a task, written with the change itself or not at all."""

    at: str  # UTC, ISO 8601
    actor: str  # who asked: as the server or the command knows them
    action: str  # "publish", "promote", "rollback", "delete", "undelete", "copy" or "purge"
    task: str  # tenant/name
    alias: str | None  # the alias that moved; production's for a whole task
    old: str | None  # where it pointed
    new: str | None  # where it points


@dataclass(frozen=True)
class DeletedTask:
    """A task that was deleted and not yet cleaned away."""

    deleted_at: str  # UTC, ISO 8601
    task: TaskInfo


@dataclass(frozen=True)
class GcReport:
    """What a clean-up took, or would take: deleted tasks past their retention, and artifacts that nothing names."""

    tasks: tuple[str, ...]  # tenant/name
    artifacts: tuple[str, ...]  # tenant/version
    freed_bytes: int
    failed: tuple[str, ...] = ()  # "tenant: why" of those that could not be cleaned, or in part: their audit tells

    @classmethod
    def of_all(cls, reports: Sequence[GcReport]) -> GcReport:
        """Those of several tenants as one."""
        return cls(
            tuple(task for report in reports for task in report.tasks),
            tuple(artifact for report in reports for artifact in report.artifacts),
            sum(report.freed_bytes for report in reports),
            tuple(failed for report in reports for failed in report.failed),
        )


class Registry(Protocol):
    """Every method raises RegistryUnavailable when the store cannot be reached or read.

    A change that raises it was not made, or, where the answer was lost on its way, made whole: look before repeating.
    ``actor`` is who asks, for the audit.
    """

    def resolve(self, ref: TaskRef) -> Resolved:
        """The version behind ``ref`` now. TaskNotFound when the tenant has no such task, alias or version."""

    def fetch(self, tenant: str, version: str) -> bytes:
        """The artifact's bytes, reachable only through the tenant's own index: a foreign digest is TaskNotFound.

        A deleted task's are there until they are cleaned away: rows that were admitted before still load.
        """

    def publish(
        self,
        tenant: str,
        name: str,
        data: bytes,
        *,
        alias: str | None = DEFAULT_ALIAS,
        record: Mapping[str, Any],
        actor: str = UNKNOWN_ACTOR,
        once: str | None = None,
    ) -> VersionInfo:
        """Validate ``data``, store it, then move ``alias`` (None moves none). Idempotent for the same content.

        Blob first, pointer last: a publish killed at any point leaves nothing half-visible. Raises InvalidArtifact.

        ``once`` is a key by which a repetition is known, of the form of a name: the first publish to the task with it
        does its work; a later one changes nothing, whatever it brings and wherever the aliases point by then, and
        answers what the first one published. Of several at once, one is the first. The task keeps its last KEYS_KEPT
        keys, and they go where it goes: copied, backed up, and deleted with it; Conflict for a key of a deleted task of
        that name which could still be brought back.
        """

    def promote(
        self,
        tenant: str,
        name: str,
        version: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expected_current: str | None = None,
        actor: str = UNKNOWN_ACTOR,
    ) -> TaskInfo:
        """Point ``alias`` at ``version``. Conflict when ``expected_current`` is given and is not where it points."""

    def rollback(
        self, tenant: str, name: str, *, alias: str = DEFAULT_ALIAS, actor: str = UNKNOWN_ACTOR
    ) -> TaskInfo:
        """Point ``alias`` at the version before the current one. Conflict when there is none."""

    def delete(self, tenant: str, name: str, *, actor: str = UNKNOWN_ACTOR) -> None:
        """Remove the task; ``undelete`` brings it back until ``gc`` takes it. TaskNotFound when there is none."""

    def undelete(self, tenant: str, name: str, *, actor: str = UNKNOWN_ACTOR) -> TaskInfo:
        """Bring back the task of that name that was deleted last. TaskNotFound; Conflict when there is one again."""

    def inspect(self, tenant: str, name: str) -> TaskInfo:
        """One task. TaskNotFound when there is none."""

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        """All tasks of one tenant, or of all, sorted by tenant and name."""

    def check(self) -> None:
        """Raise RegistryUnavailable unless the store answers, can be read, and is still the one that was opened."""

    def close(self) -> None:
        """Release connections and locks."""


class Subscription(Protocol):
    """Changes as they happen. What is ``live`` has lost none since ``generation`` last went up."""

    generation: int  # goes up with every connection: what was read before may be outdated
    heard_at: float  # time.monotonic() seconds: up to then, nothing since generation went up was missed

    def live(self) -> bool:
        """Whether the store has been heard within the last half second."""

    def close(self) -> None:
        """Stop listening."""


class Store(Registry, Protocol):
    """A registry at its source, for those who run it. ``id`` tells it from every other, an emptied one included.

    One that is ``restoring`` is no registry yet for anybody but the handle that restores it: RegistryRestoring.
    """

    id: str

    @property
    def restoring(self) -> bool:
        """Whether this handle is one that restores it: what was lost is not there yet, for it."""

    def tenants(self) -> list[str]:
        """All tenants that ever published, sorted."""

    def lost_tenants(self) -> list[str]:
        """Those whose data is gone although the registry is not, as with one node of a Cluster; sorted."""

    def kept_tenants(self) -> frozenset[str]:
        """While it is being restored, or is about to be: those that had lost nothing."""

    def begin_restoring(self) -> None:
        """From now on it is no registry for others."""

    def finish_restoring(self, forget: Sequence[str] = ()) -> None:
        """Everything is there: from now on it is a registry for everybody. Tenants to ``forget`` are lost no more."""

    def preflight(self) -> list[str]:
        """What whoever runs the store should set, a line each. RegistryUnavailable for what would lose data."""

    def subscribe(self, on_change: Callable[[str, str], None]) -> Subscription | None:
        """Call ``on_change(tenant, name)``, from a thread, on every change; None where the store can only be polled."""

    def adopt(
        self,
        task: TaskInfo,
        fetch: Callable[[str], bytes],
        *,
        replace: bool = False,
        actor: str = UNKNOWN_ACTOR,
    ) -> bool:
        """Take over ``task`` from elsewhere, history, times and records with it; False if it is here already.

        ``fetch(version)`` brings an artifact, which is verified. Conflict for another task of that name, unless
        ``replace``; the one before can be brought back as a deleted one. Raises InvalidArtifact.
        """

    def deleted(self, tenant: str | None = None) -> list[DeletedTask]:
        """Tasks that could be brought back, of one tenant or of all; the latest first."""

    def audit(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        """The tenant's last changes, the latest first."""

    def gc(
        self, *, retention_s: float = RETENTION_S, dry_run: bool = False, actor: str = UNKNOWN_ACTOR
    ) -> GcReport:
        """Take what was deleted ``retention_s`` ago, and artifacts that no task and no publisher at work names.

        A tenant whose data are damaged or lost is told in the report; the others are cleaned.
        """
