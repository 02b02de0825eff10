"""``prefixd train``: the command line of a training run.

Owns options and help; ``training.run`` and ``terminal`` do the rest. ``prefixd.py`` mounts ``train_app``.
"""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prefixes.cli.key_option import check_key_has_server, key_of_command
from prefixes.cli.target import application, command
from prefixes.errors import InvalidParameter
from prefixes.spec import DEFAULT_ALIAS, TaskRef
from trainer.cli import training_options as options
from trainer.cli.options import DeviceOption, DtypeOption, IgnoreOption, decoding_parameters, initial_text, named_errors
from trainer.cli.terminal import print_summary, progress_bar
from trainer.cli.train_gate import TrainGate
from trainer.training.budget import auto_of
from trainer.training.config import PRESETS, TrainConfig
from trainer.training.initial import Initial, InitialText, InitialVersion
from trainer.training.publish import Targets
from trainer.training.request import RunRequest
from trainer.training.run import run_training

train_app = application("Train a prefix on a frozen backbone, and publish it.")


@command(train_app, "train", errors=named_errors)
def train(
    task: options.Task,
    data: Annotated[Path, typer.Option(help='JSONL of {"input": …, "target": …} lines (see `prefixd convert`).')],
    backbone: Annotated[
        str,
        typer.Option(help="A name of `prefixd backbones list`, a folder, FOLDER/NAME.gguf, or a hub id: gpt2-medium."),
    ] = "demo",
    validation: Annotated[Path | None, typer.Option(help="JSONL to validate on.")] = None,
    hold_out: Annotated[
        int, typer.Option(help="Without --validation: percent of the inputs held out.", min=0, max=50)
    ] = 5,
    output: Annotated[Path | None, typer.Option(help="Result folder. Default: runs/TASK.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed run; the result is the same.")] = False,
    registry: Annotated[str | None, typer.Option(help="Registry to publish to, a folder or URL.")] = None,
    server: Annotated[
        str | None, typer.Option("--server", metavar="URL", help="Running server to publish to, http://…")
    ] = None,
    alias: Annotated[str, typer.Option(help="Alias to move to the new version; empty for none.")] = DEFAULT_ALIAS,
    auto: options.AutoOption = False,
    budget_minutes: options.BudgetMinutes = None,
    promote_if: options.PromoteIf = None,
    margin: options.Margin = None,
    gate: Annotated[Path | None, typer.Option(help="With --promote-if: JSONL to decide by.")] = None,
    gate_hold_out: options.GateHoldOut = None,
    preset: options.Preset = None,
    method: options.Method = None,
    sites: options.Sites = None,
    positions: options.Positions = None,
    prefix_length: options.PrefixLength = None,
    middle: options.Middle = None,
    frozen_positions: options.FrozenPositions = None,
    init: options.Init = None,
    init_file: Annotated[
        Path | None,
        typer.Option(
            help="A text to start from: the model's own keys and values over its first tokens, trained directly, the "
            "first one frozen."
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="A version to go on from: FILE.safetensors, or a task of --registry or --server."),
    ] = None,
    epochs: options.Epochs = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    accumulate: options.Accumulate = None,
    checkpoint_activations: options.CheckpointActivations = False,
    learning_rate: options.LearningRate = None,
    warmup_steps: options.WarmupSteps = None,
    weight_decay: options.WeightDecay = None,
    reduction: options.Reduction = None,
    validate_every: options.ValidateEvery = None,
    patience: options.Patience = None,
    checkpoint_every: options.CheckpointEvery = None,
    seed: options.Seed = None,
    template: options.Template = None,
    default: options.Defaults = None,
    truncate: options.Truncate = False,
    drop_long: options.DropLong = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    ignore_generation_config: IgnoreOption = None,
    autocast: Annotated[
        bool | None,
        typer.Option(
            "--autocast/--no-autocast", help="Matrix products in bfloat16, the rest in float32. Default: on a GPU."
        ),
    ] = None,
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
      prefixd train --task e2e --data e2e.jsonl --init-file style.txt
                    --prefix-length 32 --lr 0.02
      prefixd train --task e2e --data more.jsonl --init-from e2e@production
                    --method direct --lr 0.005 --registry ./registry
      prefixd train --task e2e --data e2e.jsonl --auto --budget-minutes 20
                    --registry ./registry
      prefixd train --task e2e --data e2e.jsonl --gate-hold-out 10
                    --promote-if bleu --margin 0.5 --registry ./registry
      prefixd train --task e2e --data e2e.jsonl --resume
      prefixd train --task xsum --data xsum.jsonl --backbone facebook/bart-large
                    --truncate --registry ./registry
      prefixd train --task tldr --preset xsum --data tldr.jsonl
                    --backbone demo-bart --sites encoder,cross --init summarize
                    --truncate

    --resume goes on after a kill, to the same result. Without --registry and --server nothing is published.
    The result folder holds config.json, metrics.jsonl, loss.png, prefix.safetensors and report.json.
    """
    check_key_has_server(server)
    ref = TaskRef.parse(task)
    chosen = _preset(preset, ref.name)
    hyperparameters = options.given(
        sites=options.site_names(sites), positions=positions, method=method, prefix_length=prefix_length,
        middle=middle, init=init, epochs=epochs, steps=steps, frozen_positions=frozen_positions, batch_size=batch_size,
        learning_rate=learning_rate, accumulate=accumulate, checkpoint_activations=checkpoint_activations or None,
        warmup_steps=warmup_steps, weight_decay=weight_decay, reduction=reduction, validate_every=validate_every,
        patience=patience, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    search = auto_of(auto, budget_minutes, hyperparameters)
    config = TrainConfig.of(chosen, hyperparameters, from_text=init_file is not None)
    defaults = {**PRESETS[chosen].decoding, **decoding_parameters("--default", default or [])}
    _set_threads(threads)
    console = Console(stderr=True)
    with Targets(registry, server, key_of_command() if server else None) as targets:
        judge = TrainGate.of(promote_if, margin, gate, gate_hold_out or 0, alias, targets)
        request = RunRequest(
            data=data,
            backbone=backbone,
            template=template,
            output=output or Path("runs") / ref.name,
            config=config,
            validation=validation,
            hold_out=hold_out,
            gate_hold_out=gate_hold_out or 0,
            defaults=defaults,
            drop_long=drop_long,
            truncate=truncate,
            device=device,
            dtype=dtype,
            autocast=autocast,
            initial=_initial(init_file, init_from, targets),
            ignore_generation_config=ignore_generation_config or (),
            auto=search,
        )
        with progress_bar(console) as report:
            result = run_training(request, resume=resume, accept=targets.check, report=report)
        print_summary(console, request, result.version, result.record)
        ref, record = TaskRef.parse(task, targets.own_tenant), {**result.record, "who": getpass.getuser()}
        if judge is not None:
            wanted = TaskRef(ref.tenant, ref.name, alias)
            outcome = judge.publish(request, result, record, targets, wanted, threads or None, console)
            alias = alias if outcome["verdict"] == "promoted" else ""
        else:
            targets.publish(ref, result.artifact, record, alias or None)
        if targets:
            console.print(f"published {ref.task}@{alias or result.version}")
    typer.echo(result.version)


def _preset(preset: str | None, name: str) -> str:
    chosen = preset or (name if name in PRESETS else "e2e")
    if chosen not in PRESETS:
        raise InvalidParameter(f"preset: expected one of {', '.join(PRESETS)}, got {chosen!r}", got=chosen)
    return chosen


def _initial(text: Path | None, version: str | None, targets: Targets) -> Initial | None:
    if text is not None and version is not None:
        raise InvalidParameter("--init-file, --init-from: expected one of the two, got both")
    if text is not None:
        return InitialText(initial_text(text))
    if version is None:
        return None
    if not version.endswith(".safetensors"):
        return InitialVersion.read(targets.fetch(TaskRef.parse(version, targets.own_tenant)))
    try:
        return InitialVersion.read(Path(version).read_bytes())
    except OSError as error:
        raise InvalidParameter(f"--init-from {version}: expected a file, got {error.strerror}") from error


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
