"""Decides whether a run may use a result folder: a free one, or with ``resume`` one that holds this run.

Owns the comparison of the stored and the new options; knows no training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixes.errors import PrefixdError
from trainer.training.checkpoint import CheckpointError


class RunExists(PrefixdError):
    """The result folder already holds a run."""

    code = "conflict"


def check_folder(folder: Path, request: Mapping[str, Any], resume: bool) -> None:
    """Raise RunExists if ``folder`` holds a run and ``resume`` is false, CheckpointError if its options differ."""
    path, wanted = folder / "config.json", json.loads(json.dumps(request))
    if not path.exists():
        return
    if not resume:
        raise RunExists(f"{folder} holds a run already: --resume goes on with it, --output takes another")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if different:
        pairs = ", ".join(f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}" for key in different)
        raise CheckpointError(f"{folder}: cannot resume with other options: {pairs}", different=different)


def begun_with(folder: Path) -> dict[str, Any]:
    """Return dtype and autocast of the run in ``folder``: another machine might choose others.

    Empty for a folder without a run. Raises CheckpointError.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {name: found[name] for name in ("dtype", "autocast")}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a run's options, got {type(error).__name__}: {error}") from error


def check_identity(folder: Path, wanted: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the finished run in ``folder`` has the ``wanted`` backbone, template and data."""
    path = folder / "report.json"
    try:
        found = json.loads(path.read_text())["identity"]
        different = sorted(name for name in wanted if wanted[name] != found[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the identity of backbone and data, got none (a run of an older version, or a damaged "
            "report): it cannot be told whether it is this run; --output takes another folder"
        ) from error
    if different:
        pairs = ", ".join(f"{name}: expected {found[name]!r}, got {wanted[name]!r}" for name in different)
        raise CheckpointError(f"{folder}: cannot resume, the finished run was of others; {pairs}", different=different)
