"""What tests of a restore start from: two tenants with a task each, and a backup of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prefixes.registry.base import Store
from prefixes.registry.redis.registry import RedisRegistry
from tests.support.redis_registry import opened, publish
from tests.support.redis_server import RedisServer
from tests.support.restoring import back_up


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    shared.flush()
    return shared


@pytest.fixture
def registry(server: RedisServer) -> Iterator[RedisRegistry]:
    """Two tenants with a task each."""
    with opened(server.url) as registry:
        publish(registry, 0, 1, tenant="acme")
        publish(registry, 2)
        yield registry


@pytest.fixture
def backup(registry: RedisRegistry, tmp_path: Path) -> Iterator[Store]:
    with closing(back_up(registry, tmp_path)) as backup:
        yield backup
