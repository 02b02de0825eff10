"""Runs both applications of an assembled server in this process, without sockets.

Owns their assembly over a tiny backbone, and the clients. Knows no test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from prefixes.artifact import write_prefix
from server.app import Applications, create_apps
from server.assembly import Assembled, assemble
from server.settings import Settings
from server.web.settings_sources import load_settings
from tests.support.prefixes import make_prefix, save_tiny_gpt2


@dataclass(frozen=True)
class Served:
    """What runs, a client for each application, and the artifact of the task ``e2e``."""

    assembled: Assembled
    apps: Applications
    public: httpx.AsyncClient
    admin: httpx.AsyncClient
    data: bytes


def with_apps(tmp_path: Path, test: Callable[[Served], Coroutine[Any, Any, None]], **given: Any) -> None:
    """Run ``test`` against applications with a task ``e2e`` in their registry; ``given`` are further settings."""
    save_tiny_gpt2(tmp_path / "backbone")
    base = {"backbone": str(tmp_path / "backbone"), "registry": str(tmp_path / "registry"), "device": "cpu"}
    settings = {**base, "kv_cache_bytes": "1MiB", "kernels": "torch", "threads": 1, **given}
    assembled = assemble(load_settings(Settings, settings))
    data = write_prefix(make_prefix(assembled.backbone.spec))
    assembled.link.registry.publish("default", "e2e", data, record={})
    apps = create_apps(assembled)

    async def run() -> None:
        async with (
            apps.public.router.lifespan_context(apps.public),
            httpx.AsyncClient(transport=httpx.ASGITransport(apps.public), base_url="http://localhost") as public,
            httpx.AsyncClient(transport=httpx.ASGITransport(apps.admin), base_url="http://localhost") as admin,
        ):
            await test(Served(assembled, apps, public, admin, data))

    asyncio.run(run())
