"""``prefixd train`` and ``prefixd convert``: the trainer's command line.

Owns options, help, progress bar and messages; everything else happens in ``run`` and ``convert``. ``prefixd.py`` mounts
the two commands.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from prefixes.errors import InvalidParameter, PrefixdError
from prefixes.parameters import check_decoding_parameters
from prefixes.spec import DEFAULT_ALIAS, TaskRef
from trainer import convert as conversion
from trainer.config import PAPER_DECODING, PRESETS, TrainConfig, default_template
from trainer.loop import Progress as Step
from trainer.publish import Targets
from trainer.run import RunRequest, run_training


@contextmanager
def _named_errors() -> Iterator[None]:
    """Named errors become one line and exit code 1; anything else is a defect and keeps its traceback."""
    try:
        yield
    except PrefixdError as error:
        typer.secho(f"error ({error.code}): {error.message}", fg="red", err=True)
        raise typer.Exit(1) from error


def train(
    task: Annotated[str, typer.Option(help="Task to publish as: name or tenant/name.")],
    data: Annotated[Path, typer.Option(help='JSONL of {"input": …, "target": …} lines (see `prefixd convert`).')],
    backbone: Annotated[str, typer.Option(help='"demo", a GPT-2 folder, or a hub name such as gpt2-medium.')] = "demo",
    validation: Annotated[Path | None, typer.Option(help="JSONL to validate on.")] = None,
    hold_out: Annotated[
        int, typer.Option(help="Without --validation: percent of the inputs held out.", min=0, max=50)
    ] = 5,
    output: Annotated[Path | None, typer.Option(help="Result folder. Default: runs/TASK.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed run; the result is the same.")] = False,
    registry: Annotated[str | None, typer.Option(help="Registry to publish to, a folder or URL.")] = None,
    server: Annotated[str | None, typer.Option(help="Running server to publish to, http://…")] = None,
    alias: Annotated[str, typer.Option(help="Alias to move to the new version; empty for none.")] = DEFAULT_ALIAS,
    preset: Annotated[
        str | None, typer.Option(help="The paper's settings: e2e, webnlg or dart. Default: the task's name, else e2e.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="mlp (the paper's reparameterisation) or direct (keys and values). Default: mlp.")
    ] = None,
    prefix_length: Annotated[int | None, typer.Option(help="Virtual positions, the paper's P.")] = None,
    middle: Annotated[int | None, typer.Option(help="Hidden size of the MLP. Default: 512.")] = None,
    frozen_positions: Annotated[int | None, typer.Option(help="direct: leading positions kept as initialised.")] = None,
    init: Annotated[str | None, typer.Option(help='"random", or words to start from: "table-to-text:"')] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak rate; falls linearly to 0.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of warm-up. Default: 0.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay. Default: 0.")] = None,
    reduction: Annotated[
        str | None, typer.Option(help="Loss: sequence (sum over tokens, mean over batch) or token. Default: sequence.")
    ] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations. Default: an epoch.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 500.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation and data order. Default: 1.")] = None,
    template: Annotated[
        str | None, typer.Option(help="The prompt around {input}. Default: the backbone's usual one.")
    ] = None,
    default: Annotated[
        list[str] | None, typer.Option(help="A default decoding parameter, name=value; repeatable.")
    ] = None,
    drop_long: Annotated[bool, typer.Option("--drop-long", help="Leave out lines that pass the window.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the frozen model: float32, bfloat16, float16, float64.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.", min=0)] = 0,
) -> None:
    """Train a prefix on a frozen backbone, and publish it.

    \b
    Examples:
      prefixd convert e2e src1_train.txt e2e.jsonl
      prefixd train --task e2e --data e2e.jsonl --backbone gpt2-medium
                    --registry ./registry
      prefixd train --task e2e --data e2e.jsonl --method direct --lr 0.01
                    --init table-to-text: --server http://localhost:8000
      prefixd train --task e2e --data e2e.jsonl --resume

    The last one goes on after a kill, to the same result. Without --registry and --server nothing is published.
    The result folder holds config.json, metrics.jsonl, loss.png, prefix.safetensors and report.json.
    """
    with _named_errors():
        ref = TaskRef.parse(task)
        options = {
            name: value
            for name, value in {
                "method": method, "prefix_length": prefix_length, "middle": middle, "init": init, "epochs": epochs,
                "frozen_positions": frozen_positions, "batch_size": batch_size, "learning_rate": learning_rate,
                "warmup_steps": warmup_steps, "weight_decay": weight_decay, "reduction": reduction,
                "validate_every": validate_every, "checkpoint_every": checkpoint_every, "seed": seed,
            }.items()
            if value is not None
        }  # fmt: skip
        request = RunRequest(
            data=data,
            backbone=backbone,
            template=template or default_template(backbone),
            output=output or Path("runs") / ref.name,
            config=TrainConfig.of(_preset(preset, ref.name), options),
            validation=validation,
            hold_out=hold_out,
            defaults={**PAPER_DECODING, **_parse_defaults(default or [])},
            drop_long=drop_long,
            device=device,
            dtype=dtype,
        )
        _set_threads(threads)
        console = Console(stderr=True)
        with Targets(registry, server) as targets:
            with _progress(console) as report:
                result = run_training(request, resume=resume, report=report)
            _summary(console, request, result.version, result.record)
            if targets.publish(ref, result.artifact, {**result.record, "who": getpass.getuser()}, alias or None):
                console.print(f"published {ref.task}@{alias or result.version}")
        typer.echo(result.version)


def convert(
    corpus: Annotated[str, typer.Argument(help="e2e, webnlg or dart.")],
    source: Annotated[Path, typer.Argument(help="The corpus's own file.")],
    output: Annotated[Path, typer.Argument(help="The JSONL to write.")],
    split: Annotated[
        str, typer.Option(help="all, or one side of a fixed split by input: train (95 %) or held-out (5 %).")
    ] = "all",
    reverse: Annotated[bool, typer.Option("--reverse", help="From the sentence to the fields.")] = False,
    lower: Annotated[bool, typer.Option("--lower", help="Lower-case the sentences, as DART's scores do.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Undo E2E's tokenisation: `pub .` becomes `pub.`")] = False,
    paper_spaces: Annotated[
        bool, typer.Option("--paper-spaces", help="Keep the paper's spaces around input and target.")
    ] = False,
    sample: Annotated[int | None, typer.Option(help="Only so many lines, drawn with --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 1,
    without: Annotated[
        list[str] | None, typer.Option(help="DART: leave out this annotation source, e.g. webnlg; repeatable.")
    ] = None,
) -> None:
    """Convert a table-to-text corpus to the trainer's JSONL, one line per input and reference.

    \b
    Examples:
      prefixd convert e2e src1_train.txt e2e.jsonl
      prefixd convert dart dev.json dart.jsonl --without webnlg --split train
      prefixd convert e2e src1_train.txt fields.jsonl --reverse --clean
    """
    with _named_errors():
        for name, value, allowed in (("corpus", corpus, conversion.CORPORA), ("split", split, conversion.SPLITS)):
            if value not in allowed:
                raise InvalidParameter(f"{name}: expected one of {', '.join(allowed)}, got {value!r}", got=value)
        wanted = conversion.Conversion(
            corpus,  # type: ignore[arg-type]
            split,  # type: ignore[arg-type]
            reverse=reverse,
            lower=lower,
            clean=clean,
            paper_spaces=paper_spaces,
            without=tuple(without or ()),
            sample=sample,
            seed=seed,
        )
        counts = conversion.convert(wanted, source, output)
        typer.echo(f"{output}: {counts.lines} lines, {counts.inputs} inputs")


def _preset(preset: str | None, name: str) -> str:
    chosen = preset or (name if name in PRESETS else "e2e")
    if chosen not in PRESETS:
        raise InvalidParameter(f"preset: expected one of {', '.join(PRESETS)}, got {chosen!r}", got=chosen)
    return chosen


def _parse_defaults(pairs: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            made[name] = json.loads(text)
        except ValueError as error:
            raise InvalidParameter(f"--default: expected name=JSON value, got {pair!r}", got=pair) from error
    check_decoding_parameters(made)
    return made


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
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
                description=f"epoch {step.epoch + 1} loss {smooth[0]:.3f}",
                rate=f"{speed:.1f} steps/s" if speed else "",
            )
            if step.validation_loss is not None:
                progress.console.print(f"step {step.step}: validation loss per token {step.validation_loss:.4f}")

        yield report


def _summary(console: Console, request: RunRequest, version: str, record: Any) -> None:
    table = Table(show_header=False)
    table.add_row("version", version)
    table.add_row("validation loss per token", str(record["scores"]["validation_loss_per_token"]))
    table.add_row("seconds", str(record["seconds"]))
    table.add_row("results", str(request.output))
    console.print(table)
