"""``prefixd prefixes copy | backup | restore``: whole registries, from one to another.

Owns these commands and their progress output. ``prefixes.registry.transfer`` decides what becomes of a task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefixes.actor import local_actor
from prefixes.cli import show
from prefixes.cli.target import (
    JsonOption,
    NoServerOption,
    RegistryOption,
    application,
    checked_url,
    command,
    opened_store,
    store_url,
    task_of,
    telling,
)
from prefixes.errors import RegistryMissing, WrongRegistry
from prefixes.registry import URL_FORMS, is_redis, open_registry, registry_path, shown_url
from prefixes.spec import check_name

if TYPE_CHECKING:
    from prefixes.registry.base import Store
    from prefixes.registry.transfer import Outcome, Report
    from prefixes.registry.transfer import Progress as Tell

_NAMED: Final = 20  # tenants in a line

app = application("Copy registries, back them up and restore them.")

ReplaceOption = Annotated[
    bool,
    typer.Option(
        "--replace", help="Replace tasks that are others there; `undelete` brings those back. Else they are conflicts."
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Read and check everything, say what would happen, write nothing at all.")
]


@command(app, "copy")
def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"A registry: {URL_FORMS}.", show_default=False)],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="Another, made where there is none.", show_default=False)
    ],
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's tasks.", show_default=False)] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this task, [TENANT/]NAME.", show_default=False)
    ] = None,
    replace: ReplaceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy tasks from one registry to another, from a folder to Redis for example.

    A task goes over with every version, its aliases, history, times and records, and is seen at once or not at all;
    every artifact is compared with its digest before. A bad task stops no other. Deleted tasks and the audit stay
    behind. Exits 1 if a task was not copied.
    """
    if tenant is not None and task is not None:
        raise typer.BadParameter("expected one of --tenant and --task, got both")
    if tenant is not None:
        check_name("tenant", tenant)
    ref = task_of(task) if task is not None else None
    checked_url(target)
    _check_two(checked_url(source), target)
    with opened_store(source, None) as store:
        if ref:
            store.inspect(ref.tenant, ref.name)  # fails before a registry is made for nothing
        with _target(target, dry_run) as found:
            _move(
                store, found, target, replace=replace, dry_run=dry_run, as_json=as_json,
                tenant=ref.tenant if ref else tenant, name=ref.name if ref else None,
            )  # fmt: skip


@command(app, "backup")
def backup(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Where to: a new folder, or one with an older backup.", show_default=False
        ),
    ],
    dry_run: DryRunOption = False,
    registry: RegistryOption = None,
    server: NoServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Back the registry up to a folder, while servers run.

    The folder becomes a registry itself, with the same id: list, inspect, verify and gc work on it with --registry, and
    `restore` brings it back. An older backup of the same registry is brought up to date: only what changed is written,
    and what the registry has not got any more is deleted there, until `gc --registry FOLDER` takes it. Exits 1 if a
    task could not be backed up; the others are.
    """
    from prefixes.registry.transfer import open_target

    url = _folder_url(folder)
    _check_two(store_url(registry), url)
    with opened_store(registry, server) as store:
        with telling(url):
            found = open_target(url, store.id, dry_run=dry_run)
        with _closing(found):
            _move(store, found, url, mirror=True, dry_run=dry_run, as_json=as_json)


@command(app, "restore")
def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A backup.", show_default=False)],
    replace: ReplaceOption = False,
    into_other: Annotated[
        bool, typer.Option("--into-other", help="Restore into a registry that is not the one of the backup.")
    ] = False,
    dry_run: DryRunOption = False,
    registry: RegistryOption = None,
    server: NoServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Restore a backup into the registry: look first, with --dry-run.

    A registry that was emptied, or is new, gets the backup's id, by which running servers know it for their own again
    and go on without a restart; of a Cluster that lost a node, only what was lost is brought back. One that holds
    another id is refused, unless --into-other. Tasks that are there already stay; those that were deleted since the
    backup come back. Exits 1 if a task was not restored.
    """
    from prefixes.registry.transfer import open_target

    source = _folder_url(folder)
    if server is not None:
        raise typer.BadParameter("--server: this command works on the registry itself; give --registry")
    url = store_url(registry)
    _check_two(source, url)
    with opened_store(source, None) as store:
        try:
            with telling(url):
                found = open_target(url, store.id, into_other=into_other, dry_run=dry_run)
        except WrongRegistry as error:
            if not isinstance(error, RegistryMissing) and "got" in error.detail:
                error.message += "; --into-other restores into it all the same"
            raise
        with _closing(found):
            _move(store, found, url, replace=replace, dry_run=dry_run, as_json=as_json)


