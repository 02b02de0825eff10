"""``prefixd prefixes``: puts together the commands on a registry or a running server.

Owns the sub-application ``app`` and knows no command's options. A command that needs torch imports it itself, so that
``--help`` is quick.
"""

from __future__ import annotations

from prefixes.cli import copies, manage, remove, transfer, upkeep
from prefixes.cli.target import application

app = application("List, inspect, publish, import, export and move prefixes; back up, restore and clean registries.")
for _group in (manage.app, remove.app, transfer.app, copies.app, upkeep.app):
    app.registered_commands += _group.registered_commands
    app.registered_groups += _group.registered_groups
