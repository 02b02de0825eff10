"""The version that a job's gate compares with: what the alias points at, fetched into the job's folder. Torch-free.

Owns its two files, and when a job looks again after the alias has moved meanwhile. Scores nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from prefixes.errors import TaskNotFound
from prefixes.files import write_bytes, write_json
from prefixes.registry.base import Registry
from prefixes.spec import TaskRef
from trainer.evaluation.gate_rule import MOST_MOVES

CURRENT: Final = "current.safetensors"
CURRENT_FACTS: Final = "current.json"


def fetch_current(folder: Path, registry: Registry, task: TaskRef, alias: str) -> Mapping[str, Any]:
    """Fetch the version behind ``alias``, unless the folder has one; return ``{"version", "moves"}``.

    ``version`` is None where there is no such alias. Raises RegistryUnavailable.
    """
    facts = _read(folder)
    if "version" not in facts:
        try:
            version = registry.resolve(TaskRef(task.tenant, task.name, alias=alias)).version
        except TaskNotFound:
            version = None
        if version is not None:
            write_bytes(folder / CURRENT, registry.fetch(task.tenant, version))
        facts = {"version": version, **facts}
        write_json(folder / CURRENT_FACTS, facts)
    return facts


def note_moved(folder: Path) -> None:
    """Count a move of the alias. The next ``fetch_current`` looks where it points then, but not for ever."""
    facts = _read(folder)
    facts["moves"] += 1
    if facts["moves"] < MOST_MOVES:
        facts.pop("version", None)
    write_json(folder / CURRENT_FACTS, facts)


def _read(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / CURRENT_FACTS).read_text())
    except FileNotFoundError:
        return {"moves": 0}
    return facts
