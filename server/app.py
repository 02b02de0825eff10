"""The application: routes, middleware and error handlers around one assembled server.

Owns their order and the engine's life within the event loop; knows no process, socket or signal.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

import anyio
from fastapi import FastAPI

from server.assembly import Assembled
from server.engine.async_engine import AsyncEngine
from server.error_handlers import install_error_handlers
from server.http_metrics import HttpMetrics
from server.metrics import EngineStateCollector
from server.middleware import BodyLimitMiddleware, RequestMiddleware
from server.parameters import ParameterLimits
from server.routes import generate, openai, operations, prefixes
from server.runtime import MAX_UPLOADS_AT_ONCE, Runtime
from server.service import GenerationService
from server.settings import Settings


def create_app(assembled: Assembled) -> FastAPI:
    """The ASGI application; its lifespan starts and stops the engine's thread."""
    settings = assembled.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = AsyncEngine.start(assembled.engine, settings.max_waiting)
        try:
            app.state.runtime = _runtime(assembled, engine)
            yield
        finally:
            await engine.close()
            assembled.registry.close()

    app = FastAPI(
        title="prefixd",
        summary="Many prefix-tuned tasks, one frozen backbone, one forward pass.",
        version=_version(),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    for module in (generate, prefixes, openai, operations):
        app.include_router(module.router)
    install_error_handlers(app)
    app.add_middleware(
        BodyLimitMiddleware, max_bytes=settings.max_body_bytes, max_upload_bytes=settings.max_upload_bytes
    )
    app.add_middleware(  # added last, runs first
        RequestMiddleware, metrics=HttpMetrics(assembled.metrics_registry), access_log=settings.access_log
    )
    return app


def _runtime(assembled: Assembled, engine: AsyncEngine) -> Runtime:
    settings, catalog = assembled.settings, assembled.catalog
    assembled.metrics_registry.register(EngineStateCollector(engine.stats))
    for key in assembled.pinned:
        engine.pin(key)
    return Runtime(
        settings=settings,
        backbone=assembled.backbone,
        catalog=catalog,
        engine=engine,
        service=GenerationService(assembled.backbone, catalog, engine, _limits(settings)),
        metrics=assembled.metrics_registry,
        uploads=anyio.CapacityLimiter(MAX_UPLOADS_AT_ONCE),
    )


def _limits(settings: Settings) -> ParameterLimits:
    return ParameterLimits(
        default_max_new_tokens=settings.default_max_new_tokens,
        max_new_tokens=settings.max_new_tokens_limit,
        num_beams=settings.num_beams_limit,
        num_return_sequences=settings.num_return_sequences_limit,
    )


def _version() -> str:
    try:
        return version("prefixd")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
