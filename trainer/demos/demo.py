"""Makes the prefixes that ship (SmolLM2's do not yet): converts, trains, scores, and puts the artifacts in place.

    python -m trainer.demos.demo --corpora ../shared/data
    python -m trainer.demos.demo --corpora ../shared/data --backbone smollm2

Owns their settings, which ``docs/demo.md`` gives as ``prefixd`` commands. ``trainer.demos.pretrain`` makes the demo
backbones. WebNLG's data, including the part inside DART, is never used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console

from prefixes.artifact import read_prefix
from prefixes.backbone import load_backbone
from prefixes.checkpoint_folder import DEMOS
from prefixes.files import write_bytes, write_json
from trainer.cli.terminal import progress_bar
from trainer.data.convert import Conversion, convert
from trainer.data.dataset import read_dataset
from trainer.evaluation.evaluate import evaluate
from trainer.training.config import DEMO_TEMPLATE, LINE_TEMPLATE, TrainConfig
from trainer.training.request import RunRequest
from trainer.training.run import run_training

DECODING: Final[Mapping[str, Any]] = {"num_beams": 1, "max_new_tokens": 80}
SUMMARY_DECODING: Final[Mapping[str, Any]] = {
    "num_beams": 4, "max_new_tokens": 60, "length_penalty": 0.8, "no_repeat_ngram_size": 3, "truncate": True,
}  # fmt: skip
BRIEF_DECODING: Final[Mapping[str, Any]] = {
    "num_beams": 1, "max_new_tokens": 60, "no_repeat_ngram_size": 3, "truncate": True,
}  # fmt: skip
BART_TEMPLATE: Final = "<s><mask> ||{input}</s>"  # a hidden text before its table or abstract, as in the pretraining


@dataclass(frozen=True)
class Source:
    """A corpus's files, how they become lines, and the metric of what is learnt from them."""

    conversion: Conversion  # split and sample are the task's
    train: str
    test: str
    metric: str


E2E: Final = Source(Conversion("e2e", clean=True), "e2e/src1_train.txt", "e2e/src1_test.txt", "bleu")
E2E_FIELDS: Final = replace(E2E, conversion=replace(E2E.conversion, reverse=True), metric="fields")
DART: Final = Source(Conversion("dart", without=("webnlg",)), "dart/dev.json", "dart/test.json", "bleu")
SCITLDR: Final = Source(Conversion("scitldr"), "scitldr/train.jsonl", "scitldr/test.jsonl", "rouge")


@dataclass(frozen=True)
class DemoTask:
    """One prefix: its data and its settings. Samples are numbers of lines; None is all."""

    name: str
    source: Source
    config: TrainConfig
    sample: int | None = None  # of the training side
    validation_sample: int | None = None  # of the held-out side
    test_sample: int | None = None
    backbone: str = "demo"
    template: str = DEMO_TEMPLATE
    decoding: Mapping[str, Any] = field(default_factory=lambda: DECODING)


def demo_tasks(seed: int) -> tuple[DemoTask, ...]:
    """GPT-2's three tasks (E2E, DART, and E2E reversed), BART's two (E2E, SciTLDR) and SmolLM2's three."""
    return (*_gpt2_tasks(seed), *_bart_tasks(seed), *_smollm2_tasks(seed))


def _gpt2_tasks(seed: int) -> tuple[DemoTask, ...]:
    shared: dict[str, Any] = {"batch_size": 24, "learning_rate": 1e-3, "seed": seed, "validate_every": 100}
    return (
        DemoTask(
            "e2e",
            E2E,
            TrainConfig(prefix_length=6, init="table-to-text:", epochs=1, **shared),
            sample=12000,
            validation_sample=400,
        ),
        DemoTask("dart", DART, TrainConfig(prefix_length=12, init="triples-to-text:", epochs=3, **shared)),
        DemoTask(
            "e2e-fields",
            E2E_FIELDS,
            TrainConfig(prefix_length=6, init="text-to-table:", epochs=1, **shared),
            sample=6000,
            validation_sample=400,
            test_sample=1000,
        ),
    )


