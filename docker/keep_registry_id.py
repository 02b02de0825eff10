"""Keeps the registry's id where servers and trainers read it: ``python keep_registry_id.py FILE``, once, at start.

The file is settings for them, with the one line ``registry_id``. What stands there from an earlier start stays; else it
is ``PREFIXD_REGISTRY_ID`` where that is set; else the id of the registry at ``PREFIXD_REGISTRY``, which is made where
there is none. So a registry is made at the first start alone: later an emptied Redis is an outage, for a server that
starts as for one that runs. A registry that it finds or makes gets the operator's key and Prometheus', by the hashes in
``PREFIXD_OPERATOR_HASH_FILE`` and ``PREFIXD_METRICS_HASH_FILE``: so it is closed before any service starts. Owns the
file; knows no service.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import closing
from pathlib import Path

from prefixes.errors import PrefixdError
from prefixes.registry import open_registry
from prefixes.tenancy.hash_file import adopt

LINE = re.compile(r'registry_id = "([A-Za-z0-9][A-Za-z0-9._-]{0,63})"\n')


def main(target: Path) -> int:
    """Write the file if it is not there; returns the exit code."""
    if target.exists():
        sys.stdout.write(f"registry id: kept, {target.read_text().strip()}\n")
        return 0
    given = os.environ.get("PREFIXD_REGISTRY_ID", "")
    try:
        registry_id = given or _found(os.environ["PREFIXD_REGISTRY"])
    except PrefixdError as error:
        sys.stderr.write(f"registry id: {error.message}\n")
        return 1
    line = f'registry_id = "{registry_id}"\n'
    if not LINE.fullmatch(line):
        sys.stderr.write(f"PREFIXD_REGISTRY_ID: expected 1 to 64 of A-Z a-z 0-9 . _ -, got {given[:80]!r}\n")
        return 1
    _write(target, line)
    sys.stdout.write(f"registry id: {'yours' if given else 'found'}, {line}")
    return 0


def _found(url: str) -> str:
    with closing(open_registry(url)) as registry:
        adopt(registry.tenancy, *map(_file, ("PREFIXD_OPERATOR_HASH_FILE", "PREFIXD_METRICS_HASH_FILE")))
        return registry.id


def _file(variable: str) -> Path | None:
    return Path(os.environ[variable]) if os.environ.get(variable) else None


def _write(target: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = target.with_suffix(".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
