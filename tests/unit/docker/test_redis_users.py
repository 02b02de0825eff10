"""Redis' users, from the ACL file that the setup writes: what each needs works, and nothing else does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml  # type: ignore[import-untyped]

from prefixes.errors import RegistryUnavailable
from prefixes.limiter.base import Charge, Taken, Window
from prefixes.limiter.shared import SharedLimiter
from prefixes.registry import open_registry
from prefixes.registry.limiter import open_limiter
from prefixes.registry.redis import blobs
from prefixes.registry.transfer import open_target, transfer
from prefixes.spec import TaskRef
from prefixes.tenancy.denial import Denial
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.model import Share
from prefixes.usage.model import Batch, Counts, Kind, Outcome, Subject, today
from tests.support.disk import DATA, VERSIONS
from tests.support.paths import ROOT
from tests.support.redis_server import SERVERS, wait_until
from tests.support.redis_users import USERS, WITH_USERS, RedisWithUsers, load_setup

REFUSED = (
    ("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("ACL", "LIST"), ("ACL", "SETUSER", "x", "on"),
    ("SHUTDOWN",), ("REPLICAOF", "NO", "ONE"), ("MONITOR",), ("CLIENT", "LIST"),
    ("SCRIPT", "FLUSH"), ("MIGRATE", "h", "1", "k", "0", "1"), ("SAVE",), ("CLIENT", "KILL", "TYPE", "normal"),
    ("GET", "other"), ("SET", "other", "x"), ("DEL", "other"), ("PUBLISH", "other", "x"),
    ("EVAL", "return redis.call('GET', 'other')", "0"), ("EVAL", "return redis.call('GET', KEYS[1])", "1", "other"),
    ("EVAL", "return redis.call('FLUSHALL')", "0"),
)  # fmt: skip
OF_THE_TENANCY = (
    ("HSET", "{prefixd}:tenancy", "document", "x"), ("DEL", "{prefixd}:tenancy"), ("SET", "{prefixd}:tenancy", "x"),
    ("RENAME", "{prefixd}:tenants", "{prefixd}:tenancy"), ("COPY", "{prefixd}:tenants", "{prefixd}:tenancy"),
    ("EVAL", "return redis.call('HSET', '{prefixd}:tenancy', 'document', 'x')", "0"),
    ("EVAL", "return redis.call('DEL', KEYS[1])", "1", "{prefixd}:tenancy"), ("GET", "{prefixd}:other"),
)  # fmt: skip
OF_JOBS = (
    ("GET", "prefixd-trainer:job:acme:x"), ("LRANGE", "saq:prefixd-trainer:queued", "0", "-1"),
    ("PUBLISH", "prefixd-trainer:changed", "x"), ("SELECT", "1"),
)  # fmt: skip
OF_THE_REGISTRY = (
    ("GET", "{prefixd}:registry"), ("HGETALL", "{prefixd}:tenancy"), ("SET", "prefixd:{acme}:task:e2e", "x"),
    ("PUBLISH", "prefixd:changes", "x"),
)  # fmt: skip


ONE = Counts(jobs=1, training_steps=3)


@pytest.fixture(params=WITH_USERS, scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[RedisWithUsers]:
    with RedisWithUsers(SERVERS[request.param]) as server:
        yield server


@pytest.fixture(autouse=True)
def emptied(server: RedisWithUsers) -> None:
    server.flush()


def client(server: RedisWithUsers, user: str, password: str | None = None) -> Any:
    return redis.Redis(
        "127.0.0.1", server.port, username=user, password=password or server.passwords[user], socket_timeout=10
    )


def test_a_registry_lives_through_everything_as_its_user(
    server: RedisWithUsers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "PIECE_BYTES", 1000)
    url, told = f"{server.url}?timeout_s=20", list[str]()  # that a busy machine is slow is not what is tested
    with closing(open_registry(url)) as registry:
        assert not [line for line in registry.preflight() if "persistence" not in line]
        subscription = registry.subscribe(lambda tenant, name: told.append(f"{tenant}/{name}"))
        assert subscription is not None
        wait_until(subscription.live, lambda: "not announced")
        for data in DATA[:2]:
            registry.publish("acme", "e2e", data, record={}, idempotency_key=None)
        wait_until(lambda: "acme/e2e" in told, lambda: str(told))
        subscription.close()
        registry.promote("acme", "e2e", VERSIONS[0], alias="stable")
        registry.rollback("acme", "e2e")
        assert registry.resolve(TaskRef("acme", "e2e")).version == VERSIONS[0]
        assert registry.fetch("acme", VERSIONS[1]) == DATA[1]
        registry.delete_version("acme", "e2e", VERSIONS[1])
        registry.delete("acme", "e2e")
        registry.undelete("acme", "e2e")
        assert registry.gc(retention_s=0).failed == ()
        assert len(registry.audit("acme")) > 5 and registry.tasks("acme") and registry.tenants() == ["acme"]
        directory = Directory(registry.tenancy)
        key = directory.create_key("acme", "ci", ["read"], actor="ops").key
        directory.rotate(key.id, actor="ops")
        directory.share("acme/e2e", Share(everyone=True), actor="ops")
        registry.tenancy.note_used({key.id: "2026-01-01T00:00:00.000Z"})
        registry.tenancy.note_denials("acme", [Denial("2026-01-01T00:00:00.000Z", key.id, "", "", "", "", "")])
        assert directory.used() and registry.tenancy.denials("acme") and directory.load().shares
        with closing(open_registry(str(tmp_path / "backup"), registry_id=registry.id)) as backup:
            assert transfer(registry, backup, mirror=True).bad == 0
            server.flush()
            target = open_target(url, backup.id)
            assert target is not None
            with closing(target):
                report = transfer(backup, target)
            assert (report.bad, report.unfinished, report.keys) == (0, False, True)
        assert registry.resolve(TaskRef("acme", "e2e")).version == VERSIONS[0]


def test_a_trainer_does_its_work_as_its_user_and_makes_no_key(server: RedisWithUsers) -> None:
    with closing(open_registry(server.url)) as made:
        key = Directory(made.tenancy).create_key("acme", "ci", ["train"], actor="ops").key
    with closing(open_registry(f"{server.url_of('trainer')}?timeout_s=20")) as registry:
        subscription = registry.subscribe(lambda tenant, name: None)
        assert subscription is not None
        wait_until(subscription.live, lambda: "not announced")
        subscription.close()
        for data in DATA[:2]:
            registry.publish("acme", "e2e", data, record={}, idempotency_key="job")
        registry.publish("acme", "e2e", DATA[1], record={})
        assert registry.fetch("acme", VERSIONS[1]) == DATA[1] and registry.tenants() == ["acme"]
        registry.tenancy.note_used({key.id: "2026-01-01T00:00:00.000Z"})
        registry.tenancy.note_denials("acme", [Denial("2026-01-01T00:00:00.000Z", key.id, "", "", "", "", "")])
        registry.tenancy.note_denials(None, [Denial("2026-01-01T00:00:00.000Z", None, "", "", "", "", "")])
        ring = Keyring(registry.tenancy, 60)
        assert ring.closed and key.id in ring.known.tenancy.keys and Directory(registry.tenancy).used()
        subject = Subject(Kind.TRAINING, "acme", key.id, "acme/e2e", None, Outcome.FINISHED)
        registry.usage.add(Batch("writer", 1, today(), {subject: ONE}))
        assert [row.counts for row in registry.usage.read(today(), today())] == [ONE]
        with closing(open_limiter(server.url_of("trainer"), registry.usage, service="trainer")) as limiter:
            charge = Charge("training_steps", Window.DAY, 10, 4, key.id)
            assert isinstance(limiter, SharedLimiter)
            assert isinstance(limiter.take("acme", "job", [charge], 60), Taken) and limiter.up
            limiter.settle("acme", "job", {"training_steps": 3})
            assert limiter.up
        for change in (
            lambda: Directory(registry.tenancy).create_key("acme", "evil", ["operator"], actor="x"),
            lambda: Directory(registry.tenancy).revoke(key.id, actor="x"),
        ):
            with pytest.raises(RegistryUnavailable):
                change()
    with closing(open_registry(server.url)) as after:
        assert list(Directory(after.tenancy).load().keys) == [key.id]


@pytest.mark.parametrize(
    ("user", "refused"),
    [
        ("server", (*REFUSED, *OF_JOBS)), ("trainer", (*REFUSED, *OF_THE_TENANCY)),
        ("probe", (*REFUSED, *OF_JOBS, *OF_THE_REGISTRY)),
    ],
)
def test_what_a_user_must_not_do_is_refused(
    server: RedisWithUsers, user: str, refused: tuple[tuple[str, ...], ...]
) -> None:
    with server.client() as admin, client(server, user) as own:
        admin.set("other", "secret")
        admin.set("prefixd-trainer:job:acme:x", "record")
        assert own.ping()
        for command in refused:
            with pytest.raises(redis.ResponseError, match=r"(?i)perm|can't access|no permissions|can't run"):
                own.execute_command(*command)
        assert admin.get("other") == b"secret"


def test_no_user_opens_anothers_door_and_nobody_comes_in_without_a_password(server: RedisWithUsers) -> None:
    """One password of Redis opened everything to everybody."""
    for user in USERS:
        for other in USERS:
            with client(server, user, server.passwords[other]) as own:
                if user == other:
                    assert own.ping()
                    continue
                with pytest.raises(redis.AuthenticationError):
                    own.ping()
    with redis.Redis("127.0.0.1", server.port) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()
    with pytest.raises(RegistryUnavailable, match="refused the user or the password"):
        open_registry(f"redis://server:wrong@{server.address}/0")


def test_the_file_has_hashes_and_redis_starts_with_it(server: RedisWithUsers) -> None:
    with server.client() as admin:
        assert {line.split()[1] for line in admin.acl_list()} == set(USERS)
        listed = "\n".join(admin.acl_list())
    for password in server.passwords.values():
        assert password not in listed and hashlib.sha256(password.encode()).hexdigest() in listed
    start = (ROOT / "docker/redis/start.sh").read_text()
    assert "aclfile $users" in start and "users=/run/prefixd/secrets/users.acl" in start
    assert "requirepass" not in start + (ROOT / "docker/redis/redis.conf").read_text(), "it does not count beside users"


def test_every_user_is_a_services_and_every_service_that_asks_redis_is_a_user() -> None:
    setup, compose = load_setup(), yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert set(setup.USERS) == set(USERS)
    asked = {}
    for name, service in compose["services"].items():
        urls = [value for value in (service.get("environment") or {}).values() if str(value).startswith("redis://")]
        users = {url.partition("://")[2].partition("@")[0] for url in urls}
        assert "" not in users and all(f"redis_{user}_password" in url for url in urls for user in users)
        if users:
            asked[name] = users
    assert asked == {"identity": {"server"}, "server": {"server"}, "trainer": {"trainer"}}
    (probe,) = [part for part in compose["services"]["redis"]["healthcheck"]["test"] if "redis-cli" in part]
    assert "--user probe" in probe and "redis_probe_password" in probe
    documented = " ".join((ROOT / "docs/deploy.md").read_text().split())
    assert f"A user needs `{setup.USERS['server'][1]}`" in documented
    assert setup.USERS["server"][1].endswith(setup.COMMANDS) and setup.COMMANDS in setup.USERS["trainer"][1]
