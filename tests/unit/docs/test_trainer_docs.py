"""docs/api.md and docs/training.md name everything that the trainer's service has."""

from __future__ import annotations

from fastapi import FastAPI

from server.web.errors import STATUSES
from tests.support.paths import ROOT
from trainer.jobs.record import STATES
from trainer.service.routes import datasets, jobs, operations
from trainer.service.schemas import Evaluation, Hyperparameters, JobBody, JobsQuery

DOCS = ROOT / "docs"
API = (DOCS / "api.md").read_text()
TRAINING = (DOCS / "training.md").read_text()
SECTION = API.partition("\n## The trainer\n")[2].partition("\n## ")[0]
FAILURES = SECTION.partition("### What a job fails with")[2]


def test_every_route_is_documented() -> None:
    app = FastAPI()
    for router in (datasets.router, jobs.router, operations.public):
        app.include_router(router)
    paths = app.openapi()["paths"].items()
    assert [f"{method.upper()} {path}" for path, methods in paths for method in methods
            if f"`{method.upper()} {path}`" not in SECTION] == []  # fmt: skip


def test_every_field_of_a_job_is_documented() -> None:
    fields = [name for model in (JobBody, Hyperparameters) for name in model.model_fields]
    assert [name for name in fields if f"`{name}`" not in SECTION] == []
    assert [name for name in Evaluation.model_fields if f'"{name}"' not in SECTION] == []
    assert [name for name in JobsQuery.model_fields if f"{name}=" not in SECTION] == []


def test_the_documented_defaults_are_the_real_ones() -> None:
    body = JobBody.model_validate({"task": "x", "dataset": f"sha256:{'0' * 64}"})
    assert body.evaluation is not None
    written = f'{{"preset": "{body.evaluation.preset}", "metrics": [], "limit": {body.evaluation.limit}}}'
    assert written in SECTION
    assert f"percent of the inputs ({body.hold_out}, at most 50)" in SECTION
    assert f"that moves to the result, `{body.alias}`" in SECTION


def test_every_state_is_documented() -> None:
    for state in STATES:
        assert f"`{state}`" in SECTION
        assert f"| `{state}` |" in TRAINING


def test_every_reason_of_the_trainers_own_is_documented() -> None:
    import prefixes.errors
    import trainer.data.errors
    import trainer.evaluation.scores.base
    import trainer.training.checkpoint
    import trainer.training.loop

    kinds = (
        trainer.data.errors.OutOfMemory, prefixes.errors.DiskFull, trainer.training.loop.TrainingDiverged,
        trainer.training.checkpoint.CheckpointError, trainer.evaluation.scores.base.ScorerMissing,
    )  # fmt: skip
    assert [kind.code for kind in kinds if f"`{kind.code}`" not in FAILURES] == []
    assert "crashed" not in STATUSES, "a failure's code is no answer's"
