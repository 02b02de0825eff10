"""A tenant's limits in the registry, over HTTP and from a job: what would pass one is refused and leaves nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from prefixes.artifact import write_prefix
from prefixes.tenancy.directory import Directory
from tests.support.apps import Served, with_apps
from tests.support.callers import Callers, make_callers
from tests.support.prefixes import make_prefix


def prepared(served: Served, limits: dict[str, int | None]) -> tuple[Callers, Directory]:
    """Every kind of caller, acme limited so."""
    directory = Directory(served.assembled.link.registry.tenancy)
    callers = make_callers(served.assembled.link.registry.tenancy)
    directory.limit_tenant("acme", limits, actor="test")
    served.assembled.keyring.look()
    return callers, directory


def uploaded(served: Served, task: str, headers: dict[str, str], seed: int = 0) -> Any:
    """The upload of an artifact of its own for each seed."""
    data = write_prefix(make_prefix(served.assembled.backbone.spec, seed=seed))
    return served.public.post("/prefixes", data={"task": task}, files={"file": ("x", data)}, headers=headers)


def told(answer: httpx.Response) -> tuple[Any, ...]:
    """Status, code and detail of a refusal."""
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["detail"]


def test_an_upload_beyond_the_tenants_limit_is_403_and_stores_nothing(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        size = len(served.data)
        callers, directory = prepared(served, {"registry_versions": 2})
        owner, registry = callers.headers["owner"], served.assembled.link.registry
        assert (await uploaded(served, "e2e", owner, 1)).status_code == 201
        assert (await uploaded(served, "e2e", owner, 2)).status_code == 201
        assert (await uploaded(served, "e2e", owner, 2)).status_code == 201  # adds nothing
        before = (registry.tasks("acme"), registry.audit("acme"), registry.gc(dry_run=True))
        refused = await uploaded(served, "other", owner, 3)
        assert told(refused) == (403, "quota_exceeded", {"limit": "registry_versions", "expected": 2, "got": 3})
        assert (registry.tasks("acme"), registry.audit("acme"), registry.gc(dry_run=True)) == before
        assert (await uploaded(served, "e2e", callers.headers["foreign"], 3)).status_code == 201
        directory.limit_tenant("acme", {"registry_versions": None, "registry_bytes": 3 * size - 1}, actor="test")
        served.assembled.keyring.look()
        refused = await uploaded(served, "other", owner, 3)
        detail = {"limit": "registry_bytes", "expected": 3 * size - 1, "got": 3 * size}
        assert told(refused) == (403, "quota_exceeded", detail)
        operator = await uploaded(served, "acme/other", callers.headers["operator"], 3)
        assert told(operator)[:2] == (403, "quota_exceeded")  # the limit is the tenant's, whoever calls
        registry.publish("acme", "other", served.data, record={})  # and not that of whoever has the registry

    with_apps(tmp_path, test)


def test_a_key_of_its_own_limit_adds_nothing_to_what_its_tenant_has(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers, directory = prepared(served, {"registry_tasks": 5})
        owner = callers.headers["owner"]
        key = (await served.public.get("/caller", headers=owner)).json()["key_id"]
        other = directory.create_key("acme", "other", ["publish"], actor="test").secret
        directory.limit_key(key, {"registry_tasks": 1}, actor="test")
        served.assembled.keyring.look()
        assert (await uploaded(served, "first", owner)).status_code == 201
        assert told(await uploaded(served, "second", owner))[2]["expected"] == 1
        assert (await uploaded(served, "second", {"x-api-key": other})).status_code == 201

    with_apps(tmp_path, test)


def test_uploads_at_once_do_not_pass_the_limit_together(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers, _ = prepared(served, {"registry_tasks": 2})
        owner = callers.headers["owner"]
        answers = await asyncio.gather(*(uploaded(served, f"task-{number}", owner, number) for number in range(6)))
        assert sorted(answer.status_code for answer in answers) == [201, 201, 403, 403, 403, 403]
        assert len(served.assembled.link.registry.tasks("acme")) == 2

    with_apps(tmp_path, test)


def test_a_deleted_task_comes_back_only_where_there_is_room(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers, _ = prepared(served, {"registry_tasks": 1})
        owner = callers.headers["owner"]
        await uploaded(served, "first", owner)
        assert (await served.public.delete("/prefixes/first", headers=owner)).status_code == 204
        assert (await uploaded(served, "second", owner, 1)).status_code == 201
        refused = await served.public.post("/prefixes/first/undelete", headers=owner)
        assert told(refused) == (403, "quota_exceeded", {"limit": "registry_tasks", "expected": 1, "got": 2})
        await served.public.delete("/prefixes/second", headers=owner)
        assert (await served.public.post("/prefixes/first/undelete", headers=owner)).status_code == 200

    with_apps(tmp_path, test)


def test_bytes_that_another_tenant_has_read_as_new(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        size = len(served.data)
        callers, _ = prepared(served, {"registry_bytes": size - 1})
        assert (await uploaded(served, "e2e", callers.headers["foreign"], 5)).status_code == 201
        known, new = [await uploaded(served, "e2e", callers.headers["owner"], seed) for seed in (5, 6)]
        assert told(known) == told(new) == (
            403, "quota_exceeded", {"limit": "registry_bytes", "expected": size - 1, "got": size}
        )  # fmt: skip

    with_apps(tmp_path, test)
