"""What a search has done so far, in one file of its folder, so that a killed one goes on.

Owns the file and what the report says of it. Knows no training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefixes.files import write_json
from trainer.training.checkpoint import CheckpointError
from trainer.training.search import Choice, Cost, Round


@dataclass
class Trial:
    """One trial that has ended. ``ended``: ``done``, ``early`` (by patience), ``budget`` or ``diverged``.

    ``loss`` is the lowest held-out loss per token that was measured; None if none was.
    """

    round: int
    choice: Choice
    steps: int  # planned
    made: int
    loss: float | None
    ended: str
    tokens: int
    learnt: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass
class Ledger:
    """``seconds`` were spent so far; ``cost`` and ``rounds`` are the schedule, once it is made."""

    path: Path
    identity: Mapping[str, str]
    seconds: float = 0.0
    cost: Cost | None = None
    rounds: list[Round] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    curve: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, str]) -> Ledger:
        """Read the file, or begin one. Raises CheckpointError for a damaged one and for another backbone or data."""
        if not path.exists():
            return cls(path, identity)
        try:
            found = json.loads(path.read_text())
            if found["identity"] != dict(identity):
                raise CheckpointError(f"{path}: cannot resume: expected {dict(identity)}, got {found['identity']}")
            return cls(
                path,
                identity,
                found["seconds"],
                None if found["cost"] is None else Cost(**found["cost"]),
                [Round(**entry) for entry in found["rounds"]],
                [Trial(**{**entry, "choice": Choice(**entry["choice"])}) for entry in found["trials"]],
                found["curve"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: expected a search, got {type(error).__name__}: {error}") from error

    def write(self, seconds: float) -> None:
        """Write what is known, whole or not at all."""
        self.seconds = seconds
        write_json(self.path, {"identity": dict(self.identity), **self.as_dict()})

    @property
    def best(self) -> Trial | None:
        """The trial with the lowest loss; None if none has one."""
        told = [trial for trial in self.trials if trial.loss is not None]
        return min(told, key=lambda trial: trial.loss or 0.0) if told else None

    def of_round(self, number: int) -> list[Trial]:
        """The trials of a round, in order."""
        return [trial for trial in self.trials if trial.round == number]

    def as_dict(self) -> dict[str, Any]:
        """JSON values without the identity."""
        return {
            "seconds": round(self.seconds, 1),
            "cost": None if self.cost is None else asdict(self.cost),
            "rounds": [asdict(entry) for entry in self.rounds],
            "trials": [trial.as_dict() for trial in self.trials],
            "curve": self.curve,
        }
