"""What can end a run besides its data and options: a stop, too little memory. Torch-free."""

from __future__ import annotations

from prefixes.errors import PrefixdError


class TrainingStopped(PrefixdError):
    """The caller asked the run to stop; its last checkpoint stays."""

    code = "cancelled"


class OutOfMemory(PrefixdError):
    """The machine or the device does not have the memory that the run needs."""

    code = "out_of_memory"
