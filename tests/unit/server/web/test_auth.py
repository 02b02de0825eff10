"""Who may do what, as one table: every route of both ports, asked by every kind of caller."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from prefixes.artifact import read_prefix, version_of
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.model import Scope
from tests.support.apps import Served, with_apps
from tests.support.callers import TENANT_SCOPES, bearer, expected, make_callers
from tests.support.routes import routes

OPEN: Final = "open"
OWN, TASK, KEY, SERVICE = "one's own", "acme's task", "acme's key", "the service"
ANY_KEY: Final = (None, OWN)
CARD: Final = frozenset({Scope.READ, Scope.PUBLISH, Scope.DELETE})

TABLE: Final[dict[tuple[str, str, str], Any]] = {
    ("public", "GET", "/health"): OPEN,
    ("public", "GET", "/ready"): OPEN,
    ("public", "GET", "/openapi.json"): ANY_KEY,
    ("public", "GET", "/docs"): ANY_KEY,
    ("public", "GET", "/docs/oauth2-redirect"): ANY_KEY,
    ("public", "GET", "/redoc"): ANY_KEY,
    ("public", "POST", "/generate"): (Scope.GENERATE, TASK),
    ("public", "POST", "/generate/batch"): (Scope.GENERATE, TASK),
    ("public", "POST", "/v1/completions"): (Scope.GENERATE, TASK),
    ("public", "GET", "/v1/models"): (Scope.READ, OWN),
    ("public", "GET", "/v1/models/{model:path}"): (Scope.READ, TASK),
    ("public", "GET", "/prefixes"): (Scope.READ, OWN),
    ("public", "POST", "/prefixes"): (Scope.PUBLISH, TASK),
    ("public", "GET", "/prefixes/{tenant}/{name}"): (CARD, TASK),
    ("public", "GET", "/prefixes/{tenant}/{name}/versions/{version}"): (Scope.READ, TASK),
    ("public", "POST", "/prefixes/{tenant}/{name}/promote"): (Scope.PUBLISH, TASK),
    ("public", "POST", "/prefixes/{tenant}/{name}/rollback"): (Scope.PUBLISH, TASK),
    ("public", "POST", "/prefixes/{tenant}/{name}/share"): (Scope.PUBLISH, TASK),
    ("public", "POST", "/prefixes/{tenant}/{name}/undelete"): (Scope.DELETE, TASK),
    ("public", "DELETE", "/prefixes/{tenant}/{name}"): (Scope.DELETE, TASK),
    ("public", "DELETE", "/prefixes/{tenant}/{name}/versions/{version}"): (Scope.DELETE, TASK),
    ("public", "DELETE", "/prefixes/{name}/versions/{version}"): (Scope.DELETE, OWN),
    ("public", "GET", "/prefixes/{name}"): (CARD, OWN),
    ("public", "GET", "/prefixes/{name}/versions/{version}"): (Scope.READ, OWN),
    ("public", "POST", "/prefixes/{name}/promote"): (Scope.PUBLISH, OWN),
    ("public", "POST", "/prefixes/{name}/rollback"): (Scope.PUBLISH, OWN),
    ("public", "POST", "/prefixes/{name}/share"): (Scope.PUBLISH, OWN),
    ("public", "POST", "/prefixes/{name}/undelete"): (Scope.DELETE, OWN),
    ("public", "DELETE", "/prefixes/{name}"): (Scope.DELETE, OWN),
    ("public", "GET", "/caller"): ANY_KEY,
    ("public", "GET", "/keys"): (Scope.KEYS, OWN),
    ("public", "POST", "/keys"): (Scope.KEYS, OWN),
    ("public", "GET", "/keys/{key_id}"): (Scope.KEYS, KEY),
    ("public", "POST", "/keys/{key_id}/rotate"): (Scope.KEYS, KEY),
    ("public", "POST", "/keys/{key_id}/limits"): (Scope.KEYS, KEY),
    ("public", "DELETE", "/keys/{key_id}"): (Scope.KEYS, KEY),
    ("public", "GET", "/audit"): (Scope.KEYS, OWN),
    ("public", "GET", "/usage"): (Scope.KEYS, OWN),
    ("public", "GET", "/tenants"): (Scope.OPERATOR, SERVICE),
    ("public", "POST", "/tenants"): (Scope.OPERATOR, SERVICE),
    ("public", "GET", "/tenants/{tenant}"): (Scope.OPERATOR, SERVICE),
    ("public", "POST", "/tenants/{tenant}/block"): (Scope.OPERATOR, SERVICE),
    ("public", "POST", "/tenants/{tenant}/limits"): (Scope.OPERATOR, SERVICE),
    ("admin", "GET", "/health"): OPEN,
    ("admin", "GET", "/ready"): OPEN,
    ("admin", "GET", "/openapi.json"): ANY_KEY,
    ("admin", "GET", "/metrics"): (Scope.METRICS, SERVICE),
    ("admin", "GET", "/admin/residents"): (Scope.OPERATOR, SERVICE),
    ("admin", "POST", "/admin/gc"): (Scope.OPERATOR, SERVICE),
}
"""Port, method and path: open to everybody, or the scope that it takes, or one of some, and what it is about."""


def bodies(served: Served) -> dict[str, dict[str, Any]]:
    generated = {"task": "acme/e2e", "input": "x", "parameters": {"max_new_tokens": 1}}
    version = version_of(read_prefix(served.data))
    return {
        "/generate": {"json": generated},
        "/generate/batch": {"json": {"items": [generated]}},
        "/v1/completions": {"json": {"model": "acme/e2e", "prompt": "x", "max_tokens": 1}},
        "/prefixes": {"data": {"task": "acme/e2e"}, "files": {"file": ("x", served.data)}},
        "promote": {"json": {"version": version}},
        "share": {"json": {}},
        "/keys": {"json": {"name": "one more", "scopes": ["read"]}},
        "/tenants": {"json": {"name": "umbrella"}},
        "block": {"json": {"blocked": False}},
        "limits": {"json": {"limits": {"open_jobs": 9}}},
        "gc": {"json": {"dry_run": True}},
    }


async def asked(served: Served, client: httpx.AsyncClient, method: str, path: str, **given: Any) -> httpx.Response:
    """One request, of acme's task as it was in the beginning."""
    registry = served.assembled.link.registry
    registry.publish("acme", "e2e", served.data, record={})
    return await client.request(method, path, **given)


