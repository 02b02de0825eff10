"""What a job may still do: with the rights that the key of whoever submitted it has by then.

Owns that question, which is asked again before a worker trains, just before a version of another tenant is read and
before the registry is changed: days may lie between.
"""

from __future__ import annotations

from prefixes.spec import TaskRef
from prefixes.tenancy.directory import utc_now
from prefixes.tenancy.keyring import Keyring
from server.web.auth import Action, Caller, authorize
from server.web.authentication import caller_with
from server.web.errors import Forbidden
from trainer.jobs.record import Job


def check_rights(keyring: Keyring, job: Job, task: TaskRef) -> None:
    """Raise Forbidden or TaskNotFound unless the job may publish ``task`` now, RegistryUnavailable if nobody knows.

    A rotated key still is the same key. A job of a time without keys has none, and may publish while none is needed.
    """
    caller = _caller_of(
        keyring, job,
        "so it publishes nothing; what it has trained is kept, and a retry with a key that may publish goes on with it",
    )  # fmt: skip
    if caller is not None:
        authorize(caller, Action.PUBLISH, task.tenant, task.name)


def check_start(keyring: Keyring, job: Job) -> None:
    """Raise as ``check_rights`` does unless the job may read the version that it starts from now.

    One of its own tenant's it may: nothing of that leaves the tenant before it is published.
    """
    start = job.spec.get("start_from")
    ref = TaskRef.parse(start) if start is not None else None
    if ref is None or ref.tenant == job.tenant:
        return
    caller = _caller_of(keyring, job, "so it reads no version of another tenant's")
    if caller is not None:
        authorize(caller, Action.DOWNLOAD, ref.tenant, ref.name)


def _caller_of(keyring: Keyring, job: Job, therefore: str) -> Caller | None:
    """Who asks for what the job does, None where nobody needs a key."""
    keyring.look()
    if not keyring.closed:
        return None
    known = keyring.known
    if job.key_id is None:
        raise Forbidden(f"the job was submitted without a key, and one is needed now, {therefore}")
    key = known.tenancy.keys.get(job.key_id)
    if key is None or not key.works(utc_now()):
        raise Forbidden(f"the key that submitted the job works no more, {therefore}")
    return caller_with(known, key)
