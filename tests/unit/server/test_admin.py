"""The admin port: what is there, what is not, and that neither port has the other's routes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from prefixes.artifact import write_prefix
from prefixes.backbone import load_backbone
from prefixes.errors import RegistryUnavailable
from prefixes.limiter.memory import MemoryLimiter
from prefixes.limiter.shared import SharedLimiter
from prefixes.registry import open_registry
from tests.support.apps import Served, with_apps
from tests.support.prefixes import make_prefix, save_tiny_gpt2

BOTH = {"/health", "/ready"}


class Remote(MemoryLimiter):
    """A shared limiter that is there or away."""

    remote = True
    away = False

    def announce(self, replica: str, expires_s: float) -> int:
        if self.away:
            raise RegistryUnavailable("away")
        return 1


def paths(app: FastAPI) -> set[str]:
    return set(app.openapi()["paths"])


async def generate(served: Served) -> None:
    body = {"task": "e2e", "input": "x", "parameters": {"max_new_tokens": 2}}
    assert (await served.public.post("/generate", json=body)).status_code == 200


def test_no_route_of_one_port_is_on_the_other_but_the_probes(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        public, admin = paths(served.apps.public), paths(served.apps.admin)
        assert public & admin == BOTH
        assert {"/metrics", "/admin/residents", "/admin/gc"} <= admin
        for path in sorted(admin - BOTH):
            for method in ("GET", "POST"):
                answer = await served.public.request(method, path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
        for template in [*sorted(public - BOTH), "/docs", "/redoc"]:
            path = template.format(tenant="default", name="e2e", version="x", key_id="AAAAAAAAAAAA", model="e2e")
            for method in ("GET", "POST"):
                answer = await served.admin.request(method, path)
                assert answer.status_code == 404, path
        for client in (served.public, served.admin):
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/ready")).json()["status"] == "ready"
            assert (await client.get("/ready")).headers["x-request-id"]

    with_apps(tmp_path, test)


def test_metrics_count_the_public_traffic_and_not_the_scrapes(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await generate(served)
        for _ in range(2):
            text = (await served.admin.get("/metrics")).text
        requests = [line for line in text.splitlines() if line.startswith("prefixd_http_requests_total")]
        assert requests == ['prefixd_http_requests_total{limit_of="",method="POST",route="/generate",status="200"} 1.0']
        openmetrics = await served.admin.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.text.endswith("# EOF\n")

    with_apps(tmp_path, test)


async def told(served: Served, gauge: str) -> str:
    lines = (await served.admin.get("/metrics")).text.splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{gauge} ")]
    return value


def test_metrics_say_whether_usage_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: object) -> bool:
        raise RegistryUnavailable("away")

    async def until(served: Served, value: str) -> None:
        async with asyncio.timeout(60):
            while await told(served, "prefixd_registry_usage_recorded") != value:
                await asyncio.sleep(0.01)

    async def test(served: Served) -> None:
        assert await told(served, "prefixd_registry_usage_recorded") == "1.0"
        with monkeypatch.context() as patched:
            patched.setattr(served.assembled.link.registry.usage, "add", fail)
            await generate(served)
            await until(served, "0.0")
        await until(served, "1.0")

    with_apps(tmp_path, test, usage_flush_s=0.05)


def test_metrics_say_whether_limits_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote()
    limiter = SharedLimiter(remote)
    monkeypatch.setattr("server.app.open_limiter", lambda url, usage, service: limiter)

    async def test(served: Served) -> None:
        for away, value in ((False, "1.0"), (True, "0.0"), (False, "1.0")):
            remote.away = away
            limiter.look()
            assert await told(served, "prefixd_registry_limits_shared") == value

    with_apps(tmp_path, test)


def test_pins_are_loaded_when_the_applications_start(tmp_path: Path) -> None:
    save_tiny_gpt2(tmp_path / "backbone")
    spec = load_backbone(str(tmp_path / "backbone")).spec
    data = write_prefix(make_prefix(spec, seed=7))
    version = open_registry(str(tmp_path / "registry")).publish("default", "pinned", data, record={}).version

    async def test(served: Served) -> None:
        async with asyncio.timeout(60):
            while not served.assembled.engine.residents():
                await asyncio.sleep(0.01)
        device = (await served.admin.get("/admin/residents")).json()["tiers"][0]
        assert device["prefixes"] == [{"tenant": "default", "version": version}]

    with_apps(tmp_path, test, pin=["pinned"])


def test_residents_and_metrics_say_what_each_tier_holds(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        version = (await served.public.get("/prefixes/e2e")).json()["versions"][0]["version"]
        before = (await served.admin.get("/admin/residents")).json()
        assert [(tier["tier"], tier["prefixes"]) for tier in before["tiers"]] == [
            ("device", []), ("host", []), ("disk", []),
        ]  # fmt: skip
        await generate(served)
        after = (await served.admin.get("/admin/residents")).json()
        assert after["staged_bytes"] == 0
        for tier in after["tiers"]:
            (prefix,) = tier["prefixes"]
            assert (prefix["tenant"], prefix["version"]) == ("default", version)
            assert 0 < tier["bytes"] <= tier["limit_bytes"]
            if tier["tier"] != "device":
                assert tier["bytes"] == prefix["bytes"] == len(served.data)
        lines = (await served.admin.get("/metrics")).text.splitlines()
        seen = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
        assert {
            'prefixd_prefix_tier_entries{tier="device"}': 1,
            'prefixd_prefix_tier_entries{tier="host"}': 1,
            'prefixd_prefix_tier_bytes{tier="disk"}': len(served.data),
            'prefixd_prefix_tier_limit_bytes{tier="host"}': 1 << 20,
            'prefixd_prefix_reads_total{tier="registry"}': 1,
            'prefixd_prefix_reads_total{tier="host"}': 0,
        }.items() <= seen.items()

    with_apps(tmp_path, test, disk_cache=str(tmp_path / "cache"), host_cache_bytes="1MiB")


def test_the_audit_tells_a_tenants_changes_the_latest_first(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await served.public.delete("/prefixes/e2e")
        entries = (await served.public.get("/audit")).json()["entries"]
        assert [(entry["action"], entry["task"]) for entry in entries] == [
            ("delete", "default/e2e"), ("publish", "default/e2e"),
        ]  # fmt: skip
        assert len((await served.public.get("/audit", params={"limit": 1})).json()["entries"]) == 1
        none = (await served.public.get("/audit", params={"tenant": "acme"})).json()
        assert none == {"entries": [], "changes": [], "denials": []}
        for wrong in ({"limit": 0}, {"tenant": "../etc"}, {"tenent": "acme"}):
            assert (await served.public.get("/audit", params=wrong)).status_code == 422, wrong

    with_apps(tmp_path, test)


def test_gc_says_what_would_go_and_then_takes_it(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        async def gc(**body: Any) -> Any:
            return (await served.admin.post("/admin/gc", json=body)).json()

        await served.public.delete("/prefixes/e2e")
        assert (await gc(dry_run=True))["tasks"] == []  # within its retention
        would = await gc(retention_s=0, dry_run=True)
        assert (would["dry_run"], would["tasks"], would["freed_bytes"]) == (True, ["default/e2e"], len(served.data))
        for short in (0, 0.001, 3599):
            error = (await gc(retention_s=short))["error"]
            assert f"expected 3600 or more, or confirm to be true, got {short}" in error["message"]
        assert (await gc(retention_s=3600))["tasks"] == []
        assert (await gc(retention_s=0, confirm=True))["tasks"] == ["default/e2e"]
        assert (await gc(retention_s=0, confirm=True))["tasks"] == []
        assert (await served.admin.post("/admin/gc", json={"retention": 0})).status_code == 422

    with_apps(tmp_path, test)


@pytest.mark.parametrize("retention_s", [1e9, 1e12, 1e308])
def test_a_retention_longer_than_time_keeps_everything(tmp_path: Path, retention_s: float) -> None:
    async def test(served: Served) -> None:
        await served.public.delete("/prefixes/e2e")
        answer = await served.admin.post("/admin/gc", json={"retention_s": retention_s})
        assert (answer.status_code, answer.json()["tasks"], answer.json()["failed"]) == (200, [], [])

    with_apps(tmp_path, test)


@pytest.mark.parametrize(
    "accept",
    ["application/openmetrics-text; version=abc", "text/plain;version=x", "text/plain; version=1.0.x",
     "application/openmetrics-text; version=2.x", "text/plain; version=" + "9" * 5000, "text/plain; version=\xb2",
     "application/openmetrics-text; version=0.0.1; escaping=zz", "*/*, text/plain; version=;=;escaping", ";=,=;"],
)  # fmt: skip
def test_metrics_are_told_whatever_the_accept_header(tmp_path: Path, accept: str) -> None:
    async def test(served: Served) -> None:
        answer = await served.admin.get("/metrics", headers=[(b"accept", accept.encode("latin-1"))])
        assert answer.status_code == 200
        assert "prefixd_num_requests_running" in answer.text

    with_apps(tmp_path, test)
