"""The files in the job's folder that a worker and its training process exchange. Torch-free.

Owns these files: ``prepare`` writes everything that the process gets, ``finished`` reads its results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from prefixes.errors import BackboneError, PrefixdError
from prefixes.files import write_bytes, write_json
from prefixes.registry.base import Registry
from prefixes.spec import TaskRef
from trainer.data.store import DatasetStore
from trainer.jobs.record import Job
from trainer.service.current import fetch_current
from trainer.service.settings import TrainerSettings

REQUEST: Final = "request.json"
START: Final = "start.safetensors"
ARTIFACT: Final = "prefix.safetensors"
RECORD: Final = "record.json"
AS_ASKED: Final = ("config", "template", "hold_out", "defaults", "drop_long", "truncate")


class Unfinished(PrefixdError):
    """The process reported success, but its results are missing."""

    code = "crashed"


def prepare(job: Job, folder: Path, settings: TrainerSettings, registry: Registry) -> None:
    """Write the run's request and, for a warm start, the version to start from into ``folder``.

    Raises DatasetNotFound for deleted data, TaskNotFound and RegistryUnavailable for the version, and BackboneError if
    this worker does not have the backbone.
    """
    spec, store = job.spec, DatasetStore(settings.data)
    place = settings.backbones.get(spec["backbone"])
    if place is None:
        known = ", ".join(settings.backbones)
        raise BackboneError(f"backbone {spec['backbone']!r}: expected one of the worker's, which has {known}")
    start = folder / START
    if spec["start_from"] is not None and not start.exists():
        ref = TaskRef.parse(spec["start_from"])
        assert ref.version is not None, "the service has resolved it"
        write_bytes(start, registry.fetch(ref.tenant, ref.version))
    validation, gate_hold_out = spec["validation_dataset"], spec.get("gate_hold_out", 0)
    write_json(
        folder / REQUEST,
        {
            "tenant": job.tenant,
            "task": spec["task"],
            "evaluation": spec["evaluation"],
            "threads": settings.threads,
            "start_text": spec.get("start_text"),  # a job from an older trainer lacks the key
            "gate": _gate(job, folder, store, registry),
            "run": {
                "data": str(store.path(job.tenant, spec["dataset"])),
                "validation": None if validation is None else str(store.path(job.tenant, validation)),
                "backbone": str(Path(place).absolute()) if Path(place).is_dir() or place.endswith(".gguf") else place,
                "device": settings.device,
                "dtype": settings.dtype,
                "ignore_generation_config": settings.ignore_generation_config,
                "auto": spec.get("auto"),
                **{name: spec[name] for name in AS_ASKED},
                **({"gate_hold_out": gate_hold_out} if gate_hold_out else {}),
            },
        },
    )


def _gate(job: Job, folder: Path, store: DatasetStore, registry: Registry) -> dict[str, Any] | None:
    """What the gate is to decide, with the version that the alias points at; None for a job without a rule."""
    rule, dataset = job.spec.get("promote_if"), job.spec.get("gate_dataset")
    if rule is None:
        return None
    facts = fetch_current(folder, registry, TaskRef.parse(job.spec["task"]), job.spec["alias"])
    return {
        "rule": {"metric": rule["metric"], "margin": rule["margin"]},
        "preset": rule["preset"],
        "data": None if dataset is None else str(store.path(job.tenant, dataset)),
        "current": facts["version"],
        "moves": facts["moves"],
    }


def finished(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Read the artifact and the record to publish beside it. Raises Unfinished; the registry checks the artifact."""
    try:
        artifact = (folder / ARTIFACT).read_bytes()
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(), parse_constant=lambda _: None)
    except (OSError, ValueError) as error:
        raise Unfinished(f"expected a finished job's artifact and record, got {type(error).__name__}") from error
    return artifact, record
