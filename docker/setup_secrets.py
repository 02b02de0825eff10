"""Puts the deployment's passwords and keys where those who need them read them: ``setup_secrets.py FOLDER``, at start.

For each of ``PASSWORDS`` and ``KEYS``: the compose secret of that name where it is not empty, else what stands in the
folder from an earlier start, else a new random one. So nobody runs with a secret that stands in a repository, and a
first start needs no preparation. A key's secret lies in a folder of its own beside FOLDER, for its user alone; FOLDER
has its hash, which the services make the key from. Owns files and their modes. Prints names, never values.

Of the package it takes nothing but the form of a key, which needs no library.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from prefixes.tenancy.secret import hash_line, new_id, new_secret, parse_secret

PASSWORDS = ("redis_password", "grafana_password")
KEYS = {"operator_key": ("operator", 0o400), "metrics_key": ("metrics", 0o444)}
"""The folder of each key's secret, which one service alone mounts, and its mode: Prometheus runs as another user."""
GIVEN = Path("/run/secrets")
SHARED = 0o444
"""Readable for all who have the volume: the services run under different users, and only they mount it."""


class Unusable(Exception):
    """What was given cannot be used."""


def main(folder: Path, given: Path = GIVEN) -> int:
    """Write what is missing or has been changed; returns the exit code."""
    try:
        for name in PASSWORDS:
            _put(name, folder / name, SHARED, _given(given / name), lambda: secrets.token_urlsafe(32))
        for name, (own, mode) in KEYS.items():
            value = _put(name, folder.parent / own / "key", mode, _given(given / name), lambda: new_secret(new_id()))
            presented = parse_secret(value)
            if presented is None:
                raise Unusable(f"{name}: expected what `prefixd keys new-secret` writes, pfx_…, got something else")
            _write(folder / name.replace("_key", "_hash"), hash_line(presented), SHARED)
    except Unusable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _given(source: Path) -> str:
    try:
        own = source.read_text().strip() if source.exists() else ""
    except PermissionError:
        raise Unusable(
            f"{source.name}: expected a file that user {os.getuid()} may read, got one that it may not"
        ) from None
    if any(character.isspace() or not character.isprintable() or character in "\"'\\" for character in own):
        raise Unusable(f"{source.name}: expected one line without spaces, quotes and backslashes")
    return own


def _put(name: str, target: Path, mode: int, own: str, make: Callable[[], str]) -> str:
    before = target.read_text() if target.exists() else ""
    value = own or before or make()
    if value == before:
        action = "kept"
    else:
        _write(target, value, mode)
        action = "taken from the compose secret" if own else "made"
    sys.stdout.write(f"{name}: {action}\n")
    return value


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