def refusal(answer: httpx.Response, path: str) -> int | None:
    """The status if the answer refuses the caller; of a batch, its item's."""
    if path == "/generate/batch" and answer.status_code == 200:
        (item,) = answer.json()["items"]
        codes = {"forbidden": 403, "task_not_found": 404}
        return codes[item["error"]["code"]] if "error" in item else None
    if answer.status_code in (401, 403):
        return answer.status_code
    unknown = answer.status_code == 404 and answer.json()["error"]["code"] in ("task_not_found", "key_not_found")
    return 404 if unknown else None


def test_every_route_asks_every_caller(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        there = [*routes("public", served.apps.public), *routes("admin", served.apps.admin)]
        assert set(there) == set(TABLE), set(there) ^ set(TABLE)
        callers = make_callers(served.assembled.link.registry.tenancy)
        served.assembled.keyring.look()
        texts: set[str] = set()
        refused = 0
        for port, method, template in there:
            client = served.public if port == "public" else served.admin
            needs = TABLE[port, method, template]
            path = template.replace("{model:path}", "acme/e2e").format(
                tenant="globex" if "/tenants/" in template else "acme",
                name="e2e", version="production", key_id=callers.spare,
            )  # fmt: skip
            body = bodies(served)
            given = body.get(template, body.get(template.rpartition("/")[2], {})) if method == "POST" else {}
            for caller, headers in callers.headers.items():
                answer = await asked(served, client, method, path, headers=headers, **given)
                case = (caller, method, path, answer.status_code, answer.text[:300])
                if needs == OPEN:
                    assert answer.status_code == 200, case
                    continue
                scope, about = needs
                wanted = expected(caller, scope, foreign=404 if about in (TASK, KEY) else 0)
                got = refusal(answer, template)
                if about is OWN and "{name}" in template and caller not in ("owner",) and wanted is None and got == 404:
                    continue  # neither globex nor the operator's tenant has a task of that name
                assert got == wanted, (wanted, *case)
                refused += got is not None
                assert answer.status_code < 500, case
                if answer.status_code == 401:
                    assert answer.headers["www-authenticate"].startswith("Bearer")
                    texts.add(answer.json()["error"]["message"])
        assert len(texts) == 1  # whatever is wrong with a key, the answer is the same
        served.assembled.denials.write(last=True)
        audited = [*map(served.assembled.link.registry.tenancy.denials, (None, "acme", "globex", "initech", "ops"))]
        assert sum(denial.count for denials in audited for denial in denials) == refused  # each, and nothing else

    with_apps(tmp_path, test, max_task_labels=4)


def test_someone_elses_task_is_like_none(tmp_path: Path) -> None:
    """In answer, and in calls of the registry."""

    async def test(served: Served) -> None:
        registry = served.assembled.link.registry
        registry.publish("acme", "e2e", served.data, record={})
        callers = make_callers(registry.tenancy)
        served.assembled.keyring.look()
        foreign, calls = callers.headers["foreign"], []
        observer = served.assembled.link._observer
        assert observer is not None
        observer.on_registry_call = lambda *args: calls.append(args[0])  # type: ignore[method-assign]
        version = version_of(read_prefix(served.data))
        paths = ("", "@other", f"@{version}", "@sha256:" + "0" * 64)
        seen = []
        for name in ("acme/e2e", "acme/none", "nobody/e2e"):
            told: list[Any] = []
            for selector in paths:
                body = {"task": name + selector, "input": "x"}
                told.append(await served.public.post("/generate", json=body, headers=foreign))
                told.append(await served.public.get(f"/v1/models/{name}{selector}", headers=foreign))
            upload = {"data": {"task": name}, "files": {"file": ("x", served.data)}}
            told.append(await served.public.post("/prefixes", headers=foreign, **upload))  # type: ignore[arg-type]
            for path in ("", f"/versions/{version}"):
                told.append(await served.public.get(f"/prefixes/{name}{path}", headers=foreign))
            for path in ("promote", "rollback", "undelete", "share"):
                json = {"version": version} if path == "promote" else {}
                told.append(await served.public.post(f"/prefixes/{name}/{path}", json=json, headers=foreign))
            told.append(await served.public.delete(f"/prefixes/{name}", headers=foreign))
            texts = [
                (answer.status_code, answer.text.replace(name, "X").replace(answer.headers["x-request-id"], "ID"))
                for answer in told
            ]
            seen.append((texts, tuple(calls)))
            calls.clear()
        assert seen[0] == seen[1] == seen[2]
        assert {status for status, _ in seen[0][0]} == {404}
        listed = (await served.public.get("/prefixes", headers=foreign)).json()["prefixes"]
        models = (await served.public.get("/v1/models", headers=foreign)).json()["data"]
        assert listed == [] and [model["owned_by"] for model in models] == ["default"]

    with_apps(tmp_path, test)


@pytest.mark.parametrize("download", [False, True])
def test_a_shared_task_is_used_and_read_and_nothing_else(tmp_path: Path, download: bool) -> None:
    async def test(served: Served) -> None:
        registry = served.assembled.link.registry
        registry.publish("acme", "e2e", served.data, record={})
        callers = make_callers(registry.tenancy)
        served.assembled.keyring.look()
        owner, foreign = callers.headers["owner"], callers.headers["foreign"]
        shared = await served.public.post(
            "/prefixes/e2e/share", json={"tenants": ["globex"], "download": download}, headers=owner
        )
        assert shared.json() == {"everyone": False, "tenants": ["globex"], "download": download}
        version = version_of(read_prefix(served.data))
        for task in ("acme/e2e", f"acme/e2e@{version}"):
            body = {"task": task, "input": "x", "parameters": {"max_new_tokens": 1}}
            answer = await served.public.post("/generate", json=body, headers=foreign)
            assert (answer.status_code, answer.json()["version"]) == (200, version)
        assert (await served.public.get("/prefixes/acme/e2e", headers=foreign)).status_code == 200
        got = await served.public.get("/prefixes/acme/e2e/versions/production", headers=foreign)
        assert got.status_code == (200 if download else 403)
        listed = (await served.public.get("/prefixes", headers=foreign)).json()["prefixes"]
        assert [task["task"] for task in listed] == ["acme/e2e"]
        refused = [
            await served.public.delete("/prefixes/acme/e2e", headers=foreign),
            await served.public.post("/prefixes/acme/e2e/rollback", headers=foreign),
            await served.public.post("/prefixes/acme/e2e/share", json={"everyone": True}, headers=foreign),
        ]
        assert [answer.status_code for answer in refused] == [403] * 3
        other = Directory(registry.tenancy).create_key("hooli", "x", TENANT_SCOPES, actor="test").secret
        assert (await served.public.get("/prefixes/acme/e2e", headers=bearer(other))).status_code == 404
        await served.public.post("/prefixes/e2e/share", json={}, headers=owner)
        assert (await served.public.get("/prefixes/acme/e2e", headers=foreign)).status_code == 404
        assert Directory(registry.tenancy).load().shares == {}

    with_apps(tmp_path, test)


def test_a_new_key_works_at_once_and_a_revoked_one_no_more(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        directory = Directory(served.assembled.link.registry.tenancy)
        operator = directory.create_key("default", "first", ["operator"], actor="test").secret
        made = await served.public.post(
            "/keys", json={"tenant": "acme", "name": "ci", "scopes": ["read"]}, headers=bearer(operator)
        )
        key = made.json()
        assert (made.status_code, key["tenant"], key["scopes"]) == (201, "acme", ["read"])
        assert (await served.public.get("/prefixes", headers=bearer(key["secret"]))).status_code == 200
        rotated = (await served.public.post(f"/keys/{key['id']}/rotate", json={}, headers=bearer(operator))).json()
        for secret in (key["secret"], rotated["secret"]):
            assert (await served.public.get("/prefixes", headers=bearer(secret))).status_code == 200
        assert (await served.public.delete(f"/keys/{key['id']}", headers=bearer(operator))).json()["revoked_at"]
        for secret in (key["secret"], rotated["secret"]):
            assert (await served.public.get("/prefixes", headers=bearer(secret))).status_code == 401
        shown = (await served.public.get("/keys?tenant=acme", headers=bearer(operator))).text
        assert key["id"] in shown and key["secret"] not in shown

    with_apps(tmp_path, test)


def test_a_tenants_key_gives_no_more_than_its_tenant(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers = make_callers(served.assembled.link.registry.tenancy)
        served.assembled.keyring.look()
        owner = callers.headers["owner"]
        for body in (
            {"name": "x", "scopes": ["operator"]}, {"name": "x", "scopes": ["read", "metrics"]},
            {"name": "x", "scopes": ["read"], "tenant": "globex"},
        ):  # fmt: skip
            assert (await served.public.post("/keys", json=body, headers=owner)).status_code == 403, body
        answer = await served.public.get(f"/keys/{callers.foreign}", headers=owner)
        unknown = await served.public.get("/keys/AAAAAAAAAAAA", headers=owner)
        assert answer.status_code == unknown.status_code == 404
        listed = (await served.public.get("/keys", headers=owner)).json()["keys"]
        assert {key["tenant"] for key in listed} == {"acme"}

    with_apps(tmp_path, test)


def test_without_keys_the_default_tenant_may_do_everything_but_make_keys(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        client = served.public
        body = {"task": "e2e", "input": "x", "parameters": {"max_new_tokens": 1}}
        assert (await client.post("/generate", json=body)).json()["task"] == "default/e2e"
        upload = await client.post("/prefixes", data={"task": "acme/e2e"}, files={"file": ("x", served.data)})
        assert upload.json()["task"] == "acme/e2e"
        listed = (await client.get("/prefixes")).json()["prefixes"]
        assert [task["task"] for task in listed] == ["acme/e2e", "default/e2e"]
        refused = await client.post("/keys", json={"name": "first", "scopes": ["operator"]})
        assert refused.status_code == 403 and "prefixd keys create" in refused.json()["error"]["message"]

    with_apps(tmp_path, test)


def test_the_audit_names_keys_and_is_ones_own(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers = make_callers(served.assembled.link.registry.tenancy)
        served.assembled.keyring.look()
        owner = callers.headers["owner"]
        upload: dict[str, Any] = {"data": {"task": "e2e"}, "files": {"file": ("x", served.data)}}
        await served.public.post("/prefixes", headers={**owner, "x-request-id": "upload-1"}, **upload)
        share = {"everyone": True}
        await served.public.post("/prefixes/e2e/share", json=share, headers={**owner, "x-request-id": "share-1"})
        key = (await served.public.get("/caller", headers=owner)).json()["key_id"]
        told = (await served.public.get("/audit", headers=owner)).json()
        assert told["entries"][0]["actor"] == f"tenant:acme/key:{key}/request:upload-1"
        assert told["changes"][0]["actor"] == f"tenant:acme/key:{key}/request:share-1"
        assert (told["changes"][0]["action"], told["changes"][0]["what"]) == ("share", "acme/e2e")
        theirs = await served.public.get("/audit", headers=callers.headers["foreign"])
        assert key not in theirs.text and "acme" not in theirs.text
        asked = await served.public.get("/audit?tenant=acme", headers=callers.headers["foreign"])
        assert asked.status_code == 403
        assert (await served.public.get("/audit?tenant=acme", headers=callers.headers["operator"])).json() == told

    with_apps(tmp_path, test)


def test_a_tenants_weight_reaches_the_engine(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers = make_callers(served.assembled.link.registry.tenancy)
        served.assembled.keyring.look()
        operator = callers.headers["operator"]
        answer = await served.public.post("/tenants/acme/limits", json={"weight": 3}, headers=operator)
        assert answer.json()["weight"] == 3
        generated = {"task": None, "input": "x", "parameters": {"max_new_tokens": 6, "min_new_tokens": 6}}
        counters = served.assembled.engine._scheduler.counters
        grown = []
        for name in ("owner", "foreign"):
            tenant = {"owner": "acme", "foreign": "globex"}[name]
            await served.public.post("/generate", json=generated, headers=callers.headers[name])
            before = counters.of(tenant)
            await served.public.post("/generate", json=generated, headers=callers.headers[name])
            grown.append(counters.of(tenant) - before)
        assert grown[1] == pytest.approx(3 * grown[0]) and grown[0] > 0

    with_apps(tmp_path, test)
