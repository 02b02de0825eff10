"""One training run and its result folder: reads, tokenises, trains or searches, folds, writes.

Owns the folder (``config.json``, ``metrics.jsonl``, ``loss.png``, ``prefix.safetensors``, ``report.json``, and
checkpoints while it runs); knows neither terminal nor registry.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.files import write_bytes, write_json, write_text
from prefixes.spec import PrefixSpec
from trainer.reports.plot import plot_losses
from trainer.training.auto import LEDGER, TRIALS, Search
from trainer.training.budget import Budget
from trainer.training.checkpoint import CheckpointError
from trainer.training.export import Provenance, fold, origin_of
from trainer.training.failures import named_failures
from trainer.training.loop import Progress, Trainer
from trainer.training.material import Material
from trainer.training.reparam import PrefixKV
from trainer.training.request import RunRequest, seen_inputs
from trainer.training.resume import check_folder, check_identity

PLOT_EVERY_S: Final = 20.0  # least time between two plots: drawing takes longer than a step
CHECKPOINT: Final = "checkpoint.safetensors"


@dataclass(frozen=True)
class RunResult:
    """A finished run: its artifact and the record to publish beside it."""

    artifact: bytes
    version: str
    record: Mapping[str, Any]


def run_training(
    request: RunRequest,
    *,
    resume: bool = False,
    accept: Callable[[PrefixSpec], None] = lambda _: None,
    report: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> RunResult:
    """Run to the end. With ``resume``, continue a killed run, or read back a finished one.

    A missing folder is made once. If it is moved away meanwhile, the next write raises FileNotFoundError.
    ``accept`` sees the plan before anything is trained and raises what speaks against it. ``should_stop`` is asked
    before every step. Raises RunExists for a folder with a run unless ``resume``,
    CheckpointError for another configuration, backbone or data, TrainingStopped, OutOfMemory, DiskFull. The last
    checkpoint stays, and ``resume`` continues from it. A search's budget is in seconds of ``clock``; it raises
    BudgetExhausted if no trial has a result by then.
    """
    micro_batch = -(-request.config.batch_size // request.config.accumulate)
    advice = f"this run takes {micro_batch} sequences at a time: a larger accumulate, a smaller batch_size or "
    with named_failures(advice + "checkpoint_activations need less"):
        return _run(request, resume, accept, report, should_stop, clock)


def _run(
    request: RunRequest,
    resume: bool,
    accept: Callable[[PrefixSpec], None],
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    clock: Callable[[], float],
) -> RunResult:
    folder, auto = request.output, request.auto
    budget = None if auto is None else Budget(60 * auto.budget_minutes, clock)
    check_folder(folder, request.as_dict(), resume)
    found = folder.is_dir()
    material = Material.read(request)
    accept(material.plan)
    if (folder / "report.json").exists():
        check_identity(folder, material.identity)
        return read_result(folder)
    train, validation = material.train.examples, material.validation.examples
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", request.as_dict())
    if auto is not None and budget is not None:
        search = Search(material, auto, budget, report, should_stop)
        trainer = search.run()
        assert trainer.best is not None, "a search chooses by what was validated"
        _finish(folder, material, trainer, trainer.best, search, budget.spent)
    else:
        trainer = material.trainer(request.config, folder / CHECKPOINT, train, validation)
        kv = trainer.run(_watch(folder, trainer, report), should_stop)
        _finish(folder, material, trainer, kv, None, trainer.state.seconds)
    return read_result(folder)


def _watch(folder: Path, trainer: Trainer, report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    drawn = time.monotonic()

    def watch(progress: Progress) -> None:
        nonlocal drawn
        if progress.validation_loss is not None and time.monotonic() - drawn > PLOT_EVERY_S:
            _write_metrics(folder, trainer)
            drawn = time.monotonic()
        report(progress)

    return watch


def _finish(
    folder: Path, material: Material, trainer: Trainer, kv: PrefixKV, search: Search | None, seconds: float
) -> None:
    """Write the result of a run, and remove what only an unfinished one needs."""
    request, train, validation, state = material.request, material.train, material.validation, trainer.state
    _write_metrics(folder, trainer)
    validated = len(validation.examples) if search is None else len(search.selection)
    provenance = Provenance(
        material.train_set.digest,
        len(train.examples),
        train.cut,
        material.validation_set.digest if validated else None,
        validated,
        state.step,
        state.best_step or state.step,
        seen_inputs(request, material.train_set, material.validation_set),
        None if trainer.initial is None else trainer.initial.as_dict(),
    )
    origin = origin_of(trainer.config, provenance, request.backbone)
    prefix = fold(kv, material.plan_of(trainer.config), origin)
    write_bytes(folder / "prefix.safetensors", write_prefix(prefix))
    write_json(
        folder / "report.json",
        {
            "version": version_of(prefix),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "tokens": state.tokens if search is None else sum(trial.tokens for trial in search.ledger.trials),
            "torch": torch.__version__,
            "device": request.device,
            "identity": material.identity,
            "dropped": {"train": train.dropped, "validation": validation.dropped},
            "cut": {"train": train.cut, "validation": validation.cut},
            "initialisation_error": state.initial_error,
            "scores": {"validation_loss_per_token": state.best_loss, "final_loss": state.metrics[-1]["loss"]},
            "origin": origin,
            **({"warnings": material.warnings} if material.warnings else {}),
            **({} if search is None else {"search": search.summary()}),
        },
    )
    (folder / CHECKPOINT).unlink(missing_ok=True)
    (folder / LEDGER).unlink(missing_ok=True)
    shutil.rmtree(folder / TRIALS, ignore_errors=True)


def read_result(folder: Path) -> RunResult:
    """Read and validate a finished run's artifact and record. Raises CheckpointError, InvalidArtifact."""
    try:
        report = json.loads((folder / "report.json").read_text())
        artifact = (folder / "prefix.safetensors").read_bytes()
        version = report["version"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: expected a finished run, got {type(error).__name__}: {error}") from error
    read_prefix(artifact, expected_version=version)
    told = ("finished_at", "seconds", "tokens", "torch", "device", "scores", "search", "warnings")
    record = {key: report[key] for key in told if key in report}
    return RunResult(artifact, version, record)


def _write_metrics(folder: Path, trainer: Trainer) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in trainer.state.metrics)
    write_text(folder / "metrics.jsonl", lines)
    plot_losses(folder / "loss.png", trainer.state.metrics)
