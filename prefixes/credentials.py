"""The key that a command or a program of ours presents: ``--key``, else ``PREFIXD_KEY``; a secret, or ``@FILE``.

Owns where it is looked for, and who may read the file. A secret is never printed, also not in an error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prefixes.errors import PrefixdError

VARIABLE: Final = "PREFIXD_KEY"
_MAX_BYTES: Final = 4096
_OTHERS: Final = 0o077


class NoKey(PrefixdError):
    """A key was meant to be presented, and there is none where it was said to be."""

    code = "invalid_request"


def presented_key(given: str | None, warn: Callable[[str], None]) -> str | None:
    """The secret that ``given`` says, else the environment; None where neither does. Raises NoKey.

    ``warn`` is told of a file that is not its owner's alone.
    """
    text = given if given is not None else os.environ.get(VARIABLE) or None
    if text is None:
        return None
    if not text.startswith("@"):
        return _checked(text, "--key" if given is not None else VARIABLE)
    path = Path(text[1:]).expanduser()
    try:
        with path.open("rb") as file:
            data, mode = file.read(_MAX_BYTES), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise NoKey(f"key: cannot read {path}: {error.strerror}") from None
    if stat.S_ISREG(mode) and mode & _OTHERS:
        warn(f"key: {path} is open to other users (mode {stat.S_IMODE(mode):04o}); expected 0600: chmod 600 it")
    return _checked(data.decode("utf-8", errors="replace").strip(), str(path))


def _checked(secret: str, where: str) -> str:
    """``secret``, if a header can carry it."""
    if not secret.isascii() or not secret.isprintable() or " " in secret or not secret:
        raise NoKey(f"key: expected a secret, pfx_…, in {where}, got something else")
    return secret
