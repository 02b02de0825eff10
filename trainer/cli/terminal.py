"""The terminal output of a training run: a progress bar and a closing table. Does not know how it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trainer.reports.search import TRIAL_COLUMNS, learning_curve, trial_rows
from trainer.training.loop import Progress as Step
from trainer.training.request import RunRequest


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Step], None]]:
    """Show a bar on ``console``; yields the function that takes every step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=console) as progress:
        bar, smooth = progress.add_task("loading", total=None, rate=""), [0.0]

        def report(step: Step) -> None:
            smooth[0] = 0.95 * smooth[0] + 0.05 * step.loss if smooth[0] else step.loss
            speed = progress.tasks[0].speed
            progress.update(
                bar,
                total=step.total,
                completed=step.step,
                description=f"{step.trial or f'epoch {step.epoch + 1}'} loss {smooth[0]:.3f}",
                rate=f"{speed:.1f} steps/s" if speed else "",
            )
            if step.validation_loss is not None:
                where = f"{step.trial}, step {step.step}" if step.trial else f"step {step.step}"
                progress.console.print(f"{where}: validation loss per token {step.validation_loss:.4f}")

        yield report


def print_summary(console: Console, request: RunRequest, version: str, record: Mapping[str, Any]) -> None:
    """Print the table of a finished run."""
    table = Table(show_header=False)
    table.add_row("version", version)
    table.add_row("validation loss per token", str(record["scores"]["validation_loss_per_token"]))
    table.add_row("seconds", str(record["seconds"]))
    table.add_row("results", str(request.output))
    console.print(table)
    if search := record.get("search"):
        console.print(_search_table(search))
        console.print(learning_curve(search["curve"]))
    for warning in record.get("warnings", ()):
        console.print(f"warning: {warning}", style="yellow")


def _search_table(search: Mapping[str, Any]) -> Table:
    table = Table(title=f"tried in {search['seconds']:.0f} s of {60 * search['budget_minutes']:.0f} s")
    for name in TRIAL_COLUMNS:
        table.add_column(name)
    for row in trial_rows(search):
        table.add_row(*row)
    return table
