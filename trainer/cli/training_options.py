"""The options that ``prefixd train`` and ``prefixd jobs submit`` share, each with one declaration and one help text.

Owns their flags and help; ``TrainConfig`` checks the values. An option that is not given is None: the preset's value
holds.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trainer.training.config import PRESETS

# --- the task and its data ---

Task = Annotated[str, typer.Option(help="Task to publish as: name or tenant/name.")]
Preset = Annotated[
    str | None,
    typer.Option(help=f"The paper's settings: {', '.join(PRESETS)}. Default: the task's name, else e2e."),
]
Template = Annotated[
    str | None, typer.Option(help="The prompt around {input}. Default: the backbone's usual one.")
]
Defaults = Annotated[
    list[str] | None, typer.Option(help="A default decoding parameter, name=value; repeatable.")
]
Truncate = Annotated[
    bool, typer.Option("--truncate", help="Cut the end of inputs that pass the window; targets never.")
]
DropLong = Annotated[bool, typer.Option("--drop-long", help="Leave out lines that pass the window.")]

AutoOption = Annotated[
    bool,
    typer.Option(
        "--auto",
        help="Choose length, start and learning rate by trying: many short trials, the best third longer, the best one "
        "longest. What is given, such as --prefix-length 20, is not searched.",
    ),
]
BudgetMinutes = Annotated[
    float | None, typer.Option(help="With --auto: minutes for everything that is trained. Default: 10.")
]

# --- the gate ---

PromoteIf = Annotated[
    str | None,
    typer.Option(
        metavar="METRIC",
        help="Move the alias only if the version is not worse than the current one by this score, such as bleu, with "
        "95 % confidence: both are scored on inputs of --gate or --gate-hold-out that neither has seen.",
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(help="With --promote-if: how much worse is good enough; below 0, how much better. Default: 0."),
]
GateHoldOut = Annotated[
    int | None,
    typer.Option(help="Percent of the inputs that are kept for the gate alone, of later versions too.", min=0, max=50),
]

# --- hyperparameters ---

Method = Annotated[
    str | None, typer.Option(help="mlp (the paper's reparameterisation) or direct (keys and values). Default: mlp.")
]
Sites = Annotated[
    str | None,
    typer.Option(help="Where the prefix attaches: some of encoder,decoder,cross. Default: all there are."),
]
Positions = Annotated[
    str | None, typer.Option(help="shifted or unshifted behind the prefix. Default: with an encoder unshifted.")
]
PrefixLength = Annotated[int | None, typer.Option(help="Virtual positions at each site, the paper's P.")]
Middle = Annotated[int | None, typer.Option(help="Hidden size of the MLP. Default: 512; xsum 800.")]
FrozenPositions = Annotated[int | None, typer.Option(help="direct: leading positions kept as initialised.")]
Init = Annotated[
    str | None,
    typer.Option(
        help='What to start from: "random" (default); "examples", the model\'s own keys and values over some training '
        'pairs, trained directly, the first position frozen; or over any words: "table-to-text:"'
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option(help="So many steps, in place of --epochs.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences per step.")]
Accumulate = Annotated[
    int | None,
    typer.Option(help="Parts that a batch is computed in, one after the other: less memory. Default: 1."),
]
CheckpointActivations = Annotated[
    bool,
    typer.Option("--checkpoint-activations", help="Compute layers twice instead of keeping them: less memory."),
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak rate; falls linearly to 0.")]
WarmupSteps = Annotated[int | None, typer.Option(help="Steps of warm-up. Default: 0.")]
WeightDecay = Annotated[float | None, typer.Option(help="AdamW's weight decay. Default: 0.")]
Reduction = Annotated[
    str | None,
    typer.Option(help="Loss: sequence (sum over tokens, mean over batch) or token. Default: sequence; xsum token."),
]
ValidateEvery = Annotated[int | None, typer.Option(help="Steps between validations. Default: an epoch.")]
Patience = Annotated[
    int | None,
    typer.Option(help="End early after so many validations in a row that were no better. Default: 0, never."),
]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 500.")]
Seed = Annotated[int | None, typer.Option(help="Of initialisation and data order. Default: 1.")]


def site_names(text: str | None) -> tuple[str, ...] | None:
    """Split the value of ``--sites`` at its commas."""
    return None if text is None else tuple(site.strip() for site in text.split(","))


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}
