"""The applications: routes, middleware and error handlers around one assembled server.

Owns their order, which routes are public and which are for operators, and the engine's life within the event loop.
Knows no process, socket or signal.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from fastapi import FastAPI

from prefixes.limiter.shared import SharedLimiter
from prefixes.registry.limiter import open_limiter
from server.assembly import Assembled, limits_of
from server.engine.async_engine import AsyncEngine
from server.engine.inflow import Inflow
from server.engine.step_watch import StepWatch
from server.limit_headers import HEADERS
from server.metering import UsageMeter
from server.metrics import EngineStateCollector
from server.parameter_schemas import documented_limits
from server.registry.metrics import LinkCollector
from server.request_fields import FIELDS
from server.reservations import Reservations
from server.routes import admin, audit, generate, keys, openai, operations, prefixes, task_changes, usage
from server.runtime import MAX_TRANSFERS_AT_ONCE, Runtime
from server.service import GenerationService
from server.settings import Settings
from server.tiers.metrics import TierCollector
from server.tiers.trimming import TrimSoon
from server.tokenizing import Tokenizing
from server.web.authentication import install_access
from server.web.bodies import BodyMiddleware
from server.web.error_handlers import install_error_handlers
from server.web.http_metrics import HttpMetrics
from server.web.intake import Intake
from server.web.middleware import RequestMiddleware
from server.web.openapi import DocumentedAPI
from server.web.upload_places import UploadPlaces
from server.web.version import package_version


@dataclass(frozen=True)
class Applications:
    """Two ASGI applications on one runtime. The public one's lifespan starts and stops the engine's thread."""

    public: FastAPI
    admin: FastAPI
    intake: Intake


def create_apps(assembled: Assembled) -> Applications:
    """The public application, and the admin application for a port of its own. Only the latter has ``routes.admin``."""
    intake = Intake(assembled.settings.body_timeout_s, assembled.settings.max_unfinished_bytes)
    public = _create_public(assembled, intake)
    return Applications(public, _create_admin(assembled, intake, public), intake)


def _create_public(assembled: Assembled, intake: Intake) -> FastAPI:
    settings = assembled.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop, link, changed = asyncio.get_running_loop(), assembled.link, assembled.catalog.changed
        link.start(lambda tenant, name: _hand_over(loop, changed, tenant, name))
        for key, spec in assembled.pinned.items():
            assembled.engine.pin(key, spec)
        inflow = Inflow(settings.max_waiting, settings.waiting_per_tenant, assembled.keyring.limits_of)
        meter = UsageMeter(link.registry.usage, settings.usage_flush_s)
        engine = AsyncEngine.start(assembled.engine, inflow, StepWatch(settings.step_timeout_s), meter.ended)
        meter.start()
        assembled.keyring.start()
        limiter = await anyio.to_thread.run_sync(
            partial(open_limiter, settings.registry, link.registry.usage, service="server")
        )
        reservations = Reservations(limiter, assembled.keyring)
        assembled.metrics_registry.register(
            LinkCollector(
                link.state, lambda: meter.recorded, lambda: limiter.up if isinstance(limiter, SharedLimiter) else True
            )
        )
        keeping = [asyncio.create_task(keep()) for keep in (assembled.catalog.keep_known, reservations.keep)]
        assembled.denials.start()
        try:
            app.state.runtime = _runtime(assembled, engine, reservations)
            yield
        finally:
            for task in keeping:
                task.cancel()
            await engine.close()
            await reservations.close()
            await anyio.to_thread.run_sync(meter.close)
            await anyio.to_thread.run_sync(assembled.denials.close)
            await anyio.to_thread.run_sync(assembled.keyring.close)
            await anyio.to_thread.run_sync(link.close)
            link.registry.close()

    app = DocumentedAPI(
        settings=_documented(assembled),
        title="prefixd",
        summary="Many prefix-tuned tasks, one frozen backbone, one forward pass.",
        version=package_version(),
        lifespan=lifespan,
    )
    for module in (generate, prefixes, task_changes, openai, keys, audit, usage, operations):
        app.include_router(module.router)
    _install(app, assembled, intake, HttpMetrics(assembled.metrics_registry))
    return app


def _create_admin(assembled: Assembled, intake: Intake, public: FastAPI) -> FastAPI:
    app = DocumentedAPI(
        settings=_documented(assembled), title="prefixd admin", version=package_version(), docs_url=None, redoc_url=None
    )
    app.state = public.state  # the runtime, once the public application's lifespan has made it
    for module in (operations, admin):
        app.include_router(module.router)
    _install(app, assembled, intake, None)  # probes and scrapes do not count as traffic
    return app


def _install(app: FastAPI, assembled: Assembled, intake: Intake, metrics: HttpMetrics | None) -> None:
    settings = assembled.settings
    install_error_handlers(app, FIELDS)
    app.add_middleware(
        BodyMiddleware,
        intake=intake, max_bytes=settings.max_body_bytes, uploads={"/prefixes": settings.max_upload_bytes},
        upload_timeout_s=settings.upload_timeout_s,
    )  # fmt: skip
    install_access(app, assembled.keyring, settings, HEADERS)
    app.add_middleware(  # added last, runs first
        RequestMiddleware,
        intake=intake, metrics=metrics, access_log=settings.access_log, denials=assembled.denials,
    )  # fmt: skip


def _documented(assembled: Assembled) -> dict[str, dict[str, Any]]:
    """This server's limits and names, in the words of its documents."""
    settings = assembled.settings
    return {
        **documented_limits(limits_of(settings)),
        "items": {"maxItems": settings.max_batch_items},
        "backbone_name": {"const": settings.backbone_name},
    }


def _runtime(assembled: Assembled, engine: AsyncEngine, reservations: Reservations) -> Runtime:
    settings, catalog = assembled.settings, assembled.catalog
    assembled.metrics_registry.register(
        EngineStateCollector(engine.stats, lambda: engine.step_running_s, assembled.engine_metrics.tenant_label)
    )
    assembled.metrics_registry.register(TierCollector(assembled.tiers.stats, engine.stats))
    return Runtime(
        settings=settings,
        backbone=assembled.backbone,
        catalog=catalog,
        keyring=assembled.keyring,
        tiers=assembled.tiers,
        engine=engine,
        service=GenerationService(
            assembled.backbone, catalog, engine, limits_of(settings), _tokenizing(settings), reservations
        ),
        metrics=assembled.metrics_registry,
        uploads=UploadPlaces(settings.max_uploads, settings.max_uploads_of_a_tenant, settings.body_timeout_s),
        transfers=anyio.CapacityLimiter(MAX_TRANSFERS_AT_ONCE),
        trim_soon=TrimSoon(),
        prices=assembled.prices,
    )


def _hand_over(
    loop: asyncio.AbstractEventLoop, changed: Callable[[str, str], None], tenant: str, name: str
) -> None:
    """Tell the event loop of a change that was announced to another thread."""
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(changed, tenant, name)


def _tokenizing(settings: Settings) -> Tokenizing:
    return Tokenizing(settings.tokenizer_threads, settings.max_input_bytes, settings.max_waiting)
