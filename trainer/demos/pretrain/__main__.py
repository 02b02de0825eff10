"""Pretrains a demo backbone, with its own tokenizer, from random weights.

    python -m trainer.demos.pretrain gpt2 --e2e ../shared/data/e2e/src1_train.txt --dart ../shared/data/dart/dev.json \
        --output prefixes/demo/gpt2
    python -m trainer.demos.pretrain bart --e2e ../shared/data/e2e/src1_train.txt --dart ../shared/data/dart/dev.json \
        --scitldr ../shared/data/scitldr/train.jsonl --output prefixes/demo/bart

Owns the two commands' options; knows no data and no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from trainer.demos.pretrain.bart import bart_recipe
from trainer.demos.pretrain.gpt2 import gpt2_recipe
from trainer.demos.pretrain.loop import Pretraining, pretrain
from trainer.demos.pretrain.tables import read_corpora

app = typer.Typer(help="Pretrain a demo backbone and export it. A run that has used up its budget is only exported.")

E2E = Annotated[Path, typer.Option("--e2e", help="E2E's src1_train.txt.")]
Dart = Annotated[Path, typer.Option(help="DART's dev.json; its WebNLG annotations are left out.")]
Scitldr = Annotated[Path, typer.Option(help="SciTLDR-A's train.jsonl.")]
Output = Annotated[Path, typer.Option(help="Folder for the backbone, weights in float16.")]
State = Annotated[Path, typer.Option(help="Folder for the checkpoint; one that is there is taken up.")]
Minutes = Annotated[float, typer.Option(help="Wall-clock budget; the schedule ends with it.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of the data.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
CheckpointMinutes = Annotated[float, typer.Option(help="Between checkpoints.")]


@app.command("gpt2")
def gpt2(
    e2e: E2E,
    dart: Dart,
    output: Output,
    state: State = Path("runs/pretrain"),
    minutes: Minutes = 53.0,
    seed: Seed = 1,
    threads: Threads = 1,
    checkpoint_minutes: CheckpointMinutes = 3.0,
) -> None:
    """A GPT-2 that learns instructed operations on E2E and DART."""
    torch.set_num_threads(threads)
    run = Pretraining(gpt2_recipe(*read_corpora(e2e, dart), seed), state, seed)
    pretrain(run, output, minutes, checkpoint_minutes)


@app.command("bart")
def bart(
    e2e: E2E,
    dart: Dart,
    scitldr: Scitldr,
    output: Output,
    state: State = Path("runs/pretrain-bart"),
    minutes: Minutes = 52.0,
    seed: Seed = 1,
    threads: Threads = 1,
    checkpoint_minutes: CheckpointMinutes = 3.0,
) -> None:
    """A BART that learns denoising on E2E, DART and SciTLDR."""
    torch.set_num_threads(threads)
    run = Pretraining(bart_recipe(*read_corpora(e2e, dart, scitldr), seed), state, seed)
    pretrain(run, output, minutes, checkpoint_minutes)


if __name__ == "__main__":
    app()
