"""Prints tasks: tables for people, JSON for programs.

Owns the output's form. Does not know where a task comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixes.registry.base import AuditEntry, DeletedTask, TaskInfo
from prefixes.registry.records import version_to_dict
from prefixes.spec import DEFAULT_ALIAS

SHORT = len("sha256:") + 12
LONG = 120
"""Most characters of a text within what a table says of a version."""


def show_json(value: Any) -> None:
    """Print indented JSON."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))


def short(version: str | None) -> str:
    """A digest shortened for tables. Commands accept it too."""
    return version[:SHORT] if version else "-"


def show_list(summaries: list[dict[str, Any]]) -> None:
    """Print a table of tasks."""
    resident = any("resident" in summary for summary in summaries)
    headings = ["task", "production", "versions", "prefix tokens", "other aliases"]
    rows = []
    for summary in summaries:
        others = {alias: version for alias, version in summary["aliases"].items() if alias != DEFAULT_ALIAS}
        row = [
            summary["task"],
            short(summary["version"]),
            str(summary["versions"]),
            str(summary["prefix_tokens"] or "-"),
            ", ".join(f"{alias} {short(version)}" for alias, version in sorted(others.items())) or "-",
        ]
        rows.append([*row, "yes" if summary.get("resident") else "no"] if resident else row)
    show_table([*headings, "in memory"] if resident else headings, rows)


def show_task(task: TaskInfo) -> None:
    """Print a task: its versions, newest first, and the moves of its aliases, oldest first."""
    typer.echo(f"{task.tenant}/{task.name}\n")
    rows = []
    for info in task.versions:
        sites = [f"{site} {sited.length} ({sited.positions}, {sited.dtype})" for site, sited in info.spec.sites.items()]
        aliases = sorted(alias for alias, version in task.aliases.items() if version == info.version)
        row = [short(info.version), ", ".join(aliases) or "-", info.published_at, size(info.size), ", ".join(sites)]
        rows.append([*row, repr(info.spec.template), _brief(info.spec.defaults), _brief(info.record)])
    headings = ["version", "aliases", "published", "size", "prefix", "template", "defaults", "record"]
    show_table(headings, rows)
    typer.echo("")
    moves = [
        [alias, entry.at, entry.action, short(entry.version)]
        for alias, entries in sorted(task.history.items())
        for entry in entries
    ]
    show_table(["alias", "at", "action", "version"], moves)
    for info in task.versions:
        typer.echo(f"\n{short(info.version)}  backbone {info.spec.fingerprint}")
        if info.spec.origin:
            typer.echo(f"  made by {_brief(info.spec.origin)}")
        for entry in info.replaced:
            typer.echo(f"  until {entry.at} its record had {_brief({entry.name: entry.value})}")


def show_audit(entries: Sequence[AuditEntry]) -> None:
    """Print a table of changes, the latest first."""
    rows = [
        [
            entry.at, entry.actor, entry.action, entry.task, entry.alias or "-", short(entry.old), short(entry.new),
            entry.note or "",
        ]
        for entry in entries
    ]  # fmt: skip
    show_table(["at", "actor", "action", "task", "alias", "from", "to", "note"], rows)


def show_deleted(items: Sequence[DeletedTask]) -> None:
    """Print a table of deleted tasks, the latest first."""
    rows = []
    for item in items:
        task, production = item.task, item.task.aliases.get(DEFAULT_ALIAS)
        rows.append([item.deleted_at, f"{task.tenant}/{task.name}", short(production), str(len(task.versions))])
    show_table(["deleted", "task", "production", "versions"], rows)


def show_aliases(task: TaskInfo, *, as_json: bool) -> None:
    """Print where the aliases point after a move."""
    if as_json:
        show_json({"task": f"{task.tenant}/{task.name}", "aliases": dict(task.aliases)})
    else:
        for alias, version in sorted(task.aliases.items()):
            typer.echo(f"{task.tenant}/{task.name}@{alias} is {version}")


def published(task: TaskInfo, version: str, *, as_json: bool) -> None:
    """Print what was just published."""
    info = next(info for info in task.versions if info.version == version)
    if as_json:
        name = f"{task.tenant}/{task.name}"
        show_json({"task": name, "aliases": dict(task.aliases), **version_to_dict(info)})
    else:
        typer.echo(f"published {task.tenant}/{task.name} {version} ({size(info.size)})")
        show_aliases(task, as_json=False)


def show_record(found: Mapping[str, Any], as_json: bool) -> None:
    """Print a tenant or a key."""
    if as_json:
        show_json(found)
    else:
        show_table(["", ""], [[name, _in_words(value)] for name, value in found.items()])


def show_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a plain table. Outside a terminal it is up to 1,000 columns wide."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def size(count: int) -> str:
    """A number of bytes for people."""
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name} {one}" for name, one in value.items()]
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value is None else str(value)


def _brief(values: Mapping[str, Any]) -> str:
    return json.dumps(_cut(values), sort_keys=True, ensure_ascii=False) if values else "-"


def _cut(value: Any) -> Any:
    """A value whose long texts are cut, such as an origin's digests of inputs."""
    if isinstance(value, Mapping):
        return {name: _cut(item) for name, item in value.items()}
    return f"{value[:LONG]}…" if isinstance(value, str) and len(value) > LONG else value
