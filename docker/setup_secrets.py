"""Puts the deployment's passwords where its services read them: ``python setup_secrets.py FOLDER``, once, at start.

For each name in ``NAMES``: the compose secret of that name where it is not empty, else what stands in the folder from
an earlier start, else a new random one. So nobody runs with a password that stands in a repository, and a first start
needs no preparation. Owns files and their modes; knows no service. Prints names, never values.

It runs without the package, with Python alone: so it writes its files itself and not by ``prefixes.files``.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

NAMES = ("redis_password", "grafana_password")
GIVEN = Path("/run/secrets")
MODE = 0o444
"""Readable for all who have the volume: the services run under different users, and only they mount it."""


def main(folder: Path, given: Path = GIVEN) -> int:
    """Write what is missing or has been changed; returns the exit code."""
    for name in NAMES:
        target = folder / name
        try:
            own = (given / name).read_text().strip() if (given / name).exists() else ""
        except PermissionError:
            sys.stderr.write(f"{name}: expected a file that user {os.getuid()} may read, got one that it may not\n")
            return 1
        if any(character.isspace() or not character.isprintable() or character in "\"'\\" for character in own):
            sys.stderr.write(f"{name}: expected one line without spaces, quotes and backslashes\n")
            return 1
        before = target.read_text() if target.exists() else ""
        value = own or before or secrets.token_urlsafe(32)
        if value == before:
            action = "kept"
        else:
            _write(target, value)
            action = "taken from the compose secret" if own else "made"
        sys.stdout.write(f"{name}: {action}\n")
    return 0


def _write(target: Path, value: str) -> None:
    """Whole or not at all: a service may be waiting for it to appear."""
    temporary = target.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
    with os.fdopen(descriptor, "w") as file:
        file.write(value)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
