"""One training run and its result folder: read, tokenise, train, fold, write.

Owns the folder (``config.json``, ``metrics.jsonl``, ``loss.png``, ``prefix.safetensors``, ``report.json``, and a
checkpoint while it runs); knows neither terminal nor registry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.backbone import load_backbone
from prefixes.errors import BackboneError, InvalidParameter, PrefixdError
from prefixes.spec import split_template
from server.engine.kernels.torch_reference import TorchKernels
from server.engine.models import load_model
from trainer.checkpoint import CheckpointError
from trainer.config import TrainConfig
from trainer.data import Dataset, read_dataset
from trainer.export import Provenance, fold, origin_of
from trainer.files import write_bytes, write_json, write_text
from trainer.loop import Progress, Trainer
from trainer.plan import plan_prefix
from trainer.plot import plot_losses
from trainer.sequences import tokenize

DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
PLOT_EVERY_S: Final = 20.0  # drawing takes longer than a step


class RunExists(PrefixdError):
    """The result folder already holds a run."""

    code = "conflict"


@dataclass(frozen=True)
class RunRequest:
    """Everything that decides the result. ``hold_out`` percent of the inputs validate where no file is given."""

    data: Path
    backbone: str
    template: str | None  # None: the backbone's usual one
    output: Path
    config: TrainConfig
    validation: Path | None = None
    hold_out: int = 5
    defaults: Mapping[str, Any] = field(default_factory=dict)
    drop_long: bool = False
    truncate: bool = False  # cut inputs that are too long
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.template is not None:
            split_template(self.template)
        if self.dtype not in DTYPES:
            raise InvalidParameter(f"dtype: expected {' or '.join(DTYPES)}, got {self.dtype!r}", got=self.dtype)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch built without it
            reason = str(error).splitlines()[0][:120]
            raise InvalidParameter(f"device {self.device!r}: expected one that torch has here, got: {reason}") from None

    def as_dict(self) -> dict[str, Any]:
        plain = asdict(self) | {"data": str(self.data), "output": str(self.output)}
        return plain | {"validation": None if self.validation is None else str(self.validation)}


@dataclass(frozen=True)
class RunResult:
    """A finished run: its artifact and the record to publish beside it."""

    artifact: bytes
    version: str
    record: Mapping[str, Any]


def run_training(
    request: RunRequest, *, resume: bool = False, report: Callable[[Progress], None] = lambda _: None
) -> RunResult:
    """Run to the end. With ``resume`` go on where a killed run stopped; a finished one is read back.

    Raises RunExists for a folder with a run unless ``resume``, CheckpointError for one of another configuration,
    backbone or data.
    """
    folder = request.output
    _check_folder(request, resume)
    train_set, validation_set = _datasets(request)
    backbone = load_backbone(request.backbone, dtype=getattr(torch, request.dtype), device=request.device)
    if not backbone.eos_token_ids:
        raise BackboneError(f"backbone {request.backbone!r}: expected an end-of-text token to learn, got none")
    plan = plan_prefix(request.config, backbone, request.template, request.defaults)
    identity = {
        "backbone": backbone.spec.fingerprint,
        "template": plan.template,
        "data": train_set.digest,
        "validation": validation_set.digest,
    }
    if (folder / "report.json").exists():
        _check_identity(folder, identity)
        return read_result(folder)
    rules = {"drop_long": request.drop_long, "truncate": request.truncate}
    train, validation = (tokenize(backbone, plan, data, **rules) for data in (train_set, validation_set))
    write_json(folder / "config.json", request.as_dict())
    started = time.monotonic()
    trainer = Trainer(
        request.config,
        plan,
        backbone,
        load_model(backbone, TorchKernels()),
        train.examples,
        validation.examples,
        identity=json.dumps(identity),
        checkpoint=folder / "checkpoint.safetensors",
    )

    drawn = started

    def watch(progress: Progress) -> None:
        nonlocal drawn
        if progress.validation_loss is not None and time.monotonic() - drawn > PLOT_EVERY_S:
            _write_metrics(folder, trainer)
            drawn = time.monotonic()
        report(progress)

    kv = trainer.run(watch)
    _write_metrics(folder, trainer)
    state = trainer.state
    provenance = Provenance(
        train_set.digest,
        len(train.examples),
        train.cut,
        validation_set.digest if validation.examples else None,
        len(validation.examples),
        state.step,
        state.best_step or state.step,
    )
    origin = origin_of(request.config, provenance, request.backbone)
    prefix = fold(kv, plan, origin)
    artifact = write_prefix(prefix)
    write_bytes(folder / "prefix.safetensors", artifact)
    write_json(
        folder / "report.json",
        {
            "version": version_of(prefix),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 1),
            "torch": torch.__version__,
            "device": request.device,
            "identity": identity,
            "dropped": {"train": train.dropped, "validation": validation.dropped},
            "cut": {"train": train.cut, "validation": validation.cut},
            "initialisation_error": state.initial_error,
            "scores": {"validation_loss_per_token": state.best_loss, "final_loss": state.metrics[-1]["loss"]},
            "origin": origin,
        },
    )
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return read_result(folder)


def read_result(folder: Path) -> RunResult:
    """A finished run's artifact and record, validated. Raises CheckpointError, InvalidArtifact."""
    try:
        report = json.loads((folder / "report.json").read_text())
        artifact = (folder / "prefix.safetensors").read_bytes()
        version = report["version"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: expected a finished run, got {type(error).__name__}: {error}") from error
    read_prefix(artifact, expected_version=version)
    record = {key: report[key] for key in ("finished_at", "seconds", "torch", "device", "scores")}
    return RunResult(artifact, version, record)


def _check_folder(request: RunRequest, resume: bool) -> None:
    """Raise unless the folder is free, or holds this very run and ``resume`` is asked for."""
    path, wanted = request.output / "config.json", json.loads(json.dumps(request.as_dict()))
    if not path.exists():
        return
    if not resume:
        raise RunExists(f"{request.output} holds a run already: --resume goes on with it, --output takes another")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if different:
        pairs = ", ".join(f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}" for key in different)
        raise CheckpointError(f"{request.output}: cannot resume with other options: {pairs}", different=different)


def _check_identity(folder: Path, wanted: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the finished run in ``folder`` was of this backbone, template and data."""
    path = folder / "report.json"
    try:
        found = json.loads(path.read_text())["identity"]
        different = sorted(name for name in wanted if wanted[name] != found[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the identity of backbone and data, got none (a run of an older version, or a damaged "
            "report): it cannot be told whether it is this run; --output takes another folder"
        ) from error
    if different:
        pairs = ", ".join(f"{name}: expected {found[name]!r}, got {wanted[name]!r}" for name in different)
        raise CheckpointError(f"{folder}: cannot resume, the finished run was of others; {pairs}", different=different)


def _datasets(request: RunRequest) -> tuple[Dataset, Dataset]:
    """Training and validation data; the validation part is empty only for ``hold_out`` 0.

    Raises InvalidParameter where the inputs are so few that one of the parts would be empty.
    """
    everything = read_dataset(request.data)
    if request.validation is not None:
        return everything, read_dataset(request.validation)
    train, held_out = everything.split(request.hold_out)
    if not train.examples or (request.hold_out and not held_out.examples):
        inputs = len({example.input for example in everything.examples})
        raise InvalidParameter(
            f"hold_out: expected both sides of the split to get some of the {inputs} inputs of {everything.name}, got "
            f"none to {'validate on' if train.examples else 'train on'} with {request.hold_out} percent; give "
            "--validation FILE, or --hold-out 0 to keep the last prefix unvalidated",
            got=request.hold_out,
        )
    return train, held_out


def _write_metrics(folder: Path, trainer: Trainer) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in trainer.state.metrics)
    write_text(folder / "metrics.jsonl", lines)
    plot_losses(folder / "loss.png", trainer.state.metrics)