def _bart_tasks(seed: int) -> tuple[DemoTask, ...]:
    shared: dict[str, Any] = {"learning_rate": 1e-3, "seed": seed, "validate_every": 100, "reduction": "token"}
    bart: dict[str, Any] = {"backbone": "demo-bart", "template": BART_TEMPLATE}
    return (
        DemoTask(
            "e2e-bart",
            E2E,
            TrainConfig(prefix_length=10, init="The restaurant serves food.", epochs=1, batch_size=24, **shared),
            sample=12000,
            validation_sample=400,
            **bart,
        ),
        DemoTask(
            "scitldr",
            SCITLDR,
            TrainConfig(prefix_length=20, init="We summarize the paper.", epochs=2, batch_size=8, **shared),
            decoding=SUMMARY_DECODING,
            **bart,
        ),
    )


def _smollm2_tasks(seed: int) -> tuple[DemoTask, ...]:
    shared: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-3, "seed": seed, "reduction": "token"}
    sentences = TrainConfig(prefix_length=10, steps=300, validate_every=75, **shared)
    summaries = TrainConfig(prefix_length=20, steps=120, validate_every=40, **shared)
    smollm2: dict[str, Any] = {"backbone": "smollm2", "template": LINE_TEMPLATE}
    return (
        DemoTask("e2e", E2E, sentences, sample=2400, validation_sample=120, **smollm2),
        DemoTask("dart", DART, sentences, sample=2400, validation_sample=120, **smollm2),
        DemoTask("scitldr", SCITLDR, summaries, validation_sample=60, decoding=BRIEF_DECODING, **smollm2),
    )


def make(task: DemoTask, corpora: Path, work: Path) -> Path:
    """Train ``task``, or continue its killed run; return the result folder."""
    data, validation = work / f"{task.name}.jsonl", work / f"{task.name}-validation.jsonl"
    learnt, held_out = replace(task.source.conversion, split="train"), replace(task.source.conversion, split="held-out")
    convert(replace(learnt, sample=task.sample), corpora / task.source.train, data)
    convert(replace(held_out, sample=task.validation_sample), corpora / task.source.train, validation)
    request = RunRequest(
        data=data,
        backbone=task.backbone,
        template=task.template,
        output=work / task.name,
        config=task.config,
        validation=validation,
        defaults=task.decoding,
        truncate=bool(task.decoding.get("truncate")),
    )
    with progress_bar(Console(stderr=True)) as report:
        run_training(request, resume=True, report=report)
    return request.output


def main(
    corpora: Annotated[Path, typer.Option(help="Folder with e2e/, dart/ and scitldr/.")] = Path("../shared/data"),
    work: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/demo"),
    output: Annotated[Path, typer.Option(help="Folder of the backbones' folders.")] = Path("prefixes/demo"),
    backbone: Annotated[str | None, typer.Option(help="Whose prefixes. Default: the demos'.")] = None,
    only: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train the prefixes, put them in place, and print their test scores as JSON lines."""
    torch.set_num_threads(threads)
    for task in demo_tasks(seed):
        if task.backbone not in (DEMOS if backbone is None else {backbone}) or only not in (None, task.name):
            continue
        artifact = (make(task, corpora, work / task.backbone) / "prefix.safetensors").read_bytes()
        test = work / task.backbone / f"{task.name}-test.jsonl"
        convert(replace(task.source.conversion, sample=task.test_sample), corpora / task.source.test, test)
        made = evaluate(
            load_backbone(task.backbone), read_prefix(artifact), read_dataset(test), metrics=[task.source.metric]
        )
        write_json(work / task.backbone / f"{task.name}-evaluation.json", made.as_dict())
        folder = output / DEMOS.get(task.backbone, task.backbone) / "prefixes"
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"{task.name}.safetensors", artifact)
        scores = {name: score.value for name, score in made.scores.items()}
        typer.echo(json.dumps({"task": task.name, "seed": seed, "inputs": made.inputs, **scores}))


if __name__ == "__main__":
    typer.run(main)
