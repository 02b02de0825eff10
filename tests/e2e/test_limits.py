"""Two replicas on one Redis share their callers' limits exactly and tell of them alike; and what they do without it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import httpx
import pytest

from prefixes.registry import open_registry
from prefixes.registry.redis.keys import replicas_key
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import Limits
from tests.support.callers import bearer
from tests.support.limits import set_limits
from tests.support.redis_server import RedisServer, wait_until
from tests.support.server import PLAIN, ServerProcess, make_world

BODY = {"input": "x", "parameters": {"max_new_tokens": 4, "min_new_tokens": 2}}
RESERVED = 5  # tokens


@dataclass
class Client:
    """Asks two replicas with one key, and counts what it was served."""

    secret: str
    replicas: list[ServerProcess]
    answers: list[httpx.Response] = field(default_factory=list)

    def post(self, number: int) -> httpx.Response:
        """A request to one of them, by turns."""
        url = f"{self.replicas[number % 2].url}/generate"
        answer = httpx.post(url, json=BODY, headers=bearer(self.secret), timeout=60, verify=PLAIN)
        self.answers.append(answer)
        return answer

    def refused_by(self, number: int) -> httpx.Response:
        """The first refusal of one of them."""
        for _ in range(1000):
            answer = self.post(number)
            if answer.status_code != 200:
                return answer
        raise AssertionError("nothing is refused")

    @property
    def used(self) -> int:
        return sum(sum(answer.json()["usage"].values()) for answer in self.answers if answer.status_code == 200)


@dataclass
class Deployed:
    redis: RedisServer
    replicas: list[ServerProcess]

    def client(self, tenant: str, limits: Limits) -> Client:
        """One with a key of a new tenant with these limits, of which all replicas know."""
        with closing(open_registry(self.redis.url)) as registry:
            made = Directory(registry.tenancy).create_key(tenant, "ci", ["generate"], actor="test")
            set_limits(registry.tenancy, tenants={tenant: limits})
        client = Client(made.secret, self.replicas)
        for number in range(2):
            until_told(client, number, "x-ratelimit-limit-requests", limits.requests_per_minute)
        return client

    def wait_for_replicas(self) -> None:
        """Return once each has announced itself after both had."""

        def announced() -> dict[bytes, float]:
            with self.redis.client() as redis:
                return dict(redis.zrange(replicas_key("server"), 0, -1, withscores=True))

        wait_until(lambda: len(announced()) == 2, lambda: f"expected two replicas, got {announced()}")
        before = announced()
        wait_until(
            lambda: all(at > before[name] for name, at in announced().items()), lambda: "they announce nothing"
        )


def until_told(client: Client, number: int, header: str, value: int | None) -> None:
    wait_until(lambda: client.post(number).headers.get(header) == str(value), lambda: f"{header} is not {value}")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("limits")
    world = make_world(folder / "backbone")
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(append_only=True))
        arguments = ("--backbone", str(world.folder), "--registry", redis.url, "--threads", "1", "--kernels", "torch")
        servers = []
        for number in range(2):
            (folder / str(number)).mkdir()
            servers.append(stack.enter_context(ServerProcess(folder / str(number), *arguments)))
        for server in servers:
            server.wait_ready()
        yield Deployed(redis, servers)


def test_replicas_share_a_limit_exactly_and_tell_of_it_alike(deployed: Deployed) -> None:
    client = deployed.client("acme", Limits(requests_per_minute=10**6, tokens_per_day=1000))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.post, range(400)))
    assert {answer.status_code for answer in answers} == {200, 403}
    refused = [answer for answer in answers if answer.status_code == 403]
    assert {answer.json()["error"]["code"] for answer in refused} == {"quota_exceeded"}
    assert all("x-prefixd-quota-warning" in answer.headers for answer in refused)
    for number in range(2):
        client.refused_by(number)
        assert 1000 - RESERVED < client.used <= 1000
        until_told(client, number, "x-ratelimit-remaining-tokens", 1000 - client.used)


def test_a_rate_is_shared_and_its_headers_are_alike(deployed: Deployed) -> None:
    client = deployed.client("globex", Limits(requests_per_minute=20))
    for number in range(2):
        refused = client.refused_by(number)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 3
        assert refused.headers["x-ratelimit-limit-requests"] == "20"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-reset-requests"] in {"57s", "58s", "59s", "1m0s"}


def test_without_redis_each_replica_allows_its_share_until_it_is_back(deployed: Deployed) -> None:
    client = deployed.client("initech", Limits(requests_per_minute=10**6, tokens_per_day=100))
    deployed.wait_for_replicas()
    deployed.redis.stop()
    try:
        for number in range(2):
            before = client.used
            assert client.refused_by(number).status_code == 403
            assert 50 - RESERVED < client.used - before <= 50
    finally:
        deployed.redis.start()
    for number in range(2):
        until_told(client, number, "x-ratelimit-limit-tokens", 100)
