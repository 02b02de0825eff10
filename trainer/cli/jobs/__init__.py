"""``prefixd jobs`` and ``prefixd datasets``: a running trainer from the command line, put together.

Owns the two sub-applications alone. No command imports torch: what is trained is trained by the service.
"""

from __future__ import annotations

from prefixes.cli.target import application
from trainer.cli.jobs import datasets, manage, submit, watch

jobs_app = application(submit.HELP)
for _group in (submit.app, watch.app, manage.app):
    jobs_app.registered_commands += _group.registered_commands
datasets_app = datasets.app
