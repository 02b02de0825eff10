"""What a job may still do: with the rights that the key of whoever submitted it has by then.

Owns that question, which is asked again before a worker trains, just before a version of another tenant is read and
before the registry is changed: days may lie between. A refusal leaves a note, as one of a request does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prefixes.spec import TaskRef
from prefixes.tenancy.denial import Denial
from prefixes.tenancy.directory import utc_now
from prefixes.tenancy.keyring import Keyring
from server.web.auth import Action, Caller, authorize
from server.web.authentication import caller_with
from server.web.denials import DenialLog, Refused, note_refused
from server.web.errors import Forbidden
from trainer.jobs.record import Job


def check_rights(keyring: Keyring, job: Job, task: TaskRef) -> None:
    """Raise Forbidden or TaskNotFound unless the job may publish ``task`` now, RegistryUnavailable if nobody knows.

    A rotated key still is the same key. A job of a time without keys has none, and may publish while none is needed.
    """
    caller = _caller_of(
        keyring, job, Action.PUBLISH, task,
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
    caller = _caller_of(keyring, job, Action.DOWNLOAD, ref, "so it reads no version of another tenant's")
    if caller is not None:
        authorize(caller, Action.DOWNLOAD, ref.tenant, ref.name)


def audit(denials: DenialLog, job: Job, notes: Sequence[Refused]) -> None:
    """Pass on the notes that were taken of ``job``: its tenant finds them beside those of its requests."""
    for note in notes:
        denials.note(job.tenant, partial(_denial, job, note))


def _denial(job: Job, note: Refused) -> Denial:
    request_id = job.actor.partition("/request:")[2]  # the one that submitted the job
    return Denial(utc_now(), job.key_id, note.action, f"job {job.id}", note.what, note.reason, request_id)


def _caller_of(keyring: Keyring, job: Job, action: Action, task: TaskRef, therefore: str) -> Caller | None:
    """Who asks for what the job does, None where nobody needs a key."""
    keyring.look()
    if not keyring.closed:
        return None
    known = keyring.known
    try:
        if job.key_id is None:
            raise Forbidden(f"the job was submitted without a key, and one is needed now, {therefore}")
        key = known.tenancy.keys.get(job.key_id)
        if key is None or not key.works(utc_now()):
            raise Forbidden(f"the key that submitted the job works no more, {therefore}")
        return caller_with(known, key)
    except Forbidden as error:
        own = task.tenant == job.tenant
        note_refused(action.value, f"{task.tenant}/{task.name}" if own else "", error.message)
        raise
