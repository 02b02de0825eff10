"""The failure table of docs/failures.md where keys are needed: real services, on a real Redis that fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from prefixes.registry import open_registry
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.secret import new_id, new_secret
from tests.support.callers import TENANT_SCOPES, bearer
from tests.support.outage import LATE_S, arguments
from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess, TinyWorld, make_world
from tests.support.traffic import ROW, SHORT, Answer, Stream, ask, generate, publish
from tests.support.trainer_process import TrainerProcess, wait_for

STATES: Final = ("stopped", "down", "flushed")
STALE_S: Final = 2
"""``--max-stale-auth-s`` of the impatient services."""
ROW_TOKENS: Final = 40


@dataclass(frozen=True)
class Cell:
    """A request, and its status while the registry is there, is away, and is away for longer than keys work.

    ``key`` is the kind of key that it carries.
    """

    method: str
    path: str
    here: int
    away: int
    stale: int
    key: str = "tenant"
    admin: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, server: ServerProcess, secrets: Mapping[str, str]) -> Answer:
        """What the server answers."""
        headers = bearer(secrets[self.key]) if self.key else {}
        options: dict[str, Any] = {"json": self.body} if self.body else {}
        return ask(server, self.method, self.path, admin=self.admin, headers=headers, **options)


def generation(task: str | None) -> dict[str, Any]:
    return {"task": task, "input": "Blue", "parameters": SHORT}


def scrape(key: str, here: int, away: int, stale: int) -> Cell:
    return Cell("GET", "/metrics", here, away, stale, key, admin=True)


SERVER: Final[Mapping[str, Cell]] = {
    "resident": Cell("POST", "/generate", 200, 200, 503, body=generation("resident")),
    "bare backbone": Cell("POST", "/generate", 200, 200, 503, body=generation(None)),
    "no such task": Cell("POST", "/generate", 404, 503, 503, body=generation("none")),
    "promote": Cell("POST", "/prefixes/resident/promote", 404, 503, 503, body={"version": f"sha256:{'0' * 64}"}),
    "rollback": Cell("POST", "/prefixes/resident/rollback", 409, 503, 503),
    "delete": Cell("DELETE", "/prefixes/none", 404, 503, 503),
    "undelete": Cell("POST", "/prefixes/resident/undelete", 409, 503, 503),
    "list": Cell("GET", "/prefixes", 200, 503, 503),
    "models": Cell("GET", "/v1/models", 200, 503, 503),
    "inspect": Cell("GET", "/prefixes/resident", 200, 503, 503),
    "ready": Cell("GET", "/ready", 200, 200, 503, ""),
    "ready, admin port": Cell("GET", "/ready", 200, 200, 503, "", admin=True),
    "health": Cell("GET", "/health", 200, 200, 200, ""),
    "metrics": scrape("metrics", 200, 200, 200),
    "metrics, an operator's key": scrape("operator", 200, 200, 200),
    "metrics, a key without the scope": scrape("tenant", 403, 403, 403),
    "metrics, a revoked key": scrape("revoked", 401, 401, 401),
    "metrics, an unknown key": scrape("unknown", 401, 503, 503),
    "metrics, no key": scrape("", 401, 401, 401),
    "residents": Cell("GET", "/admin/residents", 200, 200, 503, "operator", admin=True),
    "a revoked key": Cell("GET", "/prefixes", 401, 401, 503, "revoked"),
    "an unknown key": Cell("GET", "/prefixes", 401, 503, 503, "unknown"),
}
TRAINER: Final[Mapping[str, Cell]] = {
    "jobs": Cell("GET", "/jobs", 200, 200, 503),
    "datasets": Cell("GET", "/datasets", 200, 200, 503),
    **{name: SERVER[name] for name in SERVER if name.startswith(("ready", "health", "metrics"))},
}


@dataclass
class Scene:
    """Redis, a ``patient`` server and trainer whose keys work for a minute without it, and ``impatient`` ones."""

    redis: RedisServer
    secrets: dict[str, str]
    patient: tuple[ServerProcess, TrainerProcess]
    impatient: tuple[ServerProcess, TrainerProcess]
    row: list[int]
    data: bytes  # a prefix
    _kept: dict[bytes, bytes] = field(default_factory=dict)  # what a flushed Redis had

    def break_down(self, state: str) -> None:
        """Redis fails, and so long ago that the impatient services can judge no key any more."""
        if state == "stopped":
            self.redis.pause()
        elif state == "down":
            self.redis.kill()
        else:
            with self.redis.client() as client:
                self._kept = {key: client.dump(key) for key in client.scan_iter() if client.ttl(key) < 0}
            self.redis.flush()
        for service in self.impatient:
            self.wait_ready(service, 503)

    def mend(self, state: str) -> None:
        """Redis is back, and all services are ready again."""
        if state == "stopped":
            self.redis.resume()
        elif state == "down":
            self.redis.start()
        else:
            with self.redis.client() as client, client.pipeline(transaction=True) as all_at_once:
                for key, value in self._kept.items():
                    all_at_once.restore(key, 0, value, replace=True)
                all_at_once.execute()
        for service in (*self.patient, *self.impatient):
            self.wait_ready(service, 200)
        for server in (self.patient[0], self.impatient[0]):  # keys and tasks are asked for by two threads
            wait_for(lambda server=server: self.up(server), LATE_S, server.log.read_text)  # type: ignore[misc]

    def up(self, server: ServerProcess) -> bool:
        """Whether the server says that its registry answers."""
        told: str = SERVER["metrics"].ask(server, self.secrets).body
        return "prefixd_registry_up 1.0" in told.splitlines()

    @staticmethod
    def wait_ready(service: ServerProcess, status: int) -> None:
        wait_for(lambda: ask(service, "GET", "/ready").status == status, LATE_S, service.log.read_text)


def make_secrets(url: str) -> dict[str, str]:
    """A secret for each kind of key."""
    with closing(open_registry(url)) as registry:
        directory = Directory(registry.tenancy)

        def made(*scopes: str) -> str:
            return directory.create_key("acme", "x", scopes, actor="t").secret

        gone = directory.create_key("acme", "x", ["metrics"], actor="t")
        directory.revoke(gone.key.id, actor="t")
        return {
            "tenant": made(*TENANT_SCOPES), "metrics": made("metrics"), "operator": made("operator"),
            "revoked": gone.secret, "unknown": new_secret(new_id()),
        }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def scene(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with RedisServer(append_only=True, config={"appendfsync": "always"}) as redis, ExitStack() as stack:
        secrets, pairs = make_secrets(redis.url), list[tuple[ServerProcess, TrainerProcess]]()
        for name, more in (("patient", ()), ("impatient", ("--max-stale-auth-s", str(STALE_S)))):
            folder = tmp_path_factory.mktemp(name)
            given = ("--registry", redis.url, *more)
            server = ServerProcess(folder, *arguments(world), *given, secret=secrets["tenant"])
            stack.enter_context(server)
            data = ("--data", str(folder / "data"), "--backbone", f"tiny={world.folder}")
            trainer = TrainerProcess(folder, *data, *given, secret=secrets["tenant"])
            stack.enter_context(trainer)
            pairs.append((server, trainer))
        for service in (service for pair in pairs for service in pair):
            service.wait_ready()
        patient, impatient = pairs
        prefix = world.prefix()
        assert publish(patient[0], "resident", prefix).status == 201
        assert publish(patient[0], "in-no-tier", world.prefix(seed=1)).status == 201
        row = generate(impatient[0], "resident", ROW).body["outputs"][0]["token_ids"]
        for server, _ in pairs:  # resolved, and not loaded: its input is too long
            assert generate(server, "in-no-tier", text="x" * 20_000).status == 422
        yield Scene(redis, secrets, patient, impatient, row, prefix)


def check(scene: Scene, service: ServerProcess, cells: Mapping[str, Cell], column: str) -> None:
    """Each cell's status, and of a 503 that it says why and when to come back."""
    for name, cell in cells.items():
        answer, wanted = cell.ask(service, scene.secrets), getattr(cell, column)
        assert answer.status == wanted, (service.command, column, name, answer)
        if wanted == 503:
            assert answer.body["error"]["code"] == "registry_unavailable", (service.command, column, name, answer)
            assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("state", STATES)
def test_services_with_keys_answer_as_the_table_says(scene: Scene, state: str) -> None:
    """Monitoring went dark with the keys, and a proxy sent everything to whoever refused it fastest."""
    for server, trainer in (scene.patient, scene.impatient):
        check(scene, server, SERVER, "here")
        check(scene, trainer, TRAINER, "here")
    with Stream(scene.impatient[0], "resident", scene.row, 8000) as kept:
        kept.wait_for(1, LATE_S)
        try:
            scene.break_down(state)
            for column, (server, trainer) in (("away", scene.patient), ("stale", scene.impatient)):
                check(scene, server, SERVER, column)
                check(scene, trainer, TRAINER, column)
                assert publish(server, "new", scene.data).status == 503
                assert generate(server, "in-no-tier").status == 503
            kept.wait_for(ROW_TOKENS, LATE_S)
            assert kept.faults == []
            assert not scene.up(scene.impatient[0])
        finally:
            scene.mend(state)
    for server, trainer in (scene.patient, scene.impatient):
        check(scene, server, SERVER, "here")
        check(scene, trainer, TRAINER, "here")
