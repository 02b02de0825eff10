"""``prefixd jobs submit``: options become the body of ``POST /jobs``.

Owns the options that ``prefixd train`` does not have. The trainer checks all values: only it knows what it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixes.cli.target import application, command
from prefixes.spec import DEFAULT_ALIAS
from trainer.cli import training_options as options
from trainer.cli.jobs.datasets import send_dataset
from trainer.cli.jobs.target import TrainerOption, note, opened
from trainer.cli.jobs.watch import follow
from trainer.cli.options import decoding_parameters, initial_text, named_errors

HELP = """Submit training jobs to a running trainer (`prefixd trainer`), watch and manage them.

\b
Examples:
  prefixd jobs submit --task e2e --data e2e.jsonl --watch
  prefixd jobs list --state running
  prefixd jobs watch job-…
  prefixd jobs report job-… --output e2e.html
"""

app = application("Submit jobs.")


@command(app, "submit", errors=named_errors)
def submit(
    task: options.Task,
    data: Annotated[
        str, typer.Option(metavar="FILE", help='JSONL of {"input", "target"}; or sha256:… of one that was uploaded.')
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Go on as `prefixd jobs watch`.")] = False,
    backbone: Annotated[
        str | None, typer.Option(help="One of those that the trainer has. Default: its first.", show_default=False)
    ] = None,
    auto: options.AutoOption = False,
    budget_minutes: options.BudgetMinutes = None,
    preset: options.Preset = None,
    alias: Annotated[str, typer.Option(help="Alias to move to the new version.")] = DEFAULT_ALIAS,
    no_alias: Annotated[bool, typer.Option("--no-alias", help="Publish the version, move no alias.")] = False,
    validation: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSONL to validate and score on, or sha256:…")
    ] = None,
    hold_out: Annotated[
        int | None, typer.Option(help="Without --validation: percent of the inputs held out. Default: 5.")
    ] = None,
    template: options.Template = None,
    default: options.Defaults = None,
    truncate: options.Truncate = False,
    drop_long: options.DropLong = False,
    start_from: Annotated[
        str | None, typer.Option(metavar="REF", help="A published version to go on from, e2e@production.")
    ] = None,
    start_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text whose keys and values to start from, by the frozen model itself."),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET", help="How outputs are scored: plain, e2e, webnlg, dart or xsum. Default: plain."
        ),
    ] = None,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="Score nothing.")] = False,
    metric: Annotated[
        list[str] | None, typer.Option(help="Only this metric of the preset's, repeatable; one that is missing fails.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Held-out inputs that are scored, at most; 0 for all. Default: 500.", min=0)
    ] = None,
    promote_if: options.PromoteIf = None,
    margin: options.Margin = None,
    gate: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --promote-if: JSONL to decide by, or sha256:…")
    ] = None,
    gate_hold_out: options.GateHoldOut = None,
    method: options.Method = None,
    sites: options.Sites = None,
    positions: options.Positions = None,
    prefix_length: options.PrefixLength = None,
    middle: options.Middle = None,
    frozen_positions: options.FrozenPositions = None,
    init: options.Init = None,
    epochs: options.Epochs = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    accumulate: options.Accumulate = None,
    checkpoint_activations: options.CheckpointActivations = False,
    learning_rate: options.LearningRate = None,
    warmup_steps: options.WarmupSteps = None,
    weight_decay: options.WeightDecay = None,
    gradient_clip: Annotated[float | None, typer.Option(help="The gradient's norm at most. Default: 1.")] = None,
    reduction: options.Reduction = None,
    validate_every: options.ValidateEvery = None,
    patience: options.Patience = None,
    checkpoint_every: options.CheckpointEvery = None,
    seed: options.Seed = None,
    trainer: TrainerOption = None,
) -> None:
    """Upload the data, submit a job, print its id.

    A file is read before it is sent: a bad line ends the command here, and what the trainer has is not sent again.

    \b
    Examples:
      prefixd jobs submit --task e2e --data e2e.jsonl --watch
      prefixd jobs submit --task e2e --data e2e.jsonl --backbone gpt2-medium
                          --evaluate e2e --limit 0 --alias candidate
      prefixd jobs submit --task e2e --data e2e.jsonl --auto
                          --budget-minutes 20 --watch
      prefixd jobs submit --task e2e --data more.jsonl --start-from e2e
                          --method direct --lr 0.005
      prefixd jobs submit --task e2e --data e2e.jsonl --start-file style.txt
                          --lr 0.02
      prefixd jobs submit --task acme/tldr --preset xsum --data sha256:…
                          --backbone demo-bart --sites encoder,cross --truncate
      prefixd jobs submit --task e2e --data more.jsonl --gate gate.jsonl
                          --promote-if bleu --margin 0.5 --watch
      JOB=$(prefixd jobs submit --task e2e --data e2e.jsonl)
    """
    if no_evaluate and (evaluate is not None or metric or limit is not None):
        raise typer.BadParameter("--no-evaluate: expected no --evaluate, --metric or --limit beside it")
    hyperparameters = options.given(
        sites=options.site_names(sites), positions=positions, method=method, prefix_length=prefix_length,
        middle=middle, init=init, epochs=epochs, steps=steps, frozen_positions=frozen_positions, batch_size=batch_size,
        learning_rate=learning_rate, accumulate=accumulate, checkpoint_activations=checkpoint_activations or None,
        warmup_steps=warmup_steps, weight_decay=weight_decay, gradient_clip=gradient_clip, reduction=reduction,
        validate_every=validate_every, patience=patience, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    body = options.given(
        task=task, backbone=backbone, preset=preset, hold_out=hold_out, template=template, start_from=start_from,
        truncate=truncate, drop_long=drop_long, auto=auto, budget_minutes=budget_minutes,
        hyperparameters=hyperparameters, defaults=decoding_parameters("--default", default or []),
        gate_hold_out=gate_hold_out, promote_if=_rule(promote_if, margin),
    )  # fmt: skip
    if start_file is not None:
        body["start_text"] = initial_text(start_file)
    body["alias"] = None if no_alias else alias or None
    body["evaluation"] = None if no_evaluate else _evaluation(evaluate, metric, limit)
    with opened(trainer) as client:
        body["dataset"] = send_dataset(client, data)
        if validation is not None:
            body["validation_dataset"] = send_dataset(client, validation)
        if gate is not None:
            body["gate_dataset"] = send_dataset(client, gate)
        job = client.submit(body)
        typer.echo(job["id"])
        if watch:
            follow(client, job["id"])
        else:
            note(f"{job['state']}. To watch it: prefixd jobs watch {job['id']}")


def _evaluation(preset: str | None, metrics: list[str] | None, limit: int | None) -> Mapping[str, Any]:
    body = options.given(preset=preset, metrics=metrics or None)
    if limit is not None:
        body["limit"] = limit or None
    return body


def _rule(metric: str | None, margin: float | None) -> Mapping[str, Any] | None:
    if metric is None and margin is not None:
        raise typer.BadParameter("--margin: expected --promote-if beside it")
    return None if metric is None else options.given(metric=metric, margin=margin)
