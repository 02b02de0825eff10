"""Who acts from this machine, for the audit. A server knows its callers by other means."""

from __future__ import annotations

import getpass
import os
import platform


def local_actor() -> str:
    """``cli:user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"cli:{user}@{platform.node()}"
