"""Runtime: what the routes work with, one object per running server, which a request gives access to.

Owns no behaviour but ``check_taking_work``. The application's lifespan builds it from what ``assembly`` made.
"""

from __future__ import annotations

from dataclasses import dataclass

import anyio
from fastapi import Request
from prometheus_client import CollectorRegistry

from prefixes.backbone import Backbone
from prefixes.errors import ShuttingDown
from prefixes.tenancy.keyring import Keyring
from prefixes.usage.prices import PriceTable
from server.engine.async_engine import AsyncEngine
from server.registry.catalog import Catalog
from server.service import GenerationService
from server.settings import Settings
from server.tiers.tiers import PrefixTiers
from server.tiers.trimming import TrimSoon
from server.web.upload_places import UploadPlaces

MAX_TRANSFERS_AT_ONCE = 2


@dataclass(frozen=True)
class Runtime:
    """All that lives while the server serves. ``transfers`` bounds the memory that uploads and downloads take together.
    """

    settings: Settings
    backbone: Backbone
    catalog: Catalog
    keyring: Keyring
    tiers: PrefixTiers
    engine: AsyncEngine
    service: GenerationService
    metrics: CollectorRegistry
    uploads: UploadPlaces
    transfers: anyio.CapacityLimiter
    trim_soon: TrimSoon
    prices: PriceTable | None

    @property
    def backbone_name(self) -> str:
        """The name under which the bare backbone is a model."""
        return self.settings.backbone_name

    def check_taking_work(self) -> None:
        """Raise ShuttingDown while the server drains, NotReady if the engine has stopped or hangs."""
        if self.engine.draining:
            raise ShuttingDown("the server is shutting down and takes no new work")
        self.engine.check_alive()


def runtime_of(request: Request) -> Runtime:
    """The runtime of the application that serves ``request``."""
    runtime: Runtime = request.app.state.runtime
    return runtime


def request_id_of(request: Request) -> str:
    """The id that the middleware gave ``request``."""
    request_id: str = request.state.request_id
    return request_id
