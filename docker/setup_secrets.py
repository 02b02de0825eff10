"""Puts the deployment's passwords and keys where their readers find them: ``python setup_secrets.py FOLDER``, at start.

Each reader has a folder in FOLDER, a volume that it alone mounts, with what it needs and nothing else. For each secret:
the compose secret of that name where it is not empty, else what its first reader has from an earlier start, else a new
random one. So nobody runs with a secret that stands in a repository, and a first start needs no preparation. Of a key
the services get its hash, which they make it from; of its users' passwords Redis gets hashes. Owns files, their modes,
and what each user of Redis may do. Prints names, never values.

Of the package it takes nothing but the form of a key, which needs no library.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from prefixes.tenancy.secret import hash_line, new_id, new_secret, parse_secret

OURS, THEIRS = 0o400, 0o444
"""For a reader that runs as this program's user, and for one whose image has a user of its own, which alone mounts it.
"""
READERS = {
    "redis_password": {"redis": THEIRS},  # of Redis' own default user, who may do everything
    "redis_probe_password": {"redis": THEIRS},
    "redis_server_password": {"server": OURS},
    "redis_trainer_password": {"trainer": OURS},
    "grafana_password": {"grafana": THEIRS},
    "operator_key": {"operator": OURS},
    "metrics_key": {"prometheus": THEIRS},
}
"""Each secret's readers, and the mode of the file that each gets."""
HASHES = {"operator_key": "operator_hash", "metrics_key": "metrics_hash"}
"""Each key's hash, which the server gets: it makes the key. The trainer may not."""
ONCE = {"server": ("redis_password",), "trainer": ("redis_password", "operator_hash", "metrics_hash")}
"""What readers had in an earlier release and may no longer see."""
COMMANDS = (
    "&prefixd:changes +@read +@write -@dangerous +eval +evalsha +script|load +ping +time +info +publish +subscribe "
    "+unsubscribe +client|setname +client|setinfo"
)
ALL_KEYS = "~prefixd:* ~{prefixd}:*"
NO_TENANCY = (
    "~prefixd:* ~{prefixd}:registry ~{prefixd}:tenants ~{prefixd}:tenancy-used ~{prefixd}:denials ~{prefixd}:denials:* "
    "~{prefixd}:usage ~{prefixd}:usage:* ~{prefixd}:usage-batches:* ~{prefixd}:replicas:* %R~{prefixd}:tenancy"
)
"""All of a registry, of which tenants and keys can be read and not written: else whoever gets the trainer's password
could make an operator's key."""
JOBS = "~prefixd-trainer:* ~saq:* &prefixd-trainer:* &saq:* +@transaction +psubscribe +punsubscribe +select"
USERS = {
    "default": ("redis_password", "~* &* +@all"),
    "probe": ("redis_probe_password", "+ping"),
    "server": ("redis_server_password", f"{ALL_KEYS} {COMMANDS}"),
    "trainer": ("redis_trainer_password", f"{NO_TENANCY} {COMMANDS} {JOBS}"),
}
"""Redis' users: whose password each has, and what it may do, as in an ACL file of Redis 7. The order matters in a rule.
"""
GIVEN = Path("/run/secrets")


class Unusable(Exception):
    """What was given cannot be used."""


def main(folder: Path, given: Path = GIVEN) -> int:
    """Write what is missing or has been changed; returns the exit code."""
    values: dict[str, str] = {}
    try:
        for name, readers in READERS.items():
            targets = {folder / reader / name: mode for reader, mode in readers.items()}
            values[name] = value = _put(name, targets, _given(given / name))
            if name in HASHES:
                presented = parse_secret(value)
                if presented is None:
                    raise Unusable(f"{name}: expected what `prefixd keys new-secret` writes, pfx_…, got something else")
                _write(folder / "server" / HASHES[name], hash_line(presented), OURS)
        _write(folder / "redis" / "users.acl", _users(values), THEIRS)
        for reader, names in ONCE.items():
            for name in names:
                (folder / reader / name).unlink(missing_ok=True)
    except Unusable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _users(values: Mapping[str, str]) -> str:
    """Redis' ACL file."""
    return "".join(
        f"user {user} on #{hashlib.sha256(values[secret].encode()).hexdigest()} resetchannels {rules}\n"
        for user, (secret, rules) in USERS.items()
    )


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


def _put(name: str, targets: dict[Path, int], own: str) -> str:
    before = [target.read_text() if target.exists() else "" for target in targets]
    made = new_secret(new_id()) if name in HASHES else secrets.token_urlsafe(32)
    value = own or before[0] or made
    for (target, mode), there in zip(targets.items(), before, strict=True):
        if there != value:
            _write(target, value, mode)
    how = "kept" if value == before[0] else "taken from the compose secret" if own else "made"
    sys.stdout.write(f"{name}: {how}\n")
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
