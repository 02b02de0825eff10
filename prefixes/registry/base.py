"""The registry's Protocol: immutable blobs named by digest, aliases that point at them with history.

Owns the contract that every store keeps; knows no store. ``Registry`` is the part for users of tasks; a store has it,
and so has a server in front of one. ``Store`` adds the part for operators. Calls are synchronous and thread-safe; the
server makes them off its event loop. ``tests/contract/`` runs the same tests against every implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from prefixes.registry.subscription import Subscription
from prefixes.spec import DEFAULT_ALIAS, PrefixSpec, TaskRef
from prefixes.tenancy.limits import Limits
from prefixes.tenancy.store import TenancyStore
from prefixes.usage.store import UsageStore

UNKNOWN_ACTOR: Final = "unknown"
RETENTION_S: Final = 7 * 86400.0
"""How long a deleted task can be brought back, by default."""
NOWHERE: Final = ""  # an ``expected_current``: there is no such alias yet
CONFIRMED_BELOW_S: Final = 3600.0
"""A clean-up with a shorter retention takes what was deleted just now, by mistake perhaps: it has to be confirmed."""


@dataclass(frozen=True)
class HistoryEntry:
    """One change of an alias. A history lists them oldest first."""

    version: str
    at: str  # UTC, ISO 8601
    action: str  # "publish", "promote" or "rollback"


@dataclass(frozen=True)
class ReplacedEntry:
    """What an entry of a record was until a later publish of the version brought another value."""

    name: str
    value: Any  # JSON
    at: str  # UTC, ISO 8601: when it was replaced


@dataclass(frozen=True)
class VersionInfo:
    """One published version of a task: its metadata and the record beside it (scores, times, who).

    A later publish of the content adds its record's entries. Where both have one, the record has the later value and
    ``replaced`` the one before, oldest first.
    """

    version: str
    size: int  # bytes of the artifact
    published_at: str  # UTC, ISO 8601
    spec: PrefixSpec
    record: Mapping[str, Any] = field(default_factory=dict)
    replaced: tuple[ReplacedEntry, ...] = ()  # within REPLACED_KEPT and REPLACED_BYTES


@dataclass(frozen=True)
class IdempotencyKey:
    """The key of a publish, and the version that it made. Messages and docs call it a publish key."""

    key: str
    version: str


@dataclass(frozen=True)
class TaskInfo:
    """A task of a tenant: where its aliases point, and every version, newest first."""

    tenant: str
    name: str
    aliases: Mapping[str, str]  # alias -> version
    history: Mapping[str, tuple[HistoryEntry, ...]]  # alias -> its changes, oldest first
    versions: tuple[VersionInfo, ...]
    idempotency_keys: tuple[IdempotencyKey, ...] = ()  # oldest first, KEYS_KEPT at most; a version may have several


@dataclass(frozen=True)
class Resolved:
    """What a reference means now: the version that a request pins at admission, and its metadata."""

    tenant: str
    name: str
    version: str
    spec: PrefixSpec


@dataclass(frozen=True)
class AuditEntry:
    """One change of a task. It is written with the change itself or not at all."""

    at: str  # UTC, ISO 8601
    actor: str  # who asked, as the server or the command knows them
    action: str  # "publish", "promote", "rollback", "delete", "delete_version", "undelete", "copy" or "purge"
    task: str  # tenant/name
    alias: str | None  # the alias that moved; production's for a whole task
    old: str | None  # where it pointed
    new: str | None  # where it points
    note: str | None = None  # why, as the publisher said


@dataclass(frozen=True)
class DeletedTask:
    """A task that was deleted and that no clean-up has taken yet."""

    deleted_at: str  # UTC, ISO 8601
    task: TaskInfo


@dataclass(frozen=True)
class GcReport:
    """What a clean-up took, or would take: deleted tasks past their retention, and artifacts that no task has."""

    tasks: tuple[str, ...]  # tenant/name
    artifacts: tuple[str, ...]  # tenant/version
    freed_bytes: int
    failed: tuple[str, ...] = ()  # "tenant: why" of tenants that were not cleaned, or only in part: see their audit

    @classmethod
    def of_all(cls, reports: Sequence[GcReport]) -> GcReport:
        """The reports of several tenants as one."""
        return cls(
            tuple(task for report in reports for task in report.tasks),
            tuple(artifact for report in reports for artifact in report.artifacts),
            sum(report.freed_bytes for report in reports),
            tuple(failed for report in reports for failed in report.failed),
        )


class Registry(Protocol):
    """Every method raises RegistryUnavailable when the store cannot be reached or read.

    A change that raises it was not made at all, or it was made whole and its answer was lost: look before you repeat
    it. ``actor`` is who asks, ``note`` why, for the audit.
    """

    def resolve(self, ref: TaskRef) -> Resolved:
        """The version behind ``ref`` now. Raises TaskNotFound for an unknown task, alias or version."""

    def fetch(self, tenant: str, version: str) -> bytes:
        """The artifact's bytes. Raises TaskNotFound where no task of the tenant has the version.

        A deleted task keeps its artifacts until a clean-up takes it: rows that were admitted before still load.
        """

    def publish(
        self,
        tenant: str,
        name: str,
        data: bytes,
        *,
        alias: str | None = DEFAULT_ALIAS,
        expected_current: str | None = None,
        record: Mapping[str, Any],
        actor: str = UNKNOWN_ACTOR,
        idempotency_key: str | None = None,
        note: str | None = None,
        quota: Limits | None = None,
    ) -> VersionInfo:
        """Validate ``data``, store it, then move ``alias`` (None moves none). Idempotent for the same content.

        Known content keeps its time and its record, to which those entries are added: see VersionInfo. The artifact is
        written first and the alias last: a killed publish leaves nothing half-visible. Raises InvalidArtifact,
        LimitReached, and in one step with the change QuotaExceeded, and Conflict as ``promote`` does.

        ``idempotency_key`` has the form of a name. The first publish to the task with a key does its work. A later one
        changes nothing, whatever it brings and wherever the aliases point by then; it answers what the first one
        published. Of several at once, one is the first. The task keeps its last KEYS_KEPT keys, also in copies and when
        deleted. Raises Conflict for a key of a deleted task of that name that can be brought back.
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
        """Point ``alias`` at ``version``. Raises Conflict where it does not point at a given ``expected_current``."""

    def rollback(
        self,
        tenant: str,
        name: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expected_current: str | None = None,
        actor: str = UNKNOWN_ACTOR,
    ) -> TaskInfo:
        """Point ``alias`` at the version before the current one. Raises Conflict when there is none.

        Also where the alias does not point at a given ``expected_current``. With it a rollback can be repeated after a
        lost answer: of one that was made already, the Conflict says where the alias is now.
        """

    def delete(self, tenant: str, name: str, *, actor: str = UNKNOWN_ACTOR) -> None:
        """Remove the task; ``undelete`` brings it back until ``gc`` takes it. Raises TaskNotFound."""

    def delete_version(self, tenant: str, name: str, version: str, *, actor: str = UNKNOWN_ACTOR) -> None:
        """Remove one version. Raises TaskNotFound, and Conflict while an alias points at it.

        Its artifact stays for rows that were admitted before, as a deleted task's does. A rollback passes it over.
        """

    def undelete(
        self, tenant: str, name: str, *, actor: str = UNKNOWN_ACTOR, quota: Limits | None = None
    ) -> TaskInfo:
        """Bring back the last deleted task of that name. Raises TaskNotFound, QuotaExceeded, Conflict for a task."""

    def inspect(self, tenant: str, name: str) -> TaskInfo:
        """One task. Raises TaskNotFound."""

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        """All tasks of one tenant, or of all, sorted by tenant and name."""

    def check(self) -> None:
        """Raise RegistryUnavailable unless the store answers, can be read, and is still the one that was opened."""

    def close(self) -> None:
        """Release connections and locks."""


