"""``prefixd evaluate``: the command line of an evaluation.

Owns options, help, the progress bar, the table and the files; ``evaluation.evaluate`` does the rest. ``prefixd.py``
mounts ``evaluate_app``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import ByteSize, Field, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from prefixes.actor import local_actor
from prefixes.artifact import read_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.cli.target import RegistryOption, ServerOption, application, command, fetch, opened, reference
from prefixes.errors import InvalidParameter
from prefixes.files import write_json, write_text
from prefixes.registry.transitions import version_of_task
from trainer.cli.options import DeviceOption, DtypeOption, IgnoreOption, decoding_parameters, named_errors
from trainer.data.dataset import read_dataset
from trainer.evaluation import evaluate as evaluation
from trainer.evaluation.bootstrap import RESAMPLES
from trainer.evaluation.generate import check_scored
from trainer.evaluation.scores.presets import METRICS, PRESETS, metrics_of, preset_of
from trainer.reports.report import build_report, write_reports
from trainer.training.request import DTYPES

_PRESETS = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())

evaluate_app = application("Score a prefix on a test set.")


@command(evaluate_app, "evaluate", errors=named_errors)
def evaluate(
    data: Annotated[Path, typer.Option(help="JSONL; lines of the same input are its references.")],
    task: Annotated[
        str | None,
        typer.Option(help="[TENANT/]NAME in the registry; with @ALIAS or @sha256:… another version than production's."),
    ] = None,
    artifact: Annotated[Path | None, typer.Option(help="A prefix artifact instead, a file.")] = None,
    registry: RegistryOption = None,
    server: ServerOption = None,
    backbone: Annotated[
        str, typer.Option(help="What the prefix was made for, as `prefixd train --backbone`.")
    ] = "demo",
    preset: Annotated[str, typer.Option(help=f"How the corpus is scored. {_PRESETS}.")] = "plain",
    metric: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this metric, under the preset's settings; repeatable. {', '.join(METRICS)}."),
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(help="How to decode, name=value; repeatable. Default: as the server would.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut inputs that pass the window.")] = False,
    limit: Annotated[int | None, typer.Option(help="Score only the first inputs.", min=1)] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write evaluation.json, outputs.jsonl and report.html to.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the scores in the registry, in the record beside the version.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the intervals' draws.", min=0)] = 1,
    resamples: Annotated[int, typer.Option(help="Draws of an interval; 0 for none.", min=0)] = RESAMPLES,
    kv_cache_bytes: Annotated[str, typer.Option(help="Memory for rows and the prefix, e.g. 2GiB.")] = "512MiB",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    ignore_generation_config: IgnoreOption = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for all cores.", min=0)] = 0,
    quantize: Annotated[
        Literal["auto", "none", "int8"],
        typer.Option(help="As the server's: int8 keeps weights as integers of 8 bits; auto for a GGUF file of so few."),
    ] = "auto",
) -> None:
    """Score a prefix on a test set, through the engine that will serve it, without sampling.

    \b
    Examples:
      prefixd evaluate --task e2e --data e2e-test.jsonl --registry ./registry
                       --backbone gpt2-medium --preset e2e
      prefixd evaluate --artifact runs/e2e/prefix.safetensors --data e2e-test.jsonl
                       --preset e2e --metric bleu --metric nist
      prefixd evaluate --task tldr@candidate --data tldr-test.jsonl --preset xsum
                       --backbone demo-bart --truncate --parameter num_beams=4
                       --output runs/tldr-scores --record

    A table with 95 % intervals (bootstrap over inputs) goes to stderr, the same as JSON to stdout. METEOR, CIDEr and
    COCO's ROUGE-L need Java and pip install 'prefixd[coco]'.
    """
    with ExitStack() as opened_stack:
        if (task is None) == (artifact is None):
            raise typer.BadParameter("expected one of --task and --artifact")
        if record and task is None:
            raise typer.BadParameter("--record: expected --task, whose version the scores belong to")
        given = decoding_parameters("--parameter", parameter or [])
        check_scored(given)
        metrics_of(preset_of(preset), metric or [])
        memory = _bytes(kv_cache_bytes)
        examples = read_dataset(data)
        store = None if task is None else opened_stack.enter_context(opened(registry, server))
        found = None if store is None or task is None else store.resolve(reference(task, store))
        if found is None or store is None:
            content = _read(artifact)
        else:
            content = fetch(store, found.tenant, found.name, found.version)
        prefix = read_prefix(content, expected_version=found.version if found else None)
        loaded = _loaded(backbone, device, dtype, ignore_generation_config or ())
        console = Console(stderr=True)
        with _bar(console) as report:
            made = evaluation.evaluate(
                loaded, prefix, examples, preset=preset, metrics=metric or [], parameters=given, truncate=truncate,
                limit=limit, seed=seed, resamples=resamples, kv_cache_bytes=memory, threads=threads or None,
                quantize=quantize, report=report,
            )  # fmt: skip
        console.print(_table(made))
        if output is not None:
            _write(output, made, task, prefix.spec.origin)
        if record and store is not None and found is not None:
            known = version_of_task(store.inspect(found.tenant, found.name), found.version).record
            store.publish(
                found.tenant, found.name, content, alias=None, record=made.record(known), actor=local_actor()
            )
        typer.echo(json.dumps(made.summary(), ensure_ascii=False))


def _read(artifact: Path | None) -> bytes:
    assert artifact is not None, "checked: no task"
    try:
        return artifact.read_bytes()
    except OSError as error:
        raise InvalidParameter(f"--artifact: expected a file, got {artifact}: {error.strerror}") from None


def _loaded(backbone: str, device: str, dtype: str, ignored: Sequence[str]) -> Backbone:
    if dtype not in DTYPES:
        raise InvalidParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}", got=dtype)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # an unknown name, or a torch built without it
        raise InvalidParameter(f"--device: expected one that torch has here, got {device!r}", got=device) from None
    return load_backbone(
        backbone, dtype=getattr(torch, dtype), device=device, ignore_generation_config=ignored
    )


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(Annotated[ByteSize, Field(gt=0)]).validate_python(text))
    except ValidationError:
        raise InvalidParameter(f"--kv-cache-bytes: expected a size such as 512MiB or 2GiB, got {text!r}") from None


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("generating", total=None)

        def report(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, description="scoring" if done == total else "generating")

        yield report


def _table(made: evaluation.Evaluation) -> Table:
    table = Table(title=f"{made.inputs} inputs, {made.references} references", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, score in made.scores.items():
        bounds = "-" if score.low is None or score.high is None else f"{score.low:.2f} to {score.high:.2f}"
        table.add_row(name, f"{score.value:.2f}", bounds)
    return table


def _write(folder: Path, made: evaluation.Evaluation, task: str | None, origin: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = made.as_dict()
    lines = [json.dumps(row, ensure_ascii=False) for row in document["outputs"]]
    write_text(folder / "outputs.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "evaluation.json", document)
    write_reports(folder, build_report({"version": made.version, "origin": origin}, [], made, task=task))
