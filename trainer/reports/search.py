"""What a search tried, in words and cells for the terminal and the report. Knows neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

TRIAL_COLUMNS: Final = ("round", "length", "start", "method", "rate", "steps", "held-out loss")


def trial_rows(search: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each trial, in the order of the search; the one with the lowest loss is marked."""
    losses = [trial["loss"] for trial in search["trials"] if trial["loss"] is not None]
    rows = []
    for trial in search["trials"]:
        choice, loss = trial["choice"], trial["loss"]
        shown = "none" if loss is None else f"{loss:.4f}"
        if losses and loss == min(losses):
            shown += " (best)"
        if trial["ended"] != "done":
            shown += f" ({trial['ended']})"
        cells = (trial["round"], choice["prefix_length"], choice["init"], choice["method"])
        rows.append((*map(str, cells), f"{choice['learning_rate']:g}", f"{trial['made']} of {trial['steps']}", shown))
    return rows


def learning_curve(curve: Mapping[str, Any] | None) -> str:
    """The estimate for twice the examples in a sentence, or why there is none."""
    if curve is None:
        return "With twice the examples: not measured, the budget ended before"
    if curve["estimate"] is None:
        return f"With twice the examples: not estimated, {curve['reason']}"
    measured = ", ".join(f"{loss:.4f} with {count}" for count, loss in curve["points"])
    return (
        f"With twice the examples, {curve['examples']}: about {curve['points'][-1][1] - curve['estimate']:.4f} lower "
        f"(between {curve['points'][-1][1] - curve['high']:.4f} and {curve['points'][-1][1] - curve['low']:.4f}). "
        f"From short trials of equal steps: {measured}. The bounds are two models' and not a confidence interval"
    )
