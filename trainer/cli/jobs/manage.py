"""``prefixd jobs list | show | cancel | retry | delete | report``.

Owns these commands' options and output; the trainer does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixes.cli import show
from prefixes.cli.target import JsonOption, application, command
from prefixes.errors import InvalidParameter
from prefixes.files import write_bytes
from trainer.cli.jobs.target import JobArgument, TenantOption, TrainerOption, note, opened
from trainer.cli.jobs.watch import follow
from trainer.cli.options import named_errors
from trainer.client.watch import JobWatch
from trainer.jobs.record import STATES

app = application("Look at jobs and move them.")


@command(app, "list", errors=named_errors)
def list_jobs(
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help=f"Only those that are {', '.join(STATES)}.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="So many, the newest.", min=1, max=100_000)] = 20,
    tenant: TenantOption = None,
    trainer: TrainerOption = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the newest first. An operator sees those of all tenants."""
    if state is not None and state not in STATES:
        raise InvalidParameter(f"--state: expected one of {', '.join(STATES)}, got {state!r}", got=state)
    with opened(trainer) as client:
        jobs = client.jobs(state=state, tenant=tenant, limit=limit)
    if as_json:
        show.show_json({"jobs": jobs})
    else:
        show.show_table(["job", "task", "state", "created", "outcome"], [_row(job) for job in jobs])


@command(app, "show", errors=named_errors)
def show_job(job: JobArgument, trainer: TrainerOption = None, as_json: JsonOption = False) -> None:
    """Show a job: its state, how far it is, what it was asked to do, what came of it."""
    with opened(trainer) as client:
        found = client.job(job)
    if as_json:
        show.show_json(found)
        return
    show.show_table(["job", found["id"]], [[name, value] for name, value in _facts(found).items() if value])


@command(app, "cancel", errors=named_errors)
def cancel(
    job: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return once it has ended.")] = False,
    trainer: TrainerOption = None,
) -> None:
    """Cancel a job: a queued one at once, a running one before its next training step.

    With --wait it exits with 1 where the job ended otherwise before the cancel came to it. `retry` goes on from its
    last checkpoint.
    """
    with opened(trainer) as client:
        found = client.cancel(job)
        if wait:
            watch = JobWatch(client, job)
            for _ in watch.events():
                pass
            found = watch.job
    if found["state"] in ("queued", "running"):
        late = found.get("version") is not None
        note(f"{job}: too late, its result is being published" if late else f"{job}: will be cancelled")
        return
    note(f"{job}: {found['state']}")
    if found["state"] != "cancelled":
        raise typer.Exit(1)


@command(app, "retry", errors=named_errors)
def retry(
    job: JobArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Go on as `prefixd jobs watch`.")] = False,
    trainer: TrainerOption = None,
) -> None:
    """Run a failed or cancelled job again, from its last checkpoint on."""
    with opened(trainer) as client:
        found = client.retry(job)
        note(f"{job}: {found['state']}, attempt {found.get('attempt')}")
        if watch:
            follow(client, job)


@command(app, "delete", errors=named_errors)
def delete(
    job: JobArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    trainer: TrainerOption = None,
) -> None:
    """Delete a job that has ended, its checkpoint and its report, after asking. What it published stays."""
    with opened(trainer) as client:
        found = client.job(job)
        if not yes:
            task = _spec(found).get("task", "a task")
            typer.confirm(f"Delete {job} for {task}, with its checkpoint and report?", abort=True, err=True)
        client.delete(job)
    note(f"deleted {job}")


@command(app, "report", errors=named_errors)
def report(
    job: JobArgument,
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write. Default: report-JOB.html here; JSON goes to stdout.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON instead of a page.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    trainer: TrainerOption = None,
) -> None:
    """Fetch the report of a job that was trained to its end, a page that needs nothing else, and print its path.

    \b
    Examples:
      prefixd jobs report job-… --output e2e.html
      prefixd jobs report job-… --json | jq .evaluation.scores
    """
    path = output if output is not None or as_json else Path(f"report-{job}.html")
    with opened(trainer) as client:
        client.job(job)  # raises for a bad id before it becomes a file name
        if path is not None and path.exists() and not force:
            raise InvalidParameter(f"{path}: expected no such file yet; --force overwrites it")
        content = client.report(job, "json" if as_json else "html")
    if path is None:
        typer.echo(content.decode(), nl=False)
        return
    try:
        write_bytes(path, content)
    except OSError as error:
        raise InvalidParameter(f"{path}: cannot be written: {error.strerror or error}") from error
    typer.echo(str(path))


def _row(job: Mapping[str, Any]) -> list[str]:
    return [job["id"], str(_spec(job).get("task")), _state(job), str(job.get("created_at")), _outcome(job) or "-"]


def _state(job: Mapping[str, Any]) -> str:
    """Describe the state in a few words, with the progress of a running job."""
    progress = job.get("progress") or {}
    if job["state"] != "running":
        return str(job["state"])
    if job.get("cancel_requested") and job.get("version") is None:
        return "running, to be cancelled"
    if job.get("stage") == "training" and progress.get("total"):
        return f"training {progress.get('step')}/{progress['total']}"
    return str(job.get("stage") or "running")


def _outcome(job: Mapping[str, Any]) -> str:
    if job["state"] == "failed":
        return str((job.get("failure") or {}).get("code"))
    if job["state"] == "succeeded":
        return show.short((job.get("result") or {}).get("version"))
    return ""


def _facts(job: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows of `show`, with empty values for missing facts."""
    spec, failure, result = _spec(job), job.get("failure") or {}, job.get("result") or {}
    config = spec.get("config") or {}
    attempt = job.get("attempt")
    return {
        "state": _state(job) + (f", attempt {attempt}" if attempt and attempt > 1 else ""),
        "failure": f"{failure['code']}: {failure['message']}" if failure else "",
        "task": str(spec.get("task") or ""),
        "version": str(result.get("version") or job.get("version") or ""),
        "alias": str(result.get("alias") or spec.get("alias") or "none"),
        "scores": _pairs(result.get("scores") or {}),
        "progress": _pairs(job.get("progress") or {}),
        "backbone": str(spec.get("backbone") or ""),
        "dataset": str(spec.get("dataset") or ""),
        "validation": str(spec.get("validation_dataset") or f"{spec.get('hold_out')} % held out"),
        "preset": str(spec.get("preset") or ""),
        "hyperparameters": _pairs(config),
        "starts from": str(spec.get("start_from") or ""),
        "template": repr(spec["template"]) if spec.get("template") else "",
        "decoding": _pairs(spec.get("defaults") or {}),
        "evaluation": _pairs(spec.get("evaluation") or {}),
        "created": str(job.get("created_at") or ""),
        "started": str(job.get("started_at") or ""),
        "finished": str(job.get("finished_at") or ""),
    }


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items() if value is not None)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ",".join(map(str, value)) or "all" if isinstance(value, list) else str(value)


def _spec(job: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = job.get("spec")
    return spec if isinstance(spec, Mapping) else {}