class Store(Registry, Protocol):
    """A registry at its source, for operators. ``id`` tells it from every other, also from itself once emptied.

    While it is being restored, only the handle that restores it can use it; others get RegistryRestoring.
    """

    id: str

    @property
    def tenancy(self) -> TenancyStore:
        """Where its tenants and keys are kept."""

    @property
    def usage(self) -> UsageStore:
        """Where it is kept what tenants used."""

    @property
    def restoring(self) -> bool:
        """Whether this handle restores the registry: part of the tasks may still be missing."""

    def tenants(self) -> list[str]:
        """All tenants that ever published, sorted."""

    def lost_tenants(self) -> list[str]:
        """Tenants whose data is gone while the registry is there, as with one node of a Cluster; sorted."""

    def kept_tenants(self) -> frozenset[str]:
        """During a restore or just before it: tenants that had lost nothing."""

    def begin_restoring(self) -> None:
        """From now on the registry is being restored; others cannot use it."""

    def finish_restoring(self, forget: Sequence[str] = ()) -> None:
        """The restore is complete; everybody can use the registry. Tenants to ``forget`` no longer count as lost."""

    def preflight(self) -> list[str]:
        """What the operator should set, a line each. Raises RegistryUnavailable for settings that would lose data."""

    def subscribe(self, on_change: Callable[[str, str], None]) -> Subscription | None:
        """Call ``on_change(tenant, name)`` from a thread on every change; None where the store can only be polled."""

    def adopt(
        self,
        task: TaskInfo,
        fetch: Callable[[str], bytes],
        *,
        replace: bool = False,
        actor: str = UNKNOWN_ACTOR,
    ) -> bool:
        """Take over ``task`` from elsewhere with its history, times and records; False if it is here already.

        ``fetch(version)`` gives an artifact, which is verified. Raises InvalidArtifact, and Conflict for another task
        of that name, unless ``replace``. A replaced task can be brought back like a deleted one.
        """

    def deleted(self, tenant: str | None = None) -> list[DeletedTask]:
        """Tasks that can be brought back, of one tenant or of all, the latest first."""

    def audit(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        """The tenant's last changes, the latest first."""

    def replace_audit(self, tenant: str, entries: Sequence[AuditEntry]) -> None:
        """Make the tenant's audit these, the oldest first: one from elsewhere. Makes the tenant known."""

    def gc(self, *, retention_s: float = RETENTION_S, dry_run: bool = False, actor: str = UNKNOWN_ACTOR) -> GcReport:
        """Remove tasks deleted ``retention_s`` ago, and artifacts that no task has and no publisher is storing.

        The report names tenants whose data is damaged or lost; the others are cleaned.
        """
