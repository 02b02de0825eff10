"""A key's id and the SHA-256 of its secret in a file, for services that shall know a key and never its secret.

Owns reading and writing it, and making the keys of a deployment from it; ``secret.hash_line`` is its form.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from prefixes.spec import DEFAULT_TENANT
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.model import InvalidKey, Scope
from prefixes.tenancy.secret import ID_LENGTH
from prefixes.tenancy.store import TenancyStore

_LINE: Final = re.compile(rf"([0-9A-Za-z]{{{ID_LENGTH}}}) ([0-9a-f]{{64}})\s*")


def adopt(store: TenancyStore, operator: Path | None, metrics: Path | None) -> None:
    """Make the operator's key and Prometheus' of tenant ``default``, each by its hash in a file, unless it was revoked.

    Raises InvalidKey.
    """
    for scope, file in ((Scope.OPERATOR, operator), (Scope.METRICS, metrics)):
        if file is not None:
            key_id, digest = read_hash(file)
            Directory(store).adopt(key_id, digest, DEFAULT_TENANT, scope.value, [scope], actor="setup")


def read_hash(path: Path) -> tuple[str, str]:
    """Id and digest. Raises InvalidKey."""
    try:
        with path.open("rb") as file:
            text = file.read(1000).decode("ascii", errors="replace")
    except OSError as error:
        raise InvalidKey(f"{path}: expected a key's hash, cannot read it: {error.strerror}") from None
    found = _LINE.fullmatch(text)
    if found is None:
        raise InvalidKey(f"{path}: expected one line, <id> <SHA-256>, as `prefixd keys new-secret` writes it")
    return found[1], found[2]


def write_new(path: Path, text: str, mode: int) -> None:
    """A new file with ``text``. Raises InvalidKey where there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
    except OSError as error:
        raise InvalidKey(f"{path}: expected a new file, got: {error.strerror}") from None
