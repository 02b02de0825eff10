"""Moving tasks between registries, whole: copies, backups and what is restored from them.

Owns what becomes of each task and the report of it; knows no store. A task goes over with its aliases, history, times
and records, or not at all: every artifact is read and compared with its digest before anything is written for it.
Deleted tasks and the audit stay where they are. A backup is a registry in a folder that has the id of its source, so
that a server which had opened the source knows what was restored for its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
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
from prefixes.registry.endurance import Endurance
from prefixes.registry.store import check_artifact

Result = Literal["copied", "replaced", "unchanged", "removed", "conflict", "failed"]
RESULTS: Final[tuple[Result, ...]] = ("copied", "replaced", "unchanged", "removed", "conflict", "failed")
HELD_BYTES: Final = 256 << 20
"""Artifacts of a task that are kept between being checked and being written; beyond, they are read twice."""


@dataclass(frozen=True)
class Outcome:
    """What became of one task, or would in a dry run; ``size`` is the bytes of its artifacts."""

    task: str  # tenant/name
    result: Result
    versions: int
    size: int
    error: str | None = None

    @property
    def bad(self) -> bool:
        """Whether the task is not in the target as it should be."""
        return self.result in ("conflict", "failed")


@dataclass(frozen=True)
class Report:
    """Every task's outcome, and how many deleted ones were left behind.

    Where a part was restored: lost tenants that the source has not got, and how many had lost nothing and were left
    alone. ``unfinished`` is a target that still counts as being restored.
    """

    outcomes: tuple[Outcome, ...]
    deleted: int
    dry_run: bool
    forgotten: tuple[str, ...] = ()
    kept: int = 0
    unfinished: bool = False

    def counts(self) -> dict[Result, int]:
        """How many tasks there are of each outcome."""
        counted = Counter(outcome.result for outcome in self.outcomes)
        return {result: counted[result] for result in RESULTS}

    @property
    def bad(self) -> int:
        """How many tasks are not in the target as they should be."""
        return sum(outcome.bad for outcome in self.outcomes)


Progress = Callable[[Outcome, int, int], object]
"""Called with an outcome, how many there are so far, and how many there will be."""


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
    """Bring the tasks of ``source`` (or those of a tenant, or its one task ``name``) to ``target``.

    A task of that name which is another in ``target`` is a conflict, unless ``replace``; ``mirror`` replaces, and
    removes what ``source`` has not got. What was there can be brought back as a deleted task. A ``dry_run`` reads and
    checks everything and writes nothing; None for its ``target`` is an empty one. A bad task stops no other, nor does a
    tenant whose index is damaged, told as ``<tenant>/*``; a registry that cannot be reached any more does. Raises
    RegistryUnavailable or TaskNotFound where nothing can be begun.
    """
    if name is not None and tenant is None:
        raise ValueError("expected a tenant with the task's name")
    if target is None and not dry_run:
        raise ValueError("expected a target, or a dry run")
    mover, listing = _Mover(source, target, replace or mirror, dry_run, actor), _listed(source, tenant, name)
    kept: frozenset[str] = frozenset()
    if target is not None and target.restoring:
        if not dry_run:
            target.begin_restoring()
        kept = target.kept_tenants()
    due: list[Callable[[], Outcome]] = [_failure(name, why) for name, why in listing.failures]
    due += [partial(mover.bring, task) for task in listing.tasks if task.tenant not in kept]
    if mirror and target is not None and name is None:
        there, wanted = _listed(target, tenant, None), {(task.tenant, task.name) for task in listing.tasks}
        due += [_failure(name, f"in the target: {why}") for name, why in there.failures]
        surplus = [task for task in there.tasks if (task.tenant, task.name) not in wanted]
        due += [partial(mover.remove, task) for task in surplus if task.tenant not in listing.damaged]
    outcomes = []
    for done, act in enumerate(due, 1):
        outcomes.append(act())
        if progress is not None:
            progress(outcomes[-1], done, len(due))
    forgotten: list[str] = []
    if target is not None and target.restoring and not mover.broken:
        lost = target.lost_tenants()
        # A restore ends when nothing is left that another try might bring: else servers would take it for deleted. A
        # backup is of what there is.
        ends = mirror or not (mover.unavailable or listing.damaged.keys() - kept)
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
    )


def _failure(tenant: str, why: str) -> Callable[[], Outcome]:
    return lambda: Outcome(f"{tenant}/*", "failed", 0, 0, why)


def open_target(url: str, registry_id: str, *, into_other: bool = False, dry_run: bool = False) -> Store | None:
    """The registry at ``url`` for what belongs to the one with ``registry_id``: made with that id in an empty place.

    One that is made so counts as being restored until ``transfer`` has brought everything, and one that has lost
    tenants does from when that begins, so that nobody takes what is not there yet for deleted. None where it is to be
    made, in a dry run. Raises WrongRegistry where there is another one, unless ``into_other``.
    """
    try:
        found = open_registry(url, create=False)
    except RegistryMissing:
        return None if dry_run else open_registry(url, create=True, registry_id=registry_id, restoring=True)
    except RegistryRestoring:  # one that was cut short
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


@dataclass
class _Listing:
    tasks: list[TaskInfo]
    deleted: int
    damaged: dict[str, str]  # tenants whose tasks cannot be listed, and why
    uncounted: dict[str, str]  # and those whose deleted ones cannot

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Tenants, and what is wrong with them."""
        return [*self.damaged.items(), *(item for item in self.uncounted.items() if item[0] not in self.damaged)]

    @property
    def tenants(self) -> set[str]:
        """Those that there are."""
        return {task.tenant for task in self.tasks} | self.damaged.keys()


def _listed(source: Store, tenant: str | None, name: str | None) -> _Listing:
    """What there is to be brought. Raises TaskNotFound, RegistryUnavailable."""
    if tenant is not None and name is not None:
        deleted = 0
        with Endurance(source).past(tenant):  # another that was deleted may be damaged
            deleted = sum(item.task.name == name for item in source.deleted(tenant))
        return _Listing([source.inspect(tenant, name)], deleted, {}, {})
    tasks, counting = Endurance(source), Endurance(source)
    listing = _Listing([], 0, tasks.failed, counting.failed)
    for each in [tenant] if tenant is not None else source.tenants():
        with tasks.past(each):
            listing.tasks += source.tasks(each)
        with counting.past(each):
            listing.deleted += len(source.deleted(each))
    return listing


class _Mover:
    """Brings one task after the other; once a registry cannot be reached, it tries no more."""

    def __init__(self, source: Store, target: Store | None, replace: bool, dry_run: bool, actor: str) -> None:
        self._source, self._target = source, target
        self._replace, self._dry_run, self._actor = replace, dry_run, actor
        self.broken: str | None = None
        self.unavailable = False  # was one of both for a task: another try may bring it

    def bring(self, task: TaskInfo) -> Outcome:
        """Copy ``task`` if the target has not got it."""
        return self._outcome(task, lambda: self._bring(task))

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

    def _bring(self, task: TaskInfo) -> Result:
        current = self._current(task)
        if current == task:
            return "unchanged"
        if current is not None and not self._replace:
            raise Conflict(f"task {task.tenant}/{task.name}: expected none or the same one there, found another")
        held = self._checked(task)
        if self._target is not None and not self._dry_run:
            self._target.adopt(
                task,
                lambda version: held.pop(version, None) or self._source.fetch(task.tenant, version),
                replace=self._replace,
                actor=self._actor,
            )
        return "copied" if current is None else "replaced"

    def _checked(self, task: TaskInfo) -> dict[str, bytes]:
        """Read and check all artifacts of ``task``; those that fit into memory. Raises InvalidArtifact."""
        held: dict[str, bytes] = {}
        free = 0 if self._dry_run else HELD_BYTES
        for info in task.versions:
            data = self._source.fetch(task.tenant, info.version)
            check_artifact(data, info)
            if len(data) <= free:
                held[info.version] = data
                free -= len(data)
        return held

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
        """Why no further task can be brought, None where the one before was to blame."""
        for store in self._stores():
            try:
                store.check()
            except RegistryUnavailable as error:
                return f"not tried: {error.message}"
        return None

    def _stores(self) -> Iterator[Store]:
        yield self._source
        if self._target is not None:
            yield self._target
