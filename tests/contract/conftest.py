"""Every store there is, empty, for the tests of what all of them promise. A new one joins by a parameter of ``url``.

``stored`` gives what an earlier commit left in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import pytest

from prefixes.limiter.base import Limiter
from prefixes.limiter.memory import MemoryLimiter
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.registry.redis.limiter import RedisLimiter
from prefixes.registry.redis.url import parse_redis_url
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_sentinel import RedisSentinel
from tests.support.redis_server import SERVERS, RedisServer
from tests.support.redis_users import RedisWithUsers
from tests.support.stored import Stored

NOON: Final = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()


class Place(Protocol):
    """A Redis of any kind."""

    @property
    def url(self) -> str: ...

    def flush(self) -> None: ...


@pytest.fixture(scope="module")
def shared() -> Iterator[Callable[[str], Place]]:
    """One server of a kind for the module, started when it is first asked for; every test finds it empty."""
    with ExitStack() as stack:
        places: dict[str, Place] = {}

        def place(kind: str) -> Place:
            if kind not in places:
                made: dict[str, Callable[[], AbstractContextManager[Place]]] = {
                    "cluster": RedisCluster,
                    "sentinel": RedisSentinel,
                    "users": RedisWithUsers,
                }
                places[kind] = stack.enter_context(made.get(kind, lambda: RedisServer(SERVERS[kind]))())
            return places[kind]

        yield place


@dataclass
class Clock:
    """A limiter's, which a test sets."""

    now: float = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(
    params=[
        "memory",
        *SERVERS,
        pytest.param("cluster", marks=pytest.mark.slow),
        pytest.param("sentinel", marks=pytest.mark.slow),
    ]
)
def limiter(request: pytest.FixtureRequest, shared: Callable[[str], Place], clock: Clock) -> Iterator[Limiter]:
    if request.param == "memory":
        yield MemoryLimiter(clock)
        return
    place = shared(request.param)
    place.flush()
    with closing(RedisLimiter(parse_redis_url(f"{place.url}?timeout_s=20"), "test", clock)) as limiter:
        yield limiter


@pytest.fixture(
    params=[
        "disk",
        *SERVERS,
        "users",  # as the deployment's server, which has few rights
        pytest.param("cluster", marks=pytest.mark.slow),
        pytest.param("sentinel", marks=pytest.mark.slow),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path, shared: Callable[[str], Place]) -> str:
    if request.param == "disk":
        return f"disk://{tmp_path}/registry"
    place = shared(request.param)
    place.flush()
    return f"{place.url}?timeout_s=20"  # that a busy machine is slow is not what is tested


@pytest.fixture
def registry(url: str) -> Iterator[Store]:
    with closing(open_registry(url)) as registry:
        yield registry


@pytest.fixture(params=["disk", *SERVERS])
def stored(request: pytest.FixtureRequest, tmp_path: Path, shared: Callable[[str], Place]) -> Stored:
    if request.param == "disk":
        return Stored(tmp_path, None)
    server = shared(request.param)
    assert isinstance(server, RedisServer)
    return Stored(tmp_path, server)
