"""``prefixd prefixes list | inspect | promote | rollback | verify``.

Owns these commands. The registry does their work and ``show`` prints the results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixes.actor import local_actor
from prefixes.cli import show
from prefixes.cli.target import (
    AliasOption,
    ExpectedOption,
    JsonOption,
    RefArgument,
    RegistryOption,
    ServerOption,
    TaskArgument,
    application,
    command,
    fetch,
    loaded,
    opened,
    opened_store,
    reference,
    task_of,
)
from prefixes.errors import PrefixdError, RegistryUnavailable
from prefixes.registry.records import task_summary, task_to_dict
from prefixes.spec import DEFAULT_ALIAS, BackboneSpec, check_compatible, check_name

if TYPE_CHECKING:
    from prefixes.registry.base import Registry, TaskInfo, VersionInfo

app = application("Look at tasks and move their aliases.")


@command(app, "list")
def list_tasks(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's tasks.", show_default=False)] = None,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="List what `undelete` can bring back instead; not through a server.")
    ] = False,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """List tasks: where production points, how many versions there are."""
    from prefixes.client import RemoteRegistry

    if tenant is not None:
        check_name("tenant", tenant)
    if deleted:
        _list_deleted(tenant, registry, server, as_json)
        return
    with opened(registry, server) as source:
        if isinstance(source, RemoteRegistry):
            summaries = [item for item in source.summaries() if tenant in (None, item["task"].partition("/")[0])]
        else:
            summaries = [task_summary(task) for task in source.tasks(tenant)]
    if as_json:
        show.show_json({"prefixes": summaries})
    else:
        show.show_list(summaries)


def _list_deleted(tenant: str | None, registry: str | None, server: str | None, as_json: bool) -> None:
    with opened_store(registry, server) as store:
        items = store.deleted(tenant)
    if as_json:
        show.show_json({"deleted": [{"deleted_at": item.deleted_at, **task_summary(item.task)} for item in items]})
    else:
        show.show_deleted(items)


@command(app, "inspect")
def inspect(
    task: TaskArgument, registry: RegistryOption = None, server: ServerOption = None, as_json: JsonOption = False
) -> None:
    """Show a task: its versions with metadata and record, and every move of its aliases."""
    task_of(task)  # wrong usage is told before anything is opened
    with opened(registry, server) as source:
        ref = task_of(task, source)
        info = source.inspect(ref.tenant, ref.name)
    if as_json:
        show.show_json(task_to_dict(info))
    else:
        show.show_task(info)


@command(app, "promote")
def promote(
    ref: RefArgument,
    alias: AliasOption = DEFAULT_ALIAS,
    expected_current: ExpectedOption = None,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version: promote e2e@sha256:0123…, or promote e2e@canary."""
    if "@" not in ref:
        raise typer.BadParameter(f"expected [TENANT/]NAME@sha256:… or [TENANT/]NAME@ALIAS, got {ref!r}")
    with opened(registry, server) as source:
        found = source.resolve(reference(ref, source))
        task = source.promote(
            found.tenant, found.name, found.version, alias=alias, expected_current=expected_current, actor=local_actor()
        )
    show.show_aliases(task, as_json=as_json)


@command(app, "rollback")
def rollback(
    task: TaskArgument,
    alias: AliasOption = DEFAULT_ALIAS,
    expected_current: ExpectedOption = None,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at the version before; again for the one before that."""
    with opened(registry, server) as source:
        ref = task_of(task, source)
        current = expected_current
        if current is None:
            current = source.inspect(ref.tenant, ref.name).aliases.get(alias)
        try:
            moved = source.rollback(
                ref.tenant, ref.name, alias=alias, expected_current=current, actor=local_actor()
            )
        except RegistryUnavailable as error:
            if current:
                error.message += f"; it may have been made: to repeat it, add --expected-current {current}"
            raise
    show.show_aliases(moved, as_json=as_json)


@command(app, "verify")
def verify(
    task: Annotated[str | None, typer.Argument(help="[TENANT/]NAME; every task where none is given.")] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also compare with this backbone: demo, a folder or a hub id."),
    ] = None,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every version again: digest, shapes, finite values, the index's word for it. Exits 1 if one is bad."""
    spec = loaded(backbone).spec if backbone is not None else None
    results: list[dict[str, Any]] = []
    with opened(registry, server) as source:
        ref = task_of(task, source) if task is not None else None
        tasks = source.tasks() if ref is None else [source.inspect(ref.tenant, ref.name)]
        for found in tasks:
            results += [_verified(source, found, info, spec) for info in found.versions]
    bad = [result for result in results if result["error"] is not None]
    if as_json:
        show.show_json({"versions": results, "bad": len(bad)})
    else:
        for result in results:
            line = f"{result['task']}@{result['version']}"
            typer.echo(f"bad {line}: {result['error']}" if result["error"] else f"ok  {line}")
        typer.echo(f"{len(results)} version(s), {len(bad)} bad")
    if bad:
        raise typer.Exit(1)


def _verified(source: Registry, task: TaskInfo, info: VersionInfo, backbone: BackboneSpec | None) -> dict[str, Any]:
    from prefixes.registry.store import check_artifact

    error = None
    try:
        prefix = check_artifact(fetch(source, task.tenant, task.name, info.version), info)
        if backbone is not None:
            check_compatible(prefix.spec, backbone)
    except PrefixdError as failure:
        error = failure.message
    return {"task": f"{task.tenant}/{task.name}", "version": info.version, "error": error}


@command(app, "share")
def share(
    task: TaskArgument,
    tenant: Annotated[list[str] | None, typer.Option(metavar="NAME", help="With this tenant (repeatable).")] = None,
    everyone: Annotated[bool, typer.Option("--everyone", help="With every tenant.")] = False,
    download: Annotated[bool, typer.Option("--download", help="They may have the artifact too.")] = False,
    nobody: Annotated[bool, typer.Option("--nobody", help="Make it private again.")] = False,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let other tenants generate with a task and read its card, by tenant/name. What is given takes the old's place."""
    from prefixes.cli.directory import opened_directory

    if nobody == bool(everyone or tenant) or (nobody and download):
        raise typer.BadParameter("expected --tenant or --everyone, with --download or without, or else --nobody")
    with opened(registry, server) as source:
        ref = task_of(task, source)
    with opened_directory(registry, server) as directory:
        shared = directory.share(ref.tenant, ref.name, everyone=everyone, tenants=tenant or (), download=download)
    if as_json:
        show.show_json({"task": ref.task, **shared})
    else:
        whom = "everyone" if shared["everyone"] else ", ".join(shared["tenants"]) or "nobody"
        typer.echo(f"shared {ref.task} with {whom}{', download too' if shared['download'] else ''}")
