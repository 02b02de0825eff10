"""``prefixd jobs submit``: options become the body of ``POST /jobs``.

Owns the options and their names; what they may be is checked by the trainer, which is the one that knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixes.cli.target import application
from prefixes.spec import DEFAULT_ALIAS
from trainer.cli.jobs.datasets import send_dataset
from trainer.cli.jobs.target import TrainerOption, command, note, opened
from trainer.cli.jobs.watch import follow
from trainer.cli.options import decoding_parameters, initial_text
from trainer.training.config import PRESETS

HELP = """Submit training jobs to a running trainer (`prefixd trainer`), watch and manage them.

\b
Examples:
  prefixd jobs submit --task e2e --data e2e.jsonl --watch
  prefixd jobs list --state running
  prefixd jobs watch job-…
  prefixd jobs report job-… --output e2e.html
"""

app = application("Submit jobs.")


@command(app, "submit")
def submit(
    task: Annotated[str, typer.Option(help="Task to publish as: name or tenant/name.")],
    data: Annotated[
        str, typer.Option(metavar="FILE", help='JSONL of {"input", "target"}; or sha256:… of one that was uploaded.')
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Go on as `prefixd jobs watch`.")] = False,
    backbone: Annotated[
        str | None, typer.Option(help="One of those that the trainer has. Default: its first.", show_default=False)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"The paper's settings: {', '.join(PRESETS)}. Default: the task's name, else e2e."),
    ] = None,
    alias: Annotated[str, typer.Option(help="Alias to move to the new version.")] = DEFAULT_ALIAS,
    no_alias: Annotated[bool, typer.Option("--no-alias", help="Publish the version, move no alias.")] = False,
    validation: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSONL to validate and score on, or sha256:…")
    ] = None,
    hold_out: Annotated[
        int | None, typer.Option(help="Without --validation: percent of the inputs held out. Default: 5.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="The prompt around {input}. Default: the backbone's usual one.")
    ] = None,
    default: Annotated[
        list[str] | None, typer.Option(help="A default decoding parameter, name=value; repeatable.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut the end of inputs that pass the window; targets never.")
    ] = False,
    drop_long: Annotated[bool, typer.Option("--drop-long", help="Leave out lines that pass the window.")] = False,
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
    method: Annotated[
        str | None, typer.Option(help="mlp (the paper's reparameterisation) or direct (keys and values). Default: mlp.")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Where the prefix attaches: some of encoder,decoder,cross. Default: all there are."),
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="shifted or unshifted behind the prefix. Default: GPT-2 shifted, BART unshifted.")
    ] = None,
    prefix_length: Annotated[int | None, typer.Option(help="Virtual positions at each site, the paper's P.")] = None,
    middle: Annotated[int | None, typer.Option(help="Hidden size of the MLP. Default: 512; xsum 800.")] = None,
    frozen_positions: Annotated[int | None, typer.Option(help="direct: leading positions kept as initialised.")] = None,
    init: Annotated[str | None, typer.Option(help='"random", or words to start from: "table-to-text:"')] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(help="Parts that a batch is computed in, one after the other: less memory. Default: 1."),
    ] = None,
    checkpoint_activations: Annotated[
        bool,
        typer.Option("--checkpoint-activations", help="Compute layers twice instead of keeping them: less memory."),
    ] = False,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak rate; falls linearly to 0.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of warm-up. Default: 0.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay. Default: 0.")] = None,
    gradient_clip: Annotated[float | None, typer.Option(help="The gradient's norm at most. Default: 1.")] = None,
    reduction: Annotated[
        str | None,
        typer.Option(help="Loss: sequence (sum over tokens, mean over batch) or token. Default: sequence; xsum token."),
    ] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations. Default: an epoch.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 500.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation and data order. Default: 1.")] = None,
    trainer: TrainerOption = None,
) -> None:
    """Upload the data, submit a job, print its id.

    A file is read before it is sent: a bad line ends the command here, and what the trainer has is not sent again.

    \b
    Examples:
      prefixd jobs submit --task e2e --data e2e.jsonl --watch
      prefixd jobs submit --task e2e --data e2e.jsonl --backbone gpt2-medium
                          --evaluate e2e --limit 0 --alias candidate
      prefixd jobs submit --task e2e --data more.jsonl --start-from e2e
                          --method direct --lr 0.005
      prefixd jobs submit --task e2e --data e2e.jsonl --start-file style.txt
                          --lr 0.02
      prefixd jobs submit --task acme/tldr --preset xsum --data sha256:…
                          --backbone demo-bart --sites encoder,cross --truncate
      JOB=$(prefixd jobs submit --task e2e --data e2e.jsonl)
    """
    if no_evaluate and (evaluate is not None or metric or limit is not None):
        raise typer.BadParameter("--no-evaluate: expected no --evaluate, --metric or --limit beside it")
    hyperparameters = _given(
        sites=None if sites is None else [site.strip() for site in sites.split(",")],
        positions=positions, method=method, prefix_length=prefix_length, middle=middle, init=init, epochs=epochs,
        frozen_positions=frozen_positions, batch_size=batch_size, learning_rate=learning_rate, accumulate=accumulate,
        checkpoint_activations=checkpoint_activations or None, warmup_steps=warmup_steps, weight_decay=weight_decay,
        gradient_clip=gradient_clip, reduction=reduction, validate_every=validate_every,
        checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    body = _given(
        task=task, backbone=backbone, preset=preset, hold_out=hold_out, template=template, start_from=start_from,
        truncate=truncate, drop_long=drop_long, hyperparameters=hyperparameters,
        defaults=decoding_parameters("--default", default or []),
    )  # fmt: skip
    if start_file is not None:
        body["start_text"] = initial_text(start_file)
    body["alias"] = None if no_alias else alias or None
    body["evaluation"] = None if no_evaluate else _evaluation(evaluate, metric, limit)
    with opened(trainer) as client:
        body["dataset"] = send_dataset(client, data)
        if validation is not None:
            body["validation_dataset"] = send_dataset(client, validation)
        job = client.submit(body)
        typer.echo(job["id"])
        if watch:
            follow(client, job["id"])
        else:
            note(f"{job['state']}. To watch it: prefixd jobs watch {job['id']}")


def _evaluation(preset: str | None, metrics: list[str] | None, limit: int | None) -> Mapping[str, Any]:
    body = _given(preset=preset, metrics=metrics or None)
    if limit is not None:
        body["limit"] = limit or None
    return body


def _given(**values: Any) -> dict[str, Any]:
    """What was given; the rest is the trainer's to choose."""
    return {name: value for name, value in values.items() if value is not None}
