"""What tests of copies and backups start from: places of either kind, and registries that are closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from prefixes.registry import open_registry
from prefixes.registry.base import Store
from tests.support.places import Places, redis_server
from tests.support.redis_server import RedisServer


@pytest.fixture(params=["disk", "redis"], scope="module")
def server_of_places(request: pytest.FixtureRequest) -> Iterator[RedisServer | None]:
    with redis_server(request.param) as found:
        yield found


@pytest.fixture
def places(server_of_places: RedisServer | None, tmp_path: Path) -> Places:
    return Places(tmp_path, server_of_places)


@pytest.fixture
def opened() -> Iterator[Callable[..., Store]]:
    with ExitStack() as stack:
        yield lambda place, **options: stack.enter_context(closing(open_registry(place.url, **options)))
