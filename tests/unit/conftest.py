"""What several modules about the registry in Redis start from: each server that we support, empty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from prefixes.registry.redis.registry import RedisRegistry
from tests.support.redis_registry import opened
from tests.support.redis_server import SERVERS, RedisServer


@pytest.fixture(params=SERVERS, scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(SERVERS[request.param]) as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.flush()
    return running


@pytest.fixture
def registry(server: RedisServer) -> Iterator[RedisRegistry]:
    with opened(server.url) as registry:
        yield registry


@pytest.fixture
def client(server: RedisServer) -> Iterator[Any]:
    with server.client() as client:
        yield client
