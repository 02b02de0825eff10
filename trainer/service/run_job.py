"""The steps of a job's process: train, score on the held-out data, judge at the gate, report.

Owns their order, and skips a step that an earlier process has finished. Knows no worker and no registry.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from prefixes.artifact import read_prefix
from prefixes.backbone import load_backbone
from prefixes.files import write_json
from trainer.data.errors import TrainingStopped
from trainer.data.lines import InvalidData
from trainer.evaluation.evaluate import Evaluation, evaluate
from trainer.evaluation.gate_rule import METRIC_OF
from trainer.evaluation.generate import Report
from trainer.evaluation.scores.base import ScorerMissing
from trainer.evaluation.scores.presets import NEED_JAVA, metrics_of, preset_of
from trainer.reports.report import report_of, write_reports
from trainer.service.gating import gated
from trainer.service.request import RECORD, REQUEST, START
from trainer.training.budget import Auto
from trainer.training.config import TrainConfig
from trainer.training.failures import named_failures
from trainer.training.initial import Initial, InitialText, InitialVersion
from trainer.training.loop import Progress
from trainer.training.request import RunRequest, read_datasets
from trainer.training.resume import begun_with
from trainer.training.run import RunResult, run_training

EVALUATION: Final = "evaluation.json"
PROGRESS_INTERVAL_S: Final = 0.1
"""Least seconds between two progress messages; steps may be much faster."""


@dataclass(frozen=True)
class JobRequest:
    """What to train, for which task, how to score it, and what its gate is to decide, as ``request`` wrote it."""

    task: str
    run: RunRequest
    evaluation: Mapping[str, Any] | None
    threads: int | None
    gate: Mapping[str, Any] | None = None


class Listener(Protocol):
    """The side that started the process."""

    def tell(self, event: str, **facts: Any) -> None:
        """Send a message."""

    def should_stop(self) -> bool:
        """Whether to end before the next step."""


class Pace(Protocol):
    """Turns counts into speeds."""

    def at(self, step: int, tokens: int, total: int) -> Mapping[str, float]:
        """Return speeds and the time left."""


def run_job(folder: Path, listener: Listener, pace: Pace) -> str:
    """Run the job in ``folder``, where its results lie then; return the version of the prefix. Raises PrefixdError."""
    job = read_request(folder)
    metrics = None if job.evaluation is None else _metrics(job.evaluation)  # fails before training, not after it
    if job.gate is not None:
        metrics_of(preset_of(job.gate["preset"]), [METRIC_OF[job.gate["rule"]["metric"]]])
    _check_data(job)
    listener.tell("stage", stage="training")
    result = run_training(job.run, resume=True, report=_reporter(listener, pace), should_stop=listener.should_stop)
    evaluation = None
    if job.evaluation is not None and metrics is not None:
        listener.tell("stage", stage="evaluating")
        with named_failures("a smaller evaluation limit needs less"):
            evaluation = _evaluated(folder, job, result, metrics, job.evaluation, listener)
    gate = None
    if job.gate is not None:
        listener.tell("stage", stage="gating")
        with named_failures("fewer inputs of the gate need less"):
            gate = gated(folder, job.gate, job.run, result.artifact, job.threads, _scored(listener))
    listener.tell("stage", stage="reporting")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    seconds, tokens = result.record["seconds"], result.record["tokens"]
    speed = {"tokens_per_second": round(tokens / seconds, 1)} if seconds else {}
    cost = {"seconds": seconds, "tokens": tokens, **speed, "peak_memory_bytes": peak}
    write_reports(folder, report_of(folder, evaluation, task=job.task, cost=cost, gate=gate))
    record = dict(result.record)
    if evaluation is not None:
        record = record | evaluation.record(record)
    if gate is not None:
        record["gate"] = gate
    write_json(folder / RECORD, record)
    return result.version


def read_request(folder: Path) -> JobRequest:
    """Read the request that the worker wrote."""
    values = json.loads((folder / REQUEST).read_text())
    # A resumed run keeps its first dtype and autocast, even if this machine would choose others.
    run, start = {**values["run"], **begun_with(folder)}, folder / START
    config, validation, auto = run["config"], run["validation"], run.get("auto")
    return JobRequest(
        values["task"],
        RunRequest(
            **run
            | {
                "data": Path(run["data"]),
                "validation": None if validation is None else Path(validation),
                "output": folder,
                "config": TrainConfig(**config | {"sites": tuple(config["sites"])}),
                "auto": None if auto is None else Auto(**auto),
                "initial": _initial(values["start_text"], start),
                "device": _device(run["device"]),
            }
        ),
        values["evaluation"],
        values["threads"],
        values.get("gate"),
    )


def _initial(text: str | None, version: Path) -> Initial | None:
    if text is not None:
        return InitialText(text)
    return InitialVersion.read(version.read_bytes()) if version.exists() else None


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _metrics(how: Mapping[str, Any]) -> Sequence[str]:
    """Return the named metrics, or those of the preset that this machine can compute.

    Raises ScorerMissing for a named metric that it cannot compute.
    """
    preset = preset_of(how["preset"])
    if how["metrics"]:
        return metrics_of(preset, how["metrics"])
    try:
        return metrics_of(preset, ())
    except ScorerMissing:
        return [name for name in preset.metrics if name not in NEED_JAVA]


def _check_data(job: JobRequest) -> None:
    """Raise InvalidData if a file's digest is not that of the job's dataset."""
    for path in filter(None, (job.run.data, job.run.validation, _gate_data(job))):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != path.stem:
            raise InvalidData(f"dataset: expected sha256:{path.stem}, found sha256:{found}: the file is damaged")


def _gate_data(job: JobRequest) -> Path | None:
    return Path(job.gate["data"]) if job.gate is not None and job.gate["data"] is not None else None


def _scored(listener: Listener) -> Report:
    """Tell how many outputs there are. Raises TrainingStopped."""

    def report(done: int, total: int) -> None:
        if listener.should_stop():
            raise TrainingStopped("stopped while its outputs were scored")
        listener.tell("progress", evaluated=done, inputs=total)

    return report


def _reporter(listener: Listener, pace: Pace) -> Any:
    told = 0.0

    def report(progress: Progress) -> None:
        nonlocal told
        speeds = pace.at(progress.step, progress.tokens, progress.total)
        measured = progress.validation_loss
        if measured is None and progress.step < progress.total and time.monotonic() - told < PROGRESS_INTERVAL_S:
            return
        told = time.monotonic()
        validation = {} if measured is None else {"validation_loss": measured}
        trial = {} if progress.trial is None else {"trial": progress.trial}
        listener.tell(
            "progress",
            step=progress.step, total=progress.total, epoch=progress.epoch, loss=progress.loss,
            learning_rate=progress.learning_rate, tokens=progress.tokens, **trial, **validation, **speeds,
        )  # fmt: skip

    return report


def _evaluated(
    folder: Path,
    job: JobRequest,
    result: RunResult,
    metrics: Sequence[str],
    how: Mapping[str, Any],
    listener: Listener,
) -> Evaluation | None:
    """Score on the held-out data, or read the scores of an earlier process. None if nothing was held out."""
    path, run = folder / EVALUATION, job.run
    if path.exists():
        return Evaluation.from_dict(json.loads(path.read_text()))
    _, data = read_datasets(run)
    if not data.examples:
        return None
    backbone = load_backbone(
        run.backbone, dtype=getattr(torch, run.dtype), device=run.device,
        ignore_generation_config=run.ignore_generation_config,
    )  # fmt: skip

    made = evaluate(
        backbone, read_prefix(result.artifact), data,
        preset=how["preset"], metrics=metrics, limit=how["limit"], truncate=run.truncate, threads=job.threads,
        report=_scored(listener),
    )  # fmt: skip
    write_json(path, made.as_dict())
    return made
