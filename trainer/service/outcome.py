"""How a job's process ended, and what its owner is told of that.

Owns the reading of a process's last word and exit code, and that no message tells of the machine; knows no store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from trainer.jobs.job import Failure
from trainer.service.process import LOG
from trainer.service.settings import TrainerSettings

MAX_MESSAGE: Final = 2000
"""Characters of a failure's message at most."""
_PATH: Final = re.compile(r"""(?:(?<=file://)|(?<![\w/.<>~-]))/(?:[^\s/'"`,;:()<>]+/)+[^\s/'"`,;:()<>]*""")
"""An absolute path of two names or more, such as of a library's cache or of Python itself."""


class Cancelled(Exception):
    """The job ended because its owner asked."""


class JobFailed(Exception):
    """The job ended by an error that its process named, or by its process's death."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def version_of(last: Mapping[str, Any], code: int, settings: TrainerSettings) -> str:
    """What the process said in the end; how it exited after that says nothing. Raises Cancelled, JobFailed."""
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


def public(message: str, settings: TrainerSettings) -> str:
    """``message`` for the job's owner: names in place of where things are on this machine, and not too long."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (Path's own raises where there is none)
    places = {home: "<home>"} if home.is_absolute() else {}
    places |= {settings.data.absolute(): "<data>", settings.data.resolve(): "<data>"}
    for name, text in settings.backbones.items():
        if (place := Path(text)).is_absolute() or place.is_dir():  # else it is a name of the hub
            places |= {place.absolute(): f"<{name}>", place.resolve(): f"<{name}>"}
    for place in sorted(places, key=lambda place: len(str(place)), reverse=True):
        if place != place.parent:  # the root is in every path
            message = message.replace(str(place), places[place])
    return _PATH.sub("<path>", message)[:MAX_MESSAGE]
