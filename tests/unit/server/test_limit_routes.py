"""Limits over HTTP: who sets which, what is told, and our own client of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from prefixes.remote_directory import RemoteDirectory
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import MAX_LIMIT, TENANT_LIMITS, Limits
from tests.support.apps import Served, with_apps
from tests.support.callers import Callers, make_callers

DEFAULTS = dict(TENANT_LIMITS.given())


def prepared(served: Served) -> Callers:
    callers = make_callers(served.assembled.link.registry.tenancy)
    served.assembled.keyring.look()
    return callers


class _Bridge(httpx.BaseTransport):
    """Lets a client without an event loop ask the application in this one."""

    def __init__(self, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        self._client, self._headers, self._loop = client, headers, asyncio.get_running_loop()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        asked = self._client.request(
            request.method, request.url.raw_path.decode(), content=request.read(),
            headers={"content-type": "application/json", **self._headers},
        )  # fmt: skip
        answer = asyncio.run_coroutine_threadsafe(asked, self._loop).result(60)
        return httpx.Response(answer.status_code, content=answer.content, headers={"content-type": "application/json"})


async def remotely(served: Served, headers: dict[str, str], work: Callable[[RemoteDirectory], Any]) -> Any:
    """``work`` with our client, in a thread."""
    client = httpx.Client(base_url="http://localhost", transport=_Bridge(served.public, headers))
    return await asyncio.to_thread(work, RemoteDirectory("http://localhost", client=client))


def test_an_operator_limits_a_tenant_and_the_tenant_sees_it(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers = prepared(served)
        operator, owner = callers.headers["operator"], callers.headers["owner"]
        body = {"limits": {"requests_per_minute": 60.0, "registry_tasks": 0}, "weight": 2}
        answer = await served.public.post("/tenants/acme/limits", json=body, headers=operator)
        assert answer.status_code == 200
        own = {"requests_per_minute": 60, "registry_tasks": 0}
        assert (answer.json()["limits"], answer.json()["weight"]) == (own, 2)
        assert answer.json()["limits_in_force"] == {**DEFAULTS, **own}
        assert (await served.public.get("/tenants/acme", headers=operator)).json() == answer.json()
        seen = (await served.public.get("/caller", headers=owner)).json()
        assert seen["limits"] == {"tenant": {**DEFAULTS, **own}, "key": {}}
        back = await served.public.post(
            "/tenants/acme/limits", json={"limits": {"registry_tasks": None}}, headers=operator
        )
        assert back.json()["limits"] == {"requests_per_minute": 60} and back.json()["weight"] == 2
        theirs = (await served.public.get("/caller", headers=callers.headers["foreign"])).json()
        assert theirs["limits"]["tenant"] == DEFAULTS
        assert (await served.public.get("/tenants/nobody", headers=operator)).status_code == 404
        changes = (await served.public.get("/audit?tenant=acme", headers=operator)).json()["changes"]
        assert [change["detail"] for change in changes if change["action"] == "tenant-limits"] == [
            f"registry_tasks {word}" if word == "unset" else "weight 2, requests_per_minute 60, registry_tasks 0"
            for word in ("unset", "0")
        ]

    with_apps(tmp_path, test)


def test_a_tenants_key_limits_its_own_keys_and_never_its_tenant(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers = prepared(served)
        owner, foreign, body = callers.headers["owner"], callers.headers["foreign"], {"limits": {"num_beams": 2}}
        answer = await served.public.post(f"/keys/{callers.spare}/limits", json=body, headers=owner)
        assert (answer.status_code, answer.json()["limits"]) == (200, {"num_beams": 2})
        assert answer.json()["limits_in_force"] == {**DEFAULTS, "num_beams": 2}
        refused = await served.public.post(f"/keys/{callers.spare}/limits", json=body, headers=foreign)
        assert refused.json()["error"]["code"] == "key_not_found"
        for tenant in ("acme", "globex", "nobody"):
            asked = await served.public.post(f"/tenants/{tenant}/limits", json=body, headers=owner)
            assert asked.status_code == 403, tenant
        own = (await served.public.get("/caller", headers=owner)).json()["key_id"]
        await served.public.post(f"/keys/{own}/limits", json=body, headers=owner)
        assert (await served.public.get("/caller", headers=owner)).json()["limits"]["key"] == {"num_beams": 2}
        assert Directory(served.assembled.link.registry.tenancy).load().tenants["acme"].limits == Limits()

    with_apps(tmp_path, test)


def test_a_tenants_key_does_not_limit_an_operators_key_of_its_tenant(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers = prepared(served)
        directory = Directory(served.assembled.link.registry.tenancy)
        key = directory.create_key("acme", "boss", ["operator"], actor="test").key
        served.assembled.keyring.look()
        body = {"limits": {"requests_per_minute": 0}}
        refused = await served.public.post(f"/keys/{key.id}/limits", json=body, headers=callers.headers["owner"])
        assert refused.status_code == 403 and directory.load().keys[key.id].limits == Limits()

    with_apps(tmp_path, test)


def test_limits_that_are_none_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers = prepared(served)
        operator = callers.headers["operator"]
        for limits, code in (
            ({"num_beams": -1}, "invalid_parameter"), ({"num_beams": MAX_LIMIT + 1}, "invalid_parameter"),
            ({"beams": 1}, "invalid_parameter"), ({"num_beams": 1.5}, "invalid_request"),
            ({"num_beams": True}, "invalid_request"), ({"num_beams": "1"}, "invalid_request"), (3, "invalid_request"),
        ):  # fmt: skip
            for path in ("/tenants/acme/limits", f"/keys/{callers.spare}/limits"):
                answer = await served.public.post(path, json={"limits": limits}, headers=operator)
                assert (answer.status_code, answer.json()["error"]["code"]) == (422, code), (limits, answer.text)
        error = await served.public.post(
            "/tenants/acme/limits", json={"limits": {"num_beams": -1}}, headers=operator
        )
        assert error.json()["error"]["detail"] == {"parameter": "num_beams", "expected": [0, MAX_LIMIT], "got": -1}
        state = Directory(served.assembled.link.registry.tenancy).load()
        assert {tenant.limits for tenant in state.tenants.values()} == {Limits()}
        assert {key.limits for key in state.keys.values()} == {Limits()}

    with_apps(tmp_path, test)


def test_our_client_sets_and_shows_limits(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        operator = prepared(served).headers["operator"]

        def work(directory: RemoteDirectory) -> None:
            assert directory.tenant("acme")["limits"] == {}
            set_up = directory.limit_tenant("acme", {"open_jobs": 3, "num_beams": 2}, 4)
            assert (set_up["limits"], set_up["weight"]) == ({"num_beams": 2, "open_jobs": 3}, 4)
            assert directory.limit_tenant("acme", {"open_jobs": None}, None)["limits"] == {"num_beams": 2}
            assert directory.tenant("acme")["weight"] == 4
            made = directory.create_key("acme", "ci", ["read"], None, {"num_beams": 9})
            assert (made["limits"], made["limits_in_force"]["num_beams"]) == ({"num_beams": 9}, 2)
            assert directory.limit_key(made["id"], {"num_beams": 1})["limits_in_force"]["num_beams"] == 1
            assert directory.key(made["id"])["limits"] == {"num_beams": 1}

        await remotely(served, operator, work)

    with_apps(tmp_path, test)


def test_where_no_key_is_needed_no_limit_holds(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        answer = await served.public.get("/caller")
        assert answer.json()["limits"] == {"tenant": {}, "key": {}}

    with_apps(tmp_path, test)
