"""The time that a run may take, over all processes that work on it. Knows no training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from prefixes.errors import InvalidParameter
from trainer.training.config import TrainConfig

DEFAULT_MINUTES: Final = 10.0
MAX_MINUTES: Final = 7 * 24 * 60.0
STEPS_PER_MINUTE: Final = 600
"""Most training steps for each minute of a budget: what is reserved of a tenant's steps before anything is measured."""
MARGIN: Final = 0.02  # of the budget: the result is written in it


@dataclass(frozen=True)
class Auto:
    """Search within ``budget_minutes`` for what the user did not fix; ``fixed`` names TrainConfig's fields."""

    budget_minutes: float
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.budget_minutes <= MAX_MINUTES:
            raise InvalidParameter(
                f"budget_minutes: expected above 0 and at most {MAX_MINUTES:.0f}, got {self.budget_minutes}",
                parameter="budget_minutes",
            )
        for name in ("epochs", "steps"):
            if name in self.fixed:
                raise InvalidParameter(f"{name}: expected none beside auto, whose budget is time", parameter=name)
        object.__setattr__(self, "fixed", tuple(sorted(self.fixed)))

    @property
    def most_steps(self) -> int:
        """Of all trials together."""
        return max(1, int(self.budget_minutes * STEPS_PER_MINUTE))

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"budget_minutes": self.budget_minutes, "fixed": list(self.fixed)}


def auto_of(wanted: bool, budget_minutes: float | None, given: Collection[str]) -> Auto | None:
    """The search that is asked for, None for none. ``given`` options are not searched. Raises InvalidParameter."""
    if wanted:
        return Auto(DEFAULT_MINUTES if budget_minutes is None else budget_minutes, tuple(given))
    if budget_minutes is not None:
        raise InvalidParameter("budget_minutes: expected auto beside it, got none", parameter="budget_minutes")
    return None


def check_held_out(percent: int, config: TrainConfig, auto: Auto | None) -> None:
    """Raise InvalidParameter if something needs held-out inputs, and ``percent`` of them are none."""
    for name, needed in (("auto", auto is not None), ("patience", config.patience > 0)):
        if needed and not percent:
            raise InvalidParameter(f"{name}: expected held-out inputs to judge by, got a hold_out of 0", parameter=name)


class Budget:
    """Counts the seconds since its process began, on top of those ``spent`` by earlier ones.

    Asked before each step, it says no when a step as slow as the slowest so far would pass the end.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """Begins now."""
        self.seconds, self.before = seconds, 0.0
        self._clock, self._began = clock, clock()
        self._asked: float | None = None
        self._slowest = 0.0

    @property
    def spent(self) -> float:
        """Seconds of this process and of those ``before``."""
        return self.before + self._clock() - self._began

    def begin_trial(self) -> None:
        """What lies between two trials is no step."""
        self._asked = None

    def is_exhausted(self) -> bool:
        """Whether the next step may be one too many."""
        spent = self.spent
        if self._asked is not None:
            self._slowest = max(self._slowest, spent - self._asked)
        self._asked = spent
        return spent + self._slowest > (1 - MARGIN) * self.seconds
