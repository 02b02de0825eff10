"""One training run and its result folder: reads, tokenises, trains, folds, writes.

Owns the folder (``config.json``, ``metrics.jsonl``, ``loss.png``, ``prefix.safetensors``, ``report.json``, and a
checkpoint while it runs); knows neither terminal nor registry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.backbone import load_backbone
from prefixes.errors import BackboneError, InvalidParameter
from prefixes.files import write_bytes, write_json, write_text
from prefixes.spec import PrefixSpec, split_template
from prefixes.spec_json import spec_to_dict
from server.engine.kernels.dense import DenseKernels
from server.engine.models import load_model
from server.parameters import WITHOUT_LIMITS, check_defaults
from trainer.data.dataset import Dataset, read_dataset
from trainer.data.seen import SeenInputs, seen_by
from trainer.data.sequences import tokenize
from trainer.reports.plot import plot_losses
from trainer.training.checkpoint import CheckpointError
from trainer.training.config import TrainConfig
from trainer.training.export import Provenance, fold, origin_of
from trainer.training.failures import named_failures
from trainer.training.initial import Initial, InitialVersion
from trainer.training.loop import Progress, Trainer
from trainer.training.plan import plan_prefix
from trainer.training.resume import check_folder, check_identity

DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
PLOT_EVERY_S: Final = 20.0  # least time between two plots: drawing takes longer than a step


@dataclass(frozen=True)
class RunRequest:
    """Everything that decides the result. Without ``validation``, ``hold_out`` percent of the inputs validate.

    ``initial`` is a text or version to start from, in place of ``config.init``. ``autocast``: matrix products in
    bfloat16, the rest in float32; None means yes for a float32 model on a GPU, else no.
    """

    data: Path
    backbone: str
    template: str | None  # None: the backbone's usual one
    output: Path
    config: TrainConfig
    validation: Path | None = None
    hold_out: int = 5
    gate_hold_out: int = 0  # percent of the inputs that are for a gate alone
    defaults: Mapping[str, Any] = field(default_factory=dict)
    drop_long: bool = False
    truncate: bool = False  # cut inputs that are too long
    device: str = "cpu"
    dtype: str = "float32"
    autocast: bool | None = None
    initial: Initial | None = None
    ignore_generation_config: Sequence[str] = ()  # fields of the backbone's

    def __post_init__(self) -> None:
        if self.template is not None:
            split_template(self.template)
        check_defaults(self.defaults, {}, WITHOUT_LIMITS)
        if self.dtype not in DTYPES:
            raise InvalidParameter(f"dtype: expected {' or '.join(DTYPES)}, got {self.dtype!r}", got=self.dtype)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch built without it
            reason = str(error).splitlines()[0][:120]
            raise InvalidParameter(f"device {self.device!r}: expected one that torch has here, got: {reason}") from None
        default = torch.device(self.device).type == "cuda" and self.dtype == "float32"
        object.__setattr__(self, "autocast", default if self.autocast is None else self.autocast)
        if self.autocast and self.dtype != "float32":
            raise InvalidParameter(f"autocast: expected a float32 model to compute in bfloat16, got {self.dtype}")
        if self.initial is not None and self.config.init != "random":
            raise InvalidParameter("init: expected words, or a text or version to start from, got both")

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a text or version to start from is named by its digest."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        # A run may move to other folders and devices. The fingerprint in its identity names the backbone.
        for place in ("output", "backbone", "device", "ignore_generation_config"):
            del plain[place]
        if not self.gate_hold_out:
            del plain["gate_hold_out"]  # as in the runs of a release without it
        paths = {name: None if plain[name] is None else plain[name].name for name in ("data", "validation")}
        initial = None if self.initial is None else self.initial.as_dict()
        return plain | paths | {"config": self.config.as_dict(), "defaults": dict(self.defaults), "initial": initial}


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
) -> RunResult:
    """Run to the end. With ``resume``, continue a killed run, or read back a finished one.

    A missing folder is made once. If it is moved away meanwhile, the next write raises FileNotFoundError.
    ``accept`` sees the plan before anything is trained and raises what speaks against it. ``should_stop`` is asked
    before every step. Raises RunExists for a folder with a run unless ``resume``,
    CheckpointError for another configuration, backbone or data, TrainingStopped, OutOfMemory, DiskFull. The last
    checkpoint stays, and ``resume`` continues from it.
    """
    micro_batch = -(-request.config.batch_size // request.config.accumulate)
    advice = f"this run takes {micro_batch} sequences at a time: a larger accumulate, a smaller batch_size or "
    with named_failures(advice + "checkpoint_activations need less"):
        return _run(request, resume, accept, report, should_stop)


def _run(
    request: RunRequest,
    resume: bool,
    accept: Callable[[PrefixSpec], None],
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> RunResult:
    folder = request.output
    check_folder(folder, request.as_dict(), resume)
    found = folder.is_dir()
    train_set, validation_set = read_datasets(request)
    backbone = load_backbone(
        request.backbone, dtype=getattr(torch, request.dtype), device=request.device,
        ignore_generation_config=request.ignore_generation_config,
    )  # fmt: skip
    if not backbone.eos_token_ids:
        raise BackboneError(f"backbone {request.backbone!r}: expected an end-of-text token to learn, got none")
    plan = plan_prefix(request.config, backbone, request.template, request.defaults)
    # What no artifact can hold is refused now, not after the last step.
    spec_to_dict(replace(plan, origin={"hyperparameters": request.config.as_dict(), "backbone": request.backbone}))
    accept(plan)
    identity = {
        "backbone": backbone.spec.fingerprint,
        "template": plan.template,
        "data": train_set.digest,
        "validation": validation_set.digest,
    }
    if request.initial is not None:
        request.initial.check(backbone, plan)
        identity["initial"] = json.dumps(request.initial.as_dict(), sort_keys=True)
    if (folder / "report.json").exists():
        check_identity(folder, identity)
        return read_result(folder)
    rules = {"drop_long": request.drop_long, "truncate": request.truncate}
    train, validation = (tokenize(backbone, plan, data, **rules) for data in (train_set, validation_set))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", request.as_dict())
    autocast = torch.bfloat16 if request.autocast else None
    trainer = Trainer(
        request.config,
        plan,
        backbone,
        load_model(backbone, DenseKernels(autocast)),
        train.examples,
        validation.examples,
        identity=json.dumps(identity),
        checkpoint=folder / "checkpoint.safetensors",
        initial=request.initial,
        autocast=autocast,
    )

    drawn = time.monotonic()

    def watch(progress: Progress) -> None:
        nonlocal drawn
        if progress.validation_loss is not None and time.monotonic() - drawn > PLOT_EVERY_S:
            _write_metrics(folder, trainer)
            drawn = time.monotonic()
        report(progress)

    kv = trainer.run(watch, should_stop)
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
        seen_inputs(request, train_set, validation_set),
        None if request.initial is None else request.initial.as_dict(),
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
            "seconds": round(state.seconds, 1),
            "tokens": state.tokens,
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
    """Read and validate a finished run's artifact and record. Raises CheckpointError, InvalidArtifact."""
    try:
        report = json.loads((folder / "report.json").read_text())
        artifact = (folder / "prefix.safetensors").read_bytes()
        version = report["version"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: expected a finished run, got {type(error).__name__}: {error}") from error
    read_prefix(artifact, expected_version=version)
    record = {key: report[key] for key in ("finished_at", "seconds", "tokens", "torch", "device", "scores")}
    return RunResult(artifact, version, record)


def read_datasets(request: RunRequest) -> tuple[Dataset, Dataset]:
    """Read training and validation data. The validation part is empty only for ``hold_out`` 0.

    Raises InvalidParameter if there are too few inputs for both parts.
    """
    everything, _ = read_dataset(request.data).split_gate(request.gate_hold_out)
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


def seen_inputs(request: RunRequest, *data: Dataset) -> SeenInputs:
    """The inputs of the ``data`` that a run trains and validates on, and those of the version that it starts from."""
    seen = SeenInputs.of(example.input for part in data for example in part.examples)
    if isinstance(request.initial, InitialVersion):
        return seen.with_start(seen_by(request.initial.prefix.spec.origin))
    return seen


def _write_metrics(folder: Path, trainer: Trainer) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in trainer.state.metrics)
    write_text(folder / "metrics.jsonl", lines)
    plot_losses(folder / "loss.png", trainer.state.metrics)
