"""Puts the deployment's passwords where its services read them: ``python setup_secrets.py FOLDER``, once, at start.

Each reader has a folder in FOLDER, a volume that it alone mounts, with the passwords that it needs and no others. For
each password: the compose secret of that name where it is not empty, else what its first reader has from an earlier
start, else a new random one. So nobody runs with a password that stands in a repository, and a first start needs no
preparation. Owns files and their modes. Prints names, never values.

It runs without the package, with Python alone: so it writes its files itself and not by ``prefixes.files``.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

OURS, THEIRS = 0o400, 0o444
"""For a reader that runs as this program's user, and for one whose image has a user of its own, which alone mounts it.
"""
READERS = {
    "redis_password": {"redis": THEIRS, "server": OURS, "trainer": OURS},
    "grafana_password": {"grafana": THEIRS},
}
"""Each password's readers, and the mode of the file that each gets."""
GIVEN = Path("/run/secrets")


def main(folder: Path, given: Path = GIVEN) -> int:
    """Write what is missing or has been changed; returns the exit code."""
    for name, readers in READERS.items():
        targets = {folder / reader / name: mode for reader, mode in readers.items()}
        try:
            own = (given / name).read_text().strip() if (given / name).exists() else ""
        except PermissionError:
            sys.stderr.write(f"{name}: expected a file that user {os.getuid()} may read, got one that it may not\n")
            return 1
        if any(character.isspace() or not character.isprintable() or character in "\"'\\" for character in own):
            sys.stderr.write(f"{name}: expected one line without spaces, quotes and backslashes\n")
            return 1
        before = [target.read_text() if target.exists() else "" for target in targets]
        value = own or before[0] or secrets.token_urlsafe(32)
        for (target, mode), there in zip(targets.items(), before, strict=True):
            if there != value:
                _write(target, value, mode)
        made = "taken from the compose secret" if own else "made"
        sys.stdout.write(f"{name}: {'kept' if value == before[0] else made}\n")
    return 0


def _write(target: Path, value: str, mode: int) -> None:
    """Whole or not at all: a service may be waiting for it to appear."""
    temporary = target.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(value)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
