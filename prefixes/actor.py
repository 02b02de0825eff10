"""Names who acts from this machine, for the audit. Does not know a server's callers."""

from __future__ import annotations

import getpass
import os
import platform


def local_actor() -> str:
    """``cli:user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container a user may have no name
        user = str(os.getuid())
    return f"cli:{user}@{platform.node()}"
