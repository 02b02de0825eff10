"""The object that the trainer's routes work with, one per process, reached from the request. Knows no route."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
from fastapi import Request
from prometheus_client import CollectorRegistry

from prefixes.errors import ShuttingDown
from prefixes.tenancy.keyring import Keyring
from server.web.auth import Action, Caller, authorize, caller_of
from server.web.denials import DenialLog
from server.web.upload_places import UploadPlaces
from trainer.service.job_service import JobService
from trainer.service.settings import TrainerSettings

MAX_WRITES_AT_ONCE = 4
"""Pieces of uploads that are checked and written at once, each in a thread."""


@dataclass
class TrainerRuntime:
    """The parts that live as long as the process. The shutdown sets ``draining`` once."""

    settings: TrainerSettings
    service: JobService
    keyring: Keyring
    denials: DenialLog
    metrics: CollectorRegistry
    uploads: UploadPlaces
    writing: anyio.CapacityLimiter
    draining: bool = False

    def check_taking_work(self) -> None:
        """Raise ShuttingDown while the process drains."""
        if self.draining:
            raise ShuttingDown("the trainer is shutting down and takes no new work")


def runtime_of(request: Request) -> TrainerRuntime:
    """The runtime of the application that serves ``request``."""
    runtime: TrainerRuntime = request.app.state.runtime
    return runtime


def allowed(request: Request) -> Caller:
    """Return the caller, if it may train for its own tenant. Raises Forbidden."""
    caller = caller_of(request)
    authorize(caller, Action.TRAIN, caller.tenant)
    return caller
