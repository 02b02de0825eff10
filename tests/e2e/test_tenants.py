"""Two customers on one server that do not trust each other: real processes on a folder, and two replicas on Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.deployment import Deployment, call, deployed_on, generated, published
from tests.support.redis_server import wait_until
from tests.support.server import ServerProcess
from tests.support.traffic import Repeated

SEEN_S = 1.0
"""Within this long a revocation has reached every replica."""


@pytest.fixture(scope="module", params=["disk", "redis"])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed_on(request.param, tmp_path_factory.mktemp("tenants"), "--access-log") as made:
        yield made


def test_two_customers_share_a_server_and_nothing_else(deployed: Deployment) -> None:
    first, last = deployed.replicas[0], deployed.replicas[-1]
    acme, globex = (deployed.key(name, "generate,read,publish,delete,keys") for name in ("acme", "globex"))
    data, own = deployed.world.prefix(seed=1), deployed.world.prefix(seed=2)
    for task in ("shared", "private"):
        assert published(first, task, data, acme["secret"]).json()["task"] == f"acme/{task}"
    assert published(last, "e2e", own, globex["secret"]).status_code == 201
    assert {item["task"] for item in call(last, "GET", "/prefixes", globex["secret"]).json()["prefixes"]} == {
        "globex/e2e"
    }
    shared = deployed.prefixd("prefixes", "share", "shared", "--tenant", "globex", server=first.url, key=acme["secret"])
    assert shared == {"task": "acme/shared", "everyone": False, "tenants": ["globex"], "download": False}

    def seen() -> bool:
        return generated(last, "acme/shared", globex["secret"]).status_code == 200

    wait_until(seen, lambda: "the shared task is not seen", 20)
    theirs, ours = (generated(last, "acme/shared", key["secret"]).json() for key in (globex, acme))
    assert (theirs["version"], theirs["outputs"]) == (ours["version"], ours["outputs"])
    for path in ("/prefixes/acme/private", "/prefixes/acme/none", "/v1/models/acme/private"):
        assert call(last, "GET", path, globex["secret"]).status_code == 404
    assert generated(last, "acme/private", globex["secret"]).status_code == 404
    listed = deployed.prefixd("prefixes", "list", server=last.url, key=globex["secret"])["prefixes"]
    assert [item["task"] for item in listed] == ["acme/shared", "globex/e2e"]
    delete = ("prefixes", "delete", "acme/shared", "--yes")
    assert "its owner does not let" in deployed.prefixd(*delete, server=last.url, key=globex["secret"], code=1)
    assert call(last, "GET", "/keys", globex["secret"]).json()["keys"][0]["tenant"] == "globex"
    # The same bytes as a task that one does not know of are as new as any others.
    assert published(last, "mine", data, globex["secret"]).status_code == 201
    assert {item["task"] for item in call(first, "GET", "/prefixes", deployed.operator).json()["prefixes"]} >= {
        "acme/private", "globex/e2e"
    }  # fmt: skip


def test_keys_are_rotated_revoked_and_expire_under_load_and_no_valid_request_fails(deployed: Deployment) -> None:
    acme = deployed.key("acme", "generate,publish")
    assert published(deployed.replicas[0], "load", deployed.world.prefix(seed=3), acme["secret"]).status_code == 201
    secrets = [acme["secret"]]
    statuses: list[int] = []

    def ask(server: ServerProcess) -> None:
        statuses.append(generated(server, "load", secrets[0]).status_code)

    with ExitStack() as stack:
        loads = [
            stack.enter_context(Repeated(lambda server=server: ask(server)))  # type: ignore[misc]
            for server in deployed.replicas for _ in range(3)
        ]  # fmt: skip
        for _ in range(3):
            rotated = deployed.prefixd("keys", "rotate", acme["id"])
            secrets[0] = rotated["secret"]  # used at once, on every replica
            for load in loads:
                load.wait_for(5, 60)
        other = deployed.key("acme", "generate", "--expires", "4s")
        while generated(deployed.replicas[0], "load", other["secret"]).status_code == 200:
            time.sleep(0.05)
        assert [generated(server, "load", other["secret"]).status_code for server in deployed.replicas] == [
            401 for _ in deployed.replicas
        ]
        revoked = deployed.key("acme", "generate")
        assert all(generated(server, "load", revoked["secret"]).status_code == 200 for server in deployed.replicas)
        deployed.prefixd("keys", "revoke", revoked["id"])
        time.sleep(SEEN_S)
        assert all(generated(server, "load", revoked["secret"]).status_code == 401 for server in deployed.replicas)
        for load in loads:
            load.wait_for(5, 60)
    assert [fault for load in loads for fault in load.faults] == []
    assert set(statuses) == {200} and len(statuses) > 50


def test_no_secret_is_in_a_log_and_requests_name_their_key(deployed: Deployment) -> None:
    acme = deployed.key("acme", "generate,read")
    for server in deployed.replicas:
        assert call(server, "GET", "/prefixes", acme["secret"]).status_code == 200
        assert call(server, "GET", "/prefixes", acme["secret"][:-1] + "!").status_code == 401
        assert call(server, "GET", "/prefixes", None).headers["www-authenticate"] == 'Bearer realm="prefixd"'
        assert any(line.get("key") == acme["id"] and line["tenant"] == "acme" for line in server.log_lines())
        text = server.log.read_text()
        assert "pfx_" not in text and acme["secret"][16:50] not in text


def test_beyond_this_machine_a_server_without_keys_does_not_start(deployed: Deployment, tmp_path: Path) -> None:
    arguments = ("--backbone", str(deployed.world.folder), "--registry", str(tmp_path / "open"), "--host", "0.0.0.0")
    with ServerProcess(tmp_path, *arguments) as server:
        assert server.wait(120) == 1
        assert "prefixd keys create" in server.log.read_text()
