"""Passwords, users and TLS: whoever may not is told so at once, in words that name no host and no secret."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.spec import TaskRef
from tests.support.redis_front import Certificates
from tests.support.redis_registry import DATA, VERSIONS, opened, publish
from tests.support.redis_server import SERVERS, RedisServer

PASSWORD = "s3cr3t/p@ss:w?rd%41"
QUOTED = quote(PASSWORD, safe="")


@pytest.fixture(params=SERVERS, scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(SERVERS[request.param], password=PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def secured() -> Iterator[RedisServer]:
    with RedisServer(tls=True) as server:
        yield server


@pytest.fixture(scope="module")
def mutual() -> Iterator[RedisServer]:
    with RedisServer(tls="mutual") as server:
        yield server


def refused(url: str) -> str:
    """What is said to whoever opens ``url``."""
    with pytest.raises(RegistryUnavailable) as caught, opened(url):
        pass
    message = caught.value.message
    assert "127.0.0.1" not in message
    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))
    return message


def test_the_password_is_taken_from_the_url_or_a_file(server: RedisServer) -> None:
    for url in (
        f"redis://:{QUOTED}@{server.address}",
        f"redis://default:{QUOTED}@{server.address}/0",
        f"redis://{server.address}?password_file={server.password_file}",
    ):
        with opened(url) as registry:
            publish(registry, 0)
            assert registry.fetch("default", VERSIONS[0]) == DATA[0]
            assert "s3cr3t" not in f"{registry!r}{registry._target!r}"


def test_no_password_a_wrong_one_and_an_unknown_user_are_refused(server: RedisServer) -> None:
    for userinfo in ("", ":s3cr3t-wrong@", f"nobody:{QUOTED}@"):
        assert refused(f"redis://{userinfo}{server.address}") == "registry: Redis refused the user or the password"


def test_a_password_that_changes_under_an_open_registry_is_an_outage_until_it_is_back(server: RedisServer) -> None:
    with opened(f"redis://:{QUOTED}@{server.address}") as registry, server.client() as client:
        publish(registry, 0)
        client.config_set("requirepass", "another")
        client.client_kill_filter(_type="normal", skipme=True)
        try:
            with pytest.raises(RegistryUnavailable, match="refused the user or the password"):
                registry.resolve(TaskRef.parse("e2e"))
        finally:
            client.config_set("requirepass", PASSWORD)
        assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[0]


def test_a_user_without_dangerous_commands_can_do_everything(server: RedisServer) -> None:
    with server.client() as client:
        client.execute_command(
            "ACL", "SETUSER", "prefixd", "on", ">pw", "resetkeys", "~prefixd:*", "~{prefixd}:*", "resetchannels",
            "&prefixd:changes", "nocommands", "+@read", "+@write", "+@scripting", "+@connection", "+@pubsub",
            "+time", "-@dangerous", "+info", "+client|setname",
        )  # fmt: skip
    with opened(f"redis://prefixd:pw@{server.address}") as registry:
        publish(registry, 0, 1)
        registry.rollback("default", "e2e")
        registry.delete("default", "e2e")
        registry.gc(retention_s=0)
        registry.preflight()
        assert registry.tasks() == []


def test_a_user_who_may_not_announce_changes_makes_them_nevertheless(server: RedisServer) -> None:
    """New users have no channels. The change was made, its announcement refused, and the writer told "no"."""
    with server.client() as client:
        client.flushall()
        client.execute_command("ACL", "SETUSER", "silent", "on", ">pw", "~*", "+@all", "resetchannels")
    with opened(f"redis://silent:pw@{server.address}") as registry:
        publish(registry, 0, 1)
        assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]
        assert len(registry.audit("default")) == 3


def test_tls_with_the_authority_that_signed(secured: RedisServer) -> None:
    assert secured.certificates is not None
    with opened(f"{secured.url}?ca_certs={secured.certificates.ca_certs}") as registry:
        publish(registry, 0)
        assert registry.fetch("default", VERSIONS[0]) == DATA[0]


def test_tls_without_it_is_refused_by_us(secured: RedisServer) -> None:
    assert "certificate" in refused(secured.url)


def test_tls_of_another_authority_or_for_another_host_is_refused_by_us(secured: RedisServer, tmp_path: Path) -> None:
    assert secured.certificates is not None
    assert "certificate" in refused(f"{secured.url}?ca_certs={Certificates(tmp_path).ca_certs}")
    by_another_name = secured.url.replace("127.0.0.1", "127.1")
    assert "certificate" in refused(f"{by_another_name}?ca_certs={secured.certificates.ca_certs}")


def test_a_plain_url_to_a_server_of_tls_is_refused(secured: RedisServer) -> None:
    assert "Redis cannot be used" in refused(secured.url.replace("rediss://", "redis://"))


def test_a_server_that_demands_a_certificate_gets_ours(mutual: RedisServer) -> None:
    assert mutual.certificates is not None
    authority = f"ca_certs={mutual.certificates.ca_certs}"
    own = f"certfile={mutual.certificates.certfile}&keyfile={mutual.certificates.keyfile}"
    with opened(f"{mutual.url}?{authority}&{own}") as registry:
        publish(registry, 0)
        assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[0]
    assert "Redis cannot be used" in refused(f"{mutual.url}?{authority}")


def test_a_certificate_that_is_none_is_told(secured: RedisServer) -> None:
    assert secured.certificates is not None
    assert "Redis cannot be used" in refused(f"{secured.url}?ca_certs={secured.log}")


@pytest.mark.parametrize(
    ("url", "reason"),
    [("redis://127.0.0.1:1", "Connection refused"), ("redis://no-such-host.invalid", "its host's name is unknown")],
)
def test_a_server_that_is_not_there_is_told_by_its_reason(url: str, reason: str) -> None:
    message = refused(url)
    assert reason in message
    assert "no-such-host" not in message
