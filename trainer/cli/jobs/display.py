"""Shows a watched job on stderr: a live line on a terminal, plain lines elsewhere.

Owns how events look; does not know where they come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

LINE_EVERY_S: Final = 10.0
"""Least time between two lines of progress without a terminal; a new validation loss always gets a line."""

WIDE: Final = 120
"""Columns from which a terminal gets the wide bar."""


class Display(Protocol):
    """Shows the events of a job."""

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Show the data of a ``state`` or ``progress`` event."""

    def interrupted(self, why: str) -> None:
        """The connection broke."""

    def resumed(self) -> None:
        """The connection is back."""


@contextmanager
def display(*, quiet: bool, console: Console | None = None) -> Iterator[Display]:
    """Give a display on ``console``, by default stderr. A ``quiet`` one shows only interruptions."""
    console = console or Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal:
        yield Lines(console, quiet=quiet)
        return
    bar = BarColumn(bar_width=24 if console.width >= WIDE else 8)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), bar, MofNCompleteColumn(), Numbers())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Live(progress)


class Numbers(ProgressColumn):
    """The field ``numbers``, cut where the terminal is narrow."""

    def render(self, task: Task) -> Text:
        """See ProgressColumn."""
        return Text(task.fields["numbers"], no_wrap=True, overflow="ellipsis")


class Lines:
    """Prints a line for every change of state or stage, and progress at most every ``LINE_EVERY_S``."""

    def __init__(self, console: Console, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._quiet, self._clock = console, quiet, clock
        self._told_at: float | None = None
        self._told = ""
        self._validation: float | None = None

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """See Display."""
        if self._quiet:
            return
        if name == "state":
            self._told_at = None
            self._say(state_text(data))
        elif name == "progress" and self._due(data):
            self._told_at = self._clock()
            self._say(progress_text(data))

    def interrupted(self, why: str) -> None:
        """See Display."""
        self._say(f"connection lost, trying again: {why}")

    def resumed(self) -> None:
        """See Display."""
        self._say("connected again")

    def _due(self, data: Mapping[str, Any]) -> bool:
        validation = data.get("validation_loss")
        if validation is not None and validation != self._validation:
            self._validation = validation
            return True
        done, total = counts(data)
        return self._told_at is None or self._clock() - self._told_at >= LINE_EVERY_S or (done == total and bool(total))

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Live:
    """Shows a live line, and above it a line for every change of state or stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lines = Lines(progress.console)
        self._begin("waiting")

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """See Display."""
        if name == "state":
            self._lines.event(name, data)
            self._progress.remove_task(self._bar)
            self._begin(str(data.get("stage") or data.get("state")))
        elif name == "progress":
            done, total = counts(data)
            self._progress.update(
                self._bar, description=self._stage, total=total, completed=done or 0, numbers=numbers_text(data)
            )

    def interrupted(self, why: str) -> None:
        """See Display."""
        self._lines.interrupted(why)
        self._progress.update(self._bar, description="waiting for the trainer", refresh=True)

    def resumed(self) -> None:
        """See Display."""
        self._lines.resumed()
        self._progress.update(self._bar, description=self._stage)

    def _begin(self, stage: str) -> None:
        """Begin a new bar for a stage: each stage has its own total."""
        self._stage = stage
        self._bar = self._progress.add_task(stage, total=None, numbers="")


def state_text(data: Mapping[str, Any]) -> str:
    """Describe a ``state`` event in one line."""
    text = str(data.get("state"))
    if data.get("stage"):
        text += f": {data['stage']}"
    if (data.get("attempt") or 1) > 1:
        text += f" (attempt {data['attempt']})"
    return text + (", to be cancelled" if data.get("cancel_requested") else "")


def progress_text(data: Mapping[str, Any]) -> str:
    """Describe a ``progress`` event in one line."""
    done, total = counts(data)
    what = "step" if "step" in data else "outputs" if "evaluated" in data else str(data.get("stage"))
    return "  ".join(filter(None, (f"{what} {done}/{total}" if total else what, numbers_text(data))))


def numbers_text(data: Mapping[str, Any]) -> str:
    """Join time left, loss, validation loss, speed and the trial of a search, as far as they are known."""
    left = data.get("seconds_left")
    parts = (
        f"{timedelta(seconds=round(left))} left" if isinstance(left, (int, float)) else "",
        _number(data, "loss", "loss {:.4f}"),
        _number(data, "validation_loss", "validation loss {:.4f}"),
        _number(data, "tokens_per_s", "{:,.0f} tokens/s"),
        str(data.get("trial") or ""),
    )
    return "  ".join(filter(None, parts))


def counts(data: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return done and total: of training steps, or of inputs whose outputs are scored."""
    names = ("step", "total") if "step" in data else ("evaluated", "inputs")
    done, total = (value if isinstance(value := data.get(name), int) else None for name in names)
    return done, total


def _number(data: Mapping[str, Any], name: str, form: str) -> str:
    value = data.get(name)
    return form.format(value) if isinstance(value, (int, float)) else ""
