"""``prefixd jobs`` and ``prefixd datasets``: the command line of a running trainer.

Puts the two sub-applications together and owns nothing else. No command imports torch: the service trains.
"""

from __future__ import annotations

from prefixes.cli.target import application
from trainer.cli.jobs import datasets, manage, submit, watch

jobs_app = application(submit.HELP)
for _group in (submit.app, watch.app, manage.app):
    jobs_app.registered_commands += _group.registered_commands
datasets_app = datasets.app
