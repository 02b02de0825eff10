"""How a job's process ended, and what its owner is told about it.

Owns how the process's last message and exit code are read, and keeps the machine's paths out of failure messages.
Knows no store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from prefixes.errors import NO_ROOM, PrefixdError
from prefixes.tenancy.secret import without_secrets
from trainer.jobs.record import Failure
from trainer.service.process import LOG
from trainer.service.settings import TrainerSettings

MAX_MESSAGE: Final = 2000
"""Most characters of a failure's message."""
_PATH: Final = re.compile(r"""(?:(?<=file://)|(?<![\w/.<>~-]))/(?:[^\s/'"`,;:()<>]+/)+[^\s/'"`,;:()<>]*""")
"""An absolute path of two or more names, such as a library's cache or Python itself."""


class Cancelled(Exception):
    """The job ended because its owner asked."""


class JobFailed(Exception):
    """The job's process reported an error, or died."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def version_of(last: Mapping[str, Any], code: int, settings: TrainerSettings) -> str:
    """Return the version from the process's ``last`` message. The exit ``code`` counts only without one.

    Raises Cancelled, JobFailed.
    """
    if last.get("event") == "done":
        return str(last["version"])
    if last.get("event") == "failed":
        if last["code"] == "cancelled":
            raise Cancelled
        raise JobFailed(Failure(str(last["code"]), public(str(last["message"]), settings)))
    if code == -9:
        raise JobFailed(
            Failure(
                "out_of_memory",
                "the training process was killed (SIGKILL), most likely by the system for want of memory; "
                "a smaller batch_size, or accumulate, takes less",
            )
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise JobFailed(Failure("crashed", f"the training process ended by {how}; {LOG} in the job's folder says more"))


def failure_of(error: Exception, settings: TrainerSettings) -> Failure:
    """Return what the job's owner is told of ``error``. An unexpected one shows nothing but that it happened."""
    if isinstance(error, JobFailed):
        return error.failure
    if isinstance(error, PrefixdError):
        return Failure(error.code, public(error.message, settings))
    if isinstance(error, OSError):
        code = "disk_full" if error.errno in NO_ROOM else "worker_failed"
        return Failure(code, f"the worker cannot use its folder: {error.strerror}")
    return Failure("internal", "unexpected error; the worker's log says more")


def public(message: str, settings: TrainerSettings) -> str:
    """Return ``message`` for the job's owner: without paths, secrets and what is too long."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (Path's own raises where there is none)
    places = {home: "<home>"} if home.is_absolute() else {}
    places |= {settings.data.absolute(): "<data>", settings.data.resolve(): "<data>"}
    for name, text in settings.backbones.items():
        if (place := Path(text)).is_absolute() or place.is_dir():  # otherwise it is a hub name
            places |= {place.absolute(): f"<{name}>", place.resolve(): f"<{name}>"}
    for place in sorted(places, key=lambda place: len(str(place)), reverse=True):
        if place != place.parent:  # the root is part of every path
            message = message.replace(str(place), places[place])
    return without_secrets(_PATH.sub("<path>", message))[:MAX_MESSAGE]
