"""``prefixd prefixes delete | prune``: tasks and versions that nobody needs any more.

Owns these commands and which versions a prune takes. The registry does their work.
"""

from __future__ import annotations

from typing import Annotated

import typer

from prefixes.actor import local_actor
from prefixes.cli import show
from prefixes.cli.target import (
    JsonOption,
    RefArgument,
    RegistryOption,
    ServerOption,
    TaskArgument,
    application,
    command,
    opened,
    reference,
    task_of,
)
from prefixes.errors import Conflict, TaskNotFound
from prefixes.registry.transitions import prunable

app = application("Delete tasks and versions.")


@command(app, "delete")
def delete(
    ref: RefArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a task with all its versions, or one version: delete e2e, or delete e2e@sha256:0123….

    It asks first. `undelete` brings a task back until `gc` takes it, but no single version. A version that an alias
    points at is not deleted.
    """
    if "@" in ref:
        _delete_version(ref, yes, registry, server, as_json)
        return
    with opened(registry, server) as source:
        task = task_of(ref, source)
        versions = len(source.inspect(task.tenant, task.name).versions)
        if not yes:
            typer.confirm(f"Delete {task.task} and its {versions} version(s)?", abort=True, err=True)
        source.delete(task.tenant, task.name, actor=local_actor())
    if as_json:
        show.show_json({"task": task.task, "deleted": True})
    else:
        typer.echo(f"deleted {task.task}")


def _delete_version(text: str, yes: bool, registry: str | None, server: str | None, as_json: bool) -> None:
    if not text.partition("@")[2].startswith("sha256:"):
        raise typer.BadParameter(f"expected [TENANT/]NAME or [TENANT/]NAME@sha256:…, got {text!r}")
    with opened(registry, server) as source:
        found = source.resolve(reference(text, source))
        if not yes:
            typer.confirm(f"Delete {found.tenant}/{found.name}@{found.version}?", abort=True, err=True)
        source.delete_version(found.tenant, found.name, found.version, actor=local_actor())
    if as_json:
        show.show_json({"task": f"{found.tenant}/{found.name}", "version": found.version, "deleted": True})
    else:
        typer.echo(f"deleted {found.tenant}/{found.name}@{found.version}")


@command(app, "prune")
def prune(
    task: TaskArgument,
    keep: Annotated[int, typer.Option(min=1, help="How many versions stay: the newest ones.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted; delete nothing.")] = False,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete all but a task's newest versions: prune e2e --keep 10.

    A version that an alias points at stays as well, however old it is. A later rollback passes over what was deleted.
    `gc` takes the artifacts, 7 days later unless told otherwise.
    """
    taken: list[str] = []
    with opened(registry, server) as source:
        ref = task_of(task, source)
        found = source.inspect(ref.tenant, ref.name)
        for version in prunable(found, keep):
            try:
                if not dry_run:
                    source.delete_version(ref.tenant, ref.name, version, actor=local_actor())
                taken.append(version)
            except (Conflict, TaskNotFound):
                pass  # an alias was moved to it meanwhile, or somebody else has deleted it
    kept = [info.version for info in found.versions if info.version not in taken]
    if as_json:
        show.show_json({"task": ref.task, "deleted": taken, "kept": kept, "dry_run": dry_run})
        return
    for version in taken:
        typer.echo(f"version  {version}")
    typer.echo(f"{'would delete' if dry_run else 'deleted'} {len(taken)} version(s) of {ref.task}, {len(kept)} stay")
