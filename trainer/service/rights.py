"""Whether a job may still publish: with the rights that the key of whoever submitted it has by then.

Owns that question, which is asked again just before the registry is changed: hours may lie between.
"""

from __future__ import annotations

from prefixes.spec import TaskRef
from prefixes.tenancy.directory import utc_now
from prefixes.tenancy.keyring import Keyring
from server.web.auth import Action, authorize
from server.web.authentication import caller_with
from server.web.errors import Forbidden
from trainer.jobs.record import Job


def check_rights(keyring: Keyring, job: Job, task: TaskRef) -> None:
    """Raise Forbidden or TaskNotFound unless the job may publish ``task`` now, RegistryUnavailable if nobody knows.

    A rotated key still is the same key. A job of a time without keys has none, and may publish while none is needed.
    """
    keyring.look()
    if not keyring.closed:
        return
    known = keyring.known
    key = known.tenancy.keys.get(job.key_id) if job.key_id is not None else None
    if key is None or not key.works(utc_now()):
        raise Forbidden(
            "the key that submitted the job works no more, so its prefix is not published; it is kept, and a retry "
            "with a key that may publish does it"
        )
    authorize(caller_with(known, key), Action.PUBLISH, task.tenant, task.name)
