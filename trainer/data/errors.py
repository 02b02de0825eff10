"""What can end a run besides its data and options: a stop, too little memory, a full disk. Torch-free."""

from __future__ import annotations

import errno
from typing import Final

from prefixes.errors import PrefixdError

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)


class TrainingStopped(PrefixdError):
    """The caller asked the run to stop; its last checkpoint stays."""

    code = "cancelled"


class OutOfMemory(PrefixdError):
    """The machine or the device does not have the memory that the run needs."""

    code = "out_of_memory"


class DiskFull(PrefixdError):
    """There is no room or quota for a file of the run. No half-written file is left."""

    code = "disk_full"
