"""``prefixd jobs watch``, which ``submit --watch`` and ``retry --watch`` use too.

Owns the exit code, Ctrl-C and JSON lines. ``display`` owns how it looks, ``client.watch`` how it retries.
"""

from __future__ import annotations

import json
from contextlib import closing
from typing import Annotated, Any

import typer

from prefixes.cli import show
from prefixes.cli.target import application, command
from trainer.cli.jobs.display import Display, display
from trainer.cli.jobs.target import CANCELLED, INTERRUPTED, JobArgument, TrainerOption, note, opened
from trainer.cli.options import named_errors
from trainer.client.client import TrainerClient
from trainer.client.watch import PATIENCE_S, JobWatch

app = application("Watch jobs.")


@command(app, "watch", errors=named_errors)
def watch(
    job: JobArgument,
    as_json: Annotated[
        bool, typer.Option("--json", help='Print the events on stdout, one {"id", "event", "data"} a line.')
    ] = False,
    patience: Annotated[
        float, typer.Option(help="Seconds to wait for a trainer that does not answer any more.", min=0)
    ] = PATIENCE_S,
    trainer: TrainerOption = None,
) -> None:
    """Watch a job to its end: stage, step, loss, validation loss, tokens per second, time left.

    A connection that breaks is made again, also where the trainer restarts meanwhile. Ctrl-C leaves the job running.

    \b
    Exits with
      0    it succeeded
      1    it failed, and says why; or an error
      3    it was cancelled
      130  Ctrl-C
    """
    with opened(trainer) as client:
        follow(client, job, as_json=as_json, patience_s=patience)


def follow(client: TrainerClient, job: str, *, as_json: bool = False, patience_s: float = PATIENCE_S) -> None:
    """Show ``job`` until it ends. Return if it succeeded; otherwise raise typer.Exit with the command's code."""
    try:
        with display(quiet=as_json) as shown:
            ended = _shown(client, job, shown, as_json, patience_s)
    except KeyboardInterrupt:
        note(f"\n{job} goes on. To end it: prefixd jobs cancel {job}")
        raise typer.Exit(INTERRUPTED) from None
    state = ended["state"]
    if state == "failed":
        failure = ended.get("failure") or {}
        typer.secho(f"error ({failure.get('code')}): {failure.get('message')}", fg="red", err=True)
        raise typer.Exit(1)
    if state == "cancelled":
        raise typer.Exit(CANCELLED)
    if not as_json:
        note(_result(ended.get("result") or {}))


def _shown(client: TrainerClient, job: str, shown: Display, as_json: bool, patience_s: float) -> dict[str, Any]:
    """Show the job's events and return its final record."""
    watch = JobWatch(client, job, patience_s=patience_s, interrupted=shown.interrupted, resumed=shown.resumed)
    with closing(watch.events()) as events:
        for event in events:
            if as_json:
                typer.echo(json.dumps(event.as_dict(), ensure_ascii=False))
            else:
                shown.event(event.name, event.data)
    return watch.job


def _result(result: dict[str, Any]) -> str:
    alias = result.get("alias")
    moved = f"\n{result.get('task')}@{alias} is this version now" if alias else ""
    scores = "".join(f"\n  {name} {show_number(value)}" for name, value in (result.get("scores") or {}).items())
    gate = result.get("gate") or {}
    judged = f"\ngate: {gate.get('verdict')}: {gate.get('reason')}" if gate else ""
    return f"{result.get('task')}@{show.short(result.get('version'))}{moved}{judged}{scores}"


def show_number(value: Any) -> str:
    """Format a score for people."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
