"""``prefixd prefixes``: the commands on a registry or a running server, put together.

Owns the sub-application ``app`` alone. Torch is imported by the commands that need it, so that ``--help`` is quick.
"""

from __future__ import annotations

from prefixes.cli import copies, manage, transfer, upkeep
from prefixes.cli.target import application

app = application("List, inspect, publish, import, export and move prefixes; back up, restore and clean registries.")
for _group in (manage.app, transfer.app, copies.app, upkeep.app):
    app.registered_commands += _group.registered_commands
    app.registered_groups += _group.registered_groups
