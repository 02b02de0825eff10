"""What ``prefixd jobs watch`` shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

from rich.console import Console

from trainer.cli.jobs.display import LINE_EVERY_S, Lines, display, progress_text

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
STEP = {
    "stage": "training", "step": 3, "total": 10, "loss": 1.5, "validation_loss": 2.25, "tokens_per_s": 1234.5,
    "seconds_left": 75.2,
}  # fmt: skip


def told(*, terminal: bool, quiet: bool = False, width: int = 80) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    with display(quiet=quiet, console=console) as shown:
        shown.event("state", {"state": "queued", "attempt": 1})
        shown.event("state", {"state": "running", "attempt": 2, "stage": "training"})
        shown.event("progress", STEP)
        shown.interrupted("cannot reach [red]it[/red] " + "x" * 60)
        shown.resumed()
        shown.event("state", {"state": "running", "stage": "evaluating", "cancel_requested": True})
        shown.event("progress", {"stage": "evaluating", "evaluated": 4, "inputs": 8})
        shown.event("state", {"state": "cancelled"})
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_without_a_terminal_there_are_lines() -> None:
    assert told(terminal=False).splitlines() == [
        "queued",
        "running: training (attempt 2)",
        "step 3/10  0:01:15 left  loss 1.5000  validation loss 2.2500  1,234 tokens/s",
        "connection lost, trying again: cannot reach [red]it[/red] " + "x" * 60,
        "connected again",
        "running: evaluating, to be cancelled",
        "outputs 4/8",
        "cancelled",
    ]


def test_the_progress_of_a_search_names_the_trial() -> None:
    shown = progress_text({"step": 3, "total": 10, "loss": 1.5, "trial": "round 1 of 2, trial 1 of 3"})
    assert shown == "step 3/10  loss 1.5000  round 1 of 2, trial 1 of 3"


def test_a_quiet_one_tells_of_interruptions_alone() -> None:
    assert [line.partition(":")[0] for line in told(terminal=False, quiet=True).splitlines()] == [
        "connection lost, trying again", "connected again",
    ]  # fmt: skip


def test_on_a_terminal_one_line_moves_and_what_happened_stays_above() -> None:
    text = told(terminal=True)
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    for line in ("queued", "running: training (attempt 2)", "connected again", "cancelled"):
        assert line in lines, line
    assert "[red]it[/red]" in text
    assert "waiting for the trainer" in text


def test_a_narrow_terminal_cuts_the_line_and_does_not_break_it() -> None:
    lines = [line for line in re.split(r"[\r\n]+", told(terminal=True, width=40)) if "\u2501" in line]
    assert lines and all(len(line) <= 40 for line in lines)
    assert all(line[0] in SPINNER for line in lines)


def test_progress_gets_a_line_now_and_then_and_with_every_validation() -> None:
    now, out = 0.0, io.StringIO()
    lines = Lines(Console(file=out, width=200), clock=lambda: now)
    for step in range(1, 101):
        now += LINE_EVERY_S / 40
        validation = {"validation_loss": 2.0} if step >= 50 else {}
        lines.event("progress", {"step": step, "total": 100, "loss": 0.5, **validation})
    steps = [int(found) for found in re.findall(r"step (\d+)/100", out.getvalue())]
    assert steps == [1, 41, 50, 90, 100]


def test_numbers_that_are_none_are_left_out() -> None:
    out = io.StringIO()
    Lines(Console(file=out, width=200)).event("progress", {"step": 1, "total": 2, "loss": None, "tokens_per_s": "x"})
    assert out.getvalue() == "step 1/2\n"
