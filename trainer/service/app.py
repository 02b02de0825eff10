"""The trainer's applications: routes, middleware and error handlers around one runtime.

Owns which routes are public and which are on the admin port; knows no process, socket or signal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI

from server.parameter_schemas import documented_limits
from server.parameters import WITHOUT_LIMITS
from server.web.authentication import install_access
from server.web.bodies import BodyMiddleware
from server.web.error_handlers import install_error_handlers
from server.web.http_metrics import HttpMetrics
from server.web.intake import Intake
from server.web.middleware import RequestMiddleware
from server.web.openapi import DocumentedAPI
from server.web.version import package_version
from trainer.service.routes import datasets, jobs, operations
from trainer.service.runtime import TrainerRuntime
from trainer.service.schemas import DatasetsQuery, Evaluation, Hyperparameters, JobBody, JobsQuery
from trainer.service.settings import TrainerSettings

FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "/jobs": frozenset(JobBody.model_fields) | frozenset(JobsQuery.model_fields),
    "/datasets": frozenset(DatasetsQuery.model_fields),
    "hyperparameters": frozenset(Hyperparameters.model_fields),
    "evaluation": frozenset(Evaluation.model_fields),
}


def create_public(runtime: TrainerRuntime, intake: Intake) -> FastAPI:
    """The public API."""
    app = DocumentedAPI(
        settings=_documented(runtime.settings),
        title="prefixd trainer",
        summary="Upload data, submit a job, watch it, serve the result.",
        version=package_version(),
    )
    for router in (datasets.router, jobs.router, operations.public, operations.probes):
        app.include_router(router)
    _install(app, runtime, intake, HttpMetrics(runtime.metrics))
    return app


def create_admin(runtime: TrainerRuntime, intake: Intake) -> FastAPI:
    """The application of the admin port. Only the probes are in the public one too."""
    app = DocumentedAPI(
        settings=_documented(runtime.settings),
        title="prefixd trainer admin",
        version=package_version(),
        docs_url=None,
        redoc_url=None,
    )
    for router in (operations.admin, operations.probes):
        app.include_router(router)
    _install(app, runtime, intake, None)  # probes and scrapes do not count as traffic
    return app


def _documented(settings: TrainerSettings) -> dict[str, dict[str, Any]]:
    """This trainer's names, in the words of its documents."""
    return {**documented_limits(WITHOUT_LIMITS), "backbones": {"enum": list(settings.backbones)}}


def _install(app: FastAPI, runtime: TrainerRuntime, intake: Intake, metrics: HttpMetrics | None) -> None:
    app.state.runtime = runtime
    settings = runtime.settings
    install_error_handlers(app, FIELDS)
    app.add_middleware(
        BodyMiddleware,
        intake=intake, max_bytes=settings.max_body_bytes, uploads={"/datasets": settings.max_dataset_bytes},
        upload_timeout_s=settings.upload_timeout_s,
    )  # fmt: skip
    install_access(app, runtime.keyring, settings)
    app.add_middleware(  # added last, runs first
        RequestMiddleware, intake=intake, metrics=metrics, access_log=settings.access_log
    )