def _move(
    source: Store,
    target: Store | None,
    url: str,
    *,
    dry_run: bool,
    as_json: bool,
    replace: bool = False,
    mirror: bool = False,
    tenant: str | None = None,
    name: str | None = None,
) -> None:
    from prefixes.registry.transfer import transfer

    for warning in target.preflight() if target is not None else ():
        typer.echo(f"warning: {warning}", err=True)
    with _telling(as_json) as tell:
        report = transfer(
            source, target, tenant=tenant, name=name, replace=replace, mirror=mirror, dry_run=dry_run,
            actor=local_actor(), progress=tell,
        )  # fmt: skip
    _show(report, source, target, url, as_json)
    if report.bad:
        raise typer.Exit(1)


def _show(report: Report, source: Store, target: Store | None, url: str, as_json: bool) -> None:
    counts = {result: count for result, count in report.counts().items() if count}
    if as_json:
        tasks = [
            {
                "task": outcome.task,
                "result": outcome.result,
                "versions": outcome.versions,
                "size": outcome.size,
                "error": outcome.error,
            }
            for outcome in report.outcomes
        ]
        show.show_json(
            {
                "tasks": tasks,
                "counts": report.counts(),
                "bad": report.bad,
                "deleted_left_behind": report.deleted,
                "forgotten_tenants": list(report.forgotten),
                "kept_tenants": report.kept,
                "unfinished": report.unfinished,
                "keys": report.keys,
                "usage_days": report.usage_days,
                "source_id": source.id,
                "target_id": target.id if target is not None else None,
                "dry_run": report.dry_run,
            }
        )
        return
    told = ", ".join(f"{count} {result}" for result, count in counts.items()) or "no tasks"
    typer.echo(f"{'would be, in' if report.dry_run else 'in'} {shown_url(url)}: {told}")
    if report.keys:
        typer.echo("tenants, keys and shares too")
    if report.usage_days:
        typer.echo(f"the usage of {report.usage_days} day(s) too")
    if target is None:
        typer.echo("it would be made: there is no registry yet")
    if report.deleted:
        typer.echo(f"{report.deleted} deleted task(s) were left behind: `undelete` them first to take them along")
    if report.kept:
        typer.echo(f"{report.kept} tenant(s) had lost nothing and were left alone")
    if report.forgotten:
        names = ", ".join(report.forgotten[:_NAMED]) + (", …" if len(report.forgotten) > _NAMED else "")
        typer.echo(f"{len(report.forgotten)} lost tenant(s) did not come back, and are known no more: {names}")
    if report.unfinished:
        typer.echo("it still counts as being restored: mend what failed, and run this again", err=True)


@contextmanager
def _telling(as_json: bool) -> Iterator[Tell]:
    """Yields what to call per task: it prints a line (not with --json); on a terminal, a bar and the failures' lines.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda outcome, done, total: None if as_json else typer.echo(_line(outcome))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        number = bar.add_task("tasks", total=None)

        def tell(outcome: Outcome, done: int, total: int) -> None:
            if outcome.bad:
                bar.console.print(_line(outcome), markup=False)
            bar.update(number, completed=done, total=total)

        yield tell


def _line(outcome: Outcome) -> str:
    if outcome.bad:
        return f"{outcome.result:<9}  {outcome.task}: {outcome.error}"
    return f"{outcome.result:<9}  {outcome.task} ({outcome.versions} version(s), {show.size(outcome.size)})"


@contextmanager
def _target(url: str, dry_run: bool) -> Iterator[Store | None]:
    """The registry at ``url``, made if there is none. None in a dry run that would make it."""
    with telling(url):
        try:
            found = open_registry(url, create=not dry_run)
        except RegistryMissing:
            if not dry_run:
                raise
            found = None
    with _closing(found):
        yield found


@contextmanager
def _closing(store: Store | None) -> Iterator[None]:
    try:
        yield
    finally:
        if store is not None:
            store.close()


def _folder_url(folder: Path) -> str:
    if ":/" in str(folder):  # Path turns the // of a URL into one slash
        raise typer.BadParameter(f"expected a folder, got {str(folder)!r}; `copy` takes other registries")
    return f"disk://{quote(str(folder.expanduser().absolute()))}"


def _check_two(source: str, target: str) -> None:
    """Raise BadParameter if both are one registry: nothing would be copied, and it would look fine."""
    if is_redis(source) or is_redis(target):
        same = source == target
    else:
        same = registry_path(source).resolve() == registry_path(target).resolve()
    if same:
        raise typer.BadParameter(f"expected two registries, got {shown_url(source)} twice")
