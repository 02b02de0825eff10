"""``prefixd prefixes undelete | gc | audit``: deleted tasks, artifacts that no task names, and who changed what.

Owns these commands. The registry does their work and ``show`` prints the results.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from prefixes.actor import local_actor
from prefixes.cli import show
from prefixes.cli.durations import seconds_of
from prefixes.cli.target import (
    JsonOption,
    NoServerOption,
    RegistryOption,
    ServerOption,
    TaskArgument,
    application,
    command,
    opened,
    opened_store,
    task_of,
)
from prefixes.registry.base import CONFIRMED_BELOW_S, RETENTION_S
from prefixes.registry.records import audit_to_dict
from prefixes.spec import check_name

if TYPE_CHECKING:
    from prefixes.registry.base import AuditEntry, GcReport, Store

app = application("Keep a registry tidy, and see who changed what.")


@command(app, "undelete")
def undelete(
    task: TaskArgument, registry: RegistryOption = None, server: ServerOption = None, as_json: JsonOption = False
) -> None:
    """Bring back a task that was deleted, or replaced by `copy` or `restore`, with all its versions and aliases.

    It must not have been taken by `gc`, and no task of that name may be there. Of several, the one deleted last comes
    back; `list --deleted` shows them.
    """
    with opened(registry, server) as source:
        ref = task_of(task, source)
        show.show_aliases(source.undelete(ref.tenant, ref.name, actor=local_actor()), as_json=as_json)


@command(app, "gc")
def gc(
    retention: Annotated[
        str,
        typer.Option(
            metavar="DURATION",
            help="Keep what was deleted less than this ago: days, or a number with s, m, h or d, such as 36h.",
        ),
    ] = f"{RETENTION_S / 86400:g}d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be taken; take nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, with a short --retention.")] = False,
    registry: RegistryOption = None,
    server: NoServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take for good what was deleted long enough ago, and the artifacts that nothing names any more.

    Until then `undelete` brings a task back. Artifacts that no task names are left by publishers that were killed; one
    that a publisher is at work on is never taken. Servers may run meanwhile. Run it daily. It asks first where
    --retention is below an hour. A tenant whose data are damaged is told and the others are cleaned; then it exits 1.
    """
    seconds = seconds_of("--retention", retention, days=True)
    if seconds < CONFIRMED_BELOW_S and not (dry_run or yes):
        asked = f"--retention: expected {CONFIRMED_BELOW_S / 3600:g}h or more, got {retention}"
        typer.confirm(f"{asked}. Take for good what was deleted so lately?", abort=True, err=True)
    with opened_store(registry, server) as store:
        report = store.gc(retention_s=seconds, dry_run=dry_run, actor=local_actor())
    if as_json:
        show.show_json({**asdict(report), "dry_run": dry_run})
    else:
        _show_gc(report, dry_run)
    if report.failed:
        raise typer.Exit(1)


def _show_gc(report: GcReport, dry_run: bool) -> None:
    for task in report.tasks:
        typer.echo(f"task      {task}")
    for artifact in report.artifacts:
        typer.echo(f"artifact  {artifact}")
    verb = "would take" if dry_run else "took"
    what = f"{len(report.tasks)} deleted task(s) and {len(report.artifacts)} artifact(s)"
    typer.echo(f"{verb} {what}, {show.size(report.freed_bytes)}")
    for failed in report.failed:
        typer.echo(f"not cleaned: {failed}", err=True)


@command(app, "audit")
def audit(
    whose: Annotated[
        str,
        typer.Argument(metavar="TENANT|TENANT/NAME", help="A tenant, or one of its tasks.", show_default=False),
    ],
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many entries, the latest first.")] = 20,
    registry: RegistryOption = None,
    server: NoServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who changed a tenant's tasks, when and how: audit acme, or audit acme/e2e.

    Every publish, promote, rollback, delete, undelete, copy and purge is there, with the versions before and after;
    it is written in one with the change.
    """
    tenant, slash, name = whose.partition("/")
    check_name("tenant", tenant)
    if slash:
        check_name("task", name)
    with opened_store(registry, server) as store:
        entries = _entries(store, tenant, name, limit)
    if as_json:
        show.show_json({"entries": [audit_to_dict(entry) for entry in entries]})
    else:
        show.show_audit(entries)


def _entries(store: Store, tenant: str, name: str, limit: int) -> list[AuditEntry]:
    """The last ``limit`` entries of the tenant, or of one task if ``name`` is given; fewer if there are no more."""
    asked = limit
    while True:
        entries = store.audit(tenant, limit=asked)
        found = [entry for entry in entries if not name or entry.task == f"{tenant}/{name}"]
        if len(found) >= limit or len(entries) < asked:
            return found[:limit]
        asked *= 4
