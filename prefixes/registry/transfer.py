"""Copies whole tasks from one registry to another: copies, backups and restores.

Owns what happens to each task and the report of it; knows no store. A task is copied with its aliases, history, times
and records, or not at all: every artifact is read and compared with its digest before the first write. Deleted tasks
are not copied. Tenants, keys, usage and the audit go with the whole of a registry, to its backup and back. A backup is
a registry in a folder, with the id of its source: a server that had opened the source takes the restored registry for
the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from prefixes.errors import (
    Conflict,
    PrefixdError,
    RegistryMissing,
    RegistryRestoring,
    RegistryUnavailable,
    TaskNotFound,
    WrongRegistry,
)
from prefixes.registry import open_registry
from prefixes.registry.base import UNKNOWN_ACTOR, Store, TaskInfo
from prefixes.registry.copied_audit import AuditRestore, back_up_audit
from prefixes.registry.copied_keys import copy_keys
from prefixes.registry.copied_usage import copy_usage
from prefixes.registry.listing import list_tasks
from prefixes.registry.store import check_artifact

Result = Literal["copied", "replaced", "unchanged", "removed", "conflict", "failed"]
RESULTS: Final[tuple[Result, ...]] = ("copied", "replaced", "unchanged", "removed", "conflict", "failed")
MAX_CACHED_BYTES: Final = 256 << 20
"""Artifacts of a task that stay in memory between check and write; further ones are read twice."""


@dataclass(frozen=True)
class Outcome:
    """What happened to one task, or would happen in a dry run. ``size`` is the bytes of its artifacts."""

    task: str  # tenant/name
    result: Result
    versions: int
    size: int
    error: str | None = None

    @property
    def bad(self) -> bool:
        """Whether the target lacks the task or has another in its place."""
        return self.result in ("conflict", "failed")


@dataclass(frozen=True)
class Report:
    """Every task's outcome, and how many deleted tasks the source has beside them.

    After a restore, ``forgotten`` names lost tenants that the source does not have, and ``kept`` counts tenants that
    had lost nothing and were left alone. ``unfinished`` says that the target still counts as being restored. ``keys``
    says that tenants, keys and shares came along, or would; ``usage_days`` counts the days whose usage did.
    """

    outcomes: tuple[Outcome, ...]
    deleted: int
    dry_run: bool
    forgotten: tuple[str, ...] = ()
    kept: int = 0
    unfinished: bool = False
    keys: bool = False
    usage_days: int = 0

    def counts(self) -> dict[Result, int]:
        """How many tasks have each result."""
        counted = Counter(outcome.result for outcome in self.outcomes)
        return {result: counted[result] for result in RESULTS}

    @property
    def bad(self) -> int:
        """How many outcomes are bad."""
        return sum(outcome.bad for outcome in self.outcomes)


Progress = Callable[[Outcome, int, int], object]
"""Called with an outcome, the number of outcomes so far, and their number in the end."""


def transfer(
    source: Store,
    target: Store | None,
    *,
    tenant: str | None = None,
    name: str | None = None,
    replace: bool = False,
    mirror: bool = False,
    dry_run: bool = False,
    actor: str = UNKNOWN_ACTOR,
    progress: Progress | None = None,
) -> Report:
    """Copy the tasks of ``source`` (or of one tenant, or its one task ``name``) to ``target``.

    Another task of that name in ``target`` is a conflict, unless ``replace``. ``mirror`` replaces too, and it removes
    tasks that ``source`` does not have. Replaced and removed tasks can be brought back like deleted ones. A ``dry_run``
    reads and checks everything and writes nothing; its ``target`` None is an empty one. The copy goes on past a bad
    task, and past a tenant whose index is damaged, reported as ``<tenant>/*``; it stops where a registry cannot be
    reached any more. Raises RegistryUnavailable or TaskNotFound where it cannot begin.
    """
    if name is not None and tenant is None:
        raise ValueError("expected a tenant with the task's name")
    if target is None and not dry_run:
        raise ValueError("expected a target, or a dry run")
    whole = tenant is None and name is None
    same = whole and not dry_run and target is not None and target.id == source.id
    keys = whole and copy_keys(source, target, mirror=mirror, dry_run=dry_run)
    usage_days = copy_usage(source, target, mirror=mirror, dry_run=dry_run) if whole else 0
    copier, listing = _Copier(source, target, replace or mirror, dry_run, actor), list_tasks(source, tenant, name)
    kept: frozenset[str] = frozenset()
    if target is not None and target.restoring:
        if not dry_run:
            target.begin_restoring()
        kept = target.kept_tenants()
    due: list[Callable[[], Outcome]] = [_failure(name, why) for name, why in listing.failures]
    due += [partial(copier.copy, task) for task in listing.tasks if task.tenant not in kept]
    if mirror and target is not None and name is None:
        there, wanted = list_tasks(target, tenant, None), {(task.tenant, task.name) for task in listing.tasks}
        due += [_failure(name, f"in the target: {why}") for name, why in there.failures]
        surplus = [task for task in there.tasks if (task.tenant, task.name) not in wanted]
        due += [partial(copier.remove, task) for task in surplus if task.tenant not in listing.damaged]
    restore = AuditRestore(source, target) if target is not None and same and not mirror else None
    outcomes = []
    for done, act in enumerate(due, 1):
        outcomes.append(act())
        if progress is not None:
            progress(outcomes[-1], done, len(due))
    if target is not None and same and not copier.broken:
        passed = kept | (listing.tenants - {outcome.task.partition("/")[0] for outcome in outcomes if not outcome.bad})
        failed = restore.finish(passed) if restore else back_up_audit(source, target, listing.damaged)
        outcomes += [_failure(name, why)() for name, why in failed]
    forgotten: list[str] = []
    if target is not None and target.restoring and not copier.broken:
        lost = target.lost_tenants()
        # A restore ends when another try could copy no further task: servers would take a missing one for deleted.
        # With ``mirror`` it always ends, also past damage: the target is a copy of what the source can read.
        ends = mirror or not (copier.unavailable or listing.damaged.keys() - kept)
        forgotten = [name for name in lost if ends and name not in listing.tenants]
        if ends and not dry_run:
            target.finish_restoring(forgotten)
            told = {outcome.task.partition("/")[0] for outcome in outcomes if outcome.result == "failed"}
            again = [name for name in lost if name in listing.tenants and name not in told]
            outcomes += [_failure(name, "registry: its data was lost meanwhile; restore it again")() for name in again]
    return Report(
        tuple(outcomes),
        listing.deleted,
        dry_run,
        forgotten=tuple(forgotten),
        kept=len(kept),
        unfinished=target is not None and target.restoring and not dry_run,
        keys=keys,
        usage_days=usage_days,
    )


def _failure(tenant: str, why: str) -> Callable[[], Outcome]:
    return lambda: Outcome(f"{tenant}/*", "failed", 0, 0, why)


def open_target(url: str, registry_id: str, *, into_other: bool = False, dry_run: bool = False) -> Store | None:
    """The registry at ``url``, as the target for the registry with ``registry_id``; an empty place gets that id.

    A new one counts as being restored until ``transfer`` has copied everything, and one that has lost tenants does from
    the start of ``transfer``: nobody takes a missing task for deleted meanwhile. None where a dry run would make one.
    Raises WrongRegistry where there is another registry, unless ``into_other``.
    """
    try:
        found = open_registry(url, create=False)
    except RegistryMissing:
        return None if dry_run else open_registry(url, create=True, registry_id=registry_id, restoring=True)
    except RegistryRestoring:  # a restore that was cut short
        return open_registry(url, create=False, registry_id=registry_id, restoring=True)
    try:
        if found.id != registry_id and not into_other:
            raise WrongRegistry(
                f"registry id: expected {registry_id} or an empty place, got {found.id}: another registry",
                expected=registry_id,
                got=found.id,
            )
        if found.id != registry_id or not found.lost_tenants():
            return found
    except BaseException:
        found.close()
        raise
    found.close()
    return open_registry(url, create=False, registry_id=registry_id, restoring=True)


class _Copier:
    """Copies one task after the other. When a registry cannot be reached any more, the rest fails untried."""

    def __init__(self, source: Store, target: Store | None, replace: bool, dry_run: bool, actor: str) -> None:
        self._source, self._target = source, target
        self._replace, self._dry_run, self._actor = replace, dry_run, actor
        self.broken: str | None = None
        self.unavailable = False  # a registry was, for some task: another try may copy it

    def copy(self, task: TaskInfo) -> Outcome:
        """Copy ``task`` unless the target has it."""
        return self._outcome(task, lambda: self._copy(task))

    def remove(self, task: TaskInfo) -> Outcome:
        """Delete ``task`` in the target."""
        return self._outcome(task, lambda: self._remove(task))

    def _outcome(self, task: TaskInfo, act: Callable[[], Result]) -> Outcome:
        result: Result = "failed"
        error = self.broken
        if error is None:
            try:
                result = act()
            except PrefixdError as failure:
                result, error = "conflict" if isinstance(failure, Conflict) else "failed", failure.message
                if isinstance(failure, RegistryUnavailable):
                    self.unavailable, self.broken = True, self._why_broken()
        size = sum(info.size for info in task.versions)
        return Outcome(f"{task.tenant}/{task.name}", result, len(task.versions), size, error)

    def _copy(self, task: TaskInfo) -> Result:
        current = self._current(task)
        if current == task:
            return "unchanged"
        if current is not None and not self._replace:
            raise Conflict(f"task {task.tenant}/{task.name}: expected none or the same one there, found another")
        cached = self._checked(task)
        if self._target is not None and not self._dry_run:
            self._target.adopt(
                task,
                lambda version: cached.pop(version, None) or self._source.fetch(task.tenant, version),
                replace=self._replace,
                actor=self._actor,
            )
        return "copied" if current is None else "replaced"

    def _checked(self, task: TaskInfo) -> dict[str, bytes]:
        """Read and check all artifacts of ``task``; those that fit into MAX_CACHED_BYTES. Raises InvalidArtifact."""
        cached: dict[str, bytes] = {}
        free = 0 if self._dry_run else MAX_CACHED_BYTES
        for info in task.versions:
            data = self._source.fetch(task.tenant, info.version)
            check_artifact(data, info)
            if len(data) <= free:
                cached[info.version] = data
                free -= len(data)
        return cached

    def _remove(self, task: TaskInfo) -> Result:
        if self._target is not None and not self._dry_run:
            self._target.delete(task.tenant, task.name, actor=self._actor)
        return "removed"

    def _current(self, task: TaskInfo) -> TaskInfo | None:
        if self._target is None:
            return None
        try:
            return self._target.inspect(task.tenant, task.name)
        except TaskNotFound:
            return None

    def _why_broken(self) -> str | None:
        """Why no further task can be copied, None where only the last task was at fault."""
        for store in (self._source, self._target):
            if store is None:
                continue
            try:
                store.check()
            except RegistryUnavailable as error:
                return f"not tried: {error.message}"
        return None
