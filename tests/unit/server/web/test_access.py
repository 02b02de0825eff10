"""Who gets in: without keys this machine alone, with keys whoever has one, and web pages never by themselves."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from prefixes.errors import RegistryUnavailable
from prefixes.registry import open_registry, open_to_serve
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.keyring import FRESH_S
from prefixes.tenancy.model import InvalidKey
from prefixes.tenancy.secret import hash_line, new_id, new_secret, parse_secret
from server.settings import Settings
from server.web.errors import Forbidden
from server.web.opening import open_keyring
from server.web.origins import check_origin
from server.web.settings_sources import load_settings
from tests.support.apps import Served, with_apps
from tests.support.callers import bearer

BODY = {"input": "x", "parameters": {"max_new_tokens": 1}}
EVIL = "https://evil.example"


async def ask(client: httpx.AsyncClient, headers: dict[str, str], path: str = "/generate") -> int:
    """The status of a request: a generation, or of a GET."""
    if path == "/generate":
        return (await client.post(path, json=BODY, headers=headers)).status_code
    return (await client.get(path, headers=headers)).status_code


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200), ({"host": "127.0.0.1:8000"}, 200), ({"host": "[::1]:8000"}, 200), ({"host": "LocalHost"}, 200),
        ({"host": "evil.example"}, 403), ({"host": "localhost.evil.example"}, 403), ({"host": ""}, 403),
        ({"host": "127.0.0.1.evil.example:8000"}, 403), ({"host": "10.0.0.5"}, 403),
        ({"forwarded": "for=1.2.3.4"}, 403), ({"x-forwarded-for": "1.2.3.4"}, 403), ({"x-forwarded-host": "a"}, 403),
        ({"x-forwarded-proto": "https"}, 403), ({"X-Forwarded-Port": "443"}, 403), ({"x-forwarded-server": "a"}, 403),
        ({"origin": EVIL}, 403), ({"origin": "null"}, 403), ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403), ({"origin": "http://localhost"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8001"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200), ({"sec-fetch-site": "none"}, 200),
        ({"authorization": "Bearer whatever"}, 200),
    ],
)  # fmt: skip
def test_an_open_server_takes_requests_of_this_machine(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    async def test(served: Served) -> None:
        assert await ask(served.public, headers) == status
        assert await ask(served.public, headers, "/health") == 200
        refused_read = status == 403 and not {"origin", "sec-fetch-site"} & set(headers)
        assert await ask(served.admin, headers, "/metrics") == (403 if refused_read else 200)
        answer = await served.admin.post("/admin/gc", json={}, headers=headers)
        assert (answer.status_code == 403) == (status == 403)

    with_apps(tmp_path, test)


def test_a_web_page_cannot_publish_to_a_server_on_its_readers_machine(tmp_path: Path) -> None:
    """Forms and plain text are "simple" for browsers: they are sent without asking the server before."""

    async def test(served: Served) -> None:
        files: dict[str, Any] = {"data": {"task": "e2e"}, "files": {"file": ("x", served.data)}}
        page = {"origin": EVIL, "sec-fetch-site": "cross-site"}
        assert (await served.public.post("/prefixes", headers=page, **files)).status_code == 403
        plain = {**page, "content-type": "text/plain"}
        assert (await served.public.post("/generate", content=b'{"input": "x"}', headers=plain)).status_code == 403
        assert (await served.public.delete("/prefixes/e2e", headers=page)).status_code == 403
        assert (await served.public.get("/prefixes/e2e", headers={"host": "rebound.example"})).status_code == 403

    with_apps(tmp_path, test)


def test_open_access_serves_every_host_and_proxies_but_no_foreign_page(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        assert await ask(served.public, {"host": "10.0.0.5", "x-forwarded-for": "1.2.3.4"}) == 200
        assert await ask(served.public, {"origin": EVIL}) == 403
        assert await ask(served.admin, {"host": "10.0.0.5"}, "/metrics") == 200

    with_apps(tmp_path, test, open_access=True)


def test_allowed_hosts_are_those_with_keys_too(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        statuses = [await ask(served.public, {"host": host}) for host in ("api.example:80", "localhost", "other")]
        assert statuses == [200, 403, 403]
        key = Directory(served.assembled.link.registry.tenancy).create_key("a", "x", ["generate"], actor="t").secret
        statuses = [await ask(served.public, {**bearer(key), "host": host}) for host in ("api.example", "localhost")]
        assert statuses == [200, 403]
        assert await ask(served.public, {"host": "localhost"}, "/health") == 200
        metrics = Directory(served.assembled.link.registry.tenancy).create_key("a", "m", ["metrics"], actor="t").secret
        assert await ask(served.admin, {**bearer(metrics), "host": "10.0.0.5"}, "/metrics") == 200

    with_apps(tmp_path, test, allowed_hosts="api.example")


def test_with_keys_host_and_proxies_do_not_count(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        key = Directory(served.assembled.link.registry.tenancy).create_key("a", "x", ["generate"], actor="t").secret
        headers = {**bearer(key), "host": "gateway", "forwarded": "for=1.2.3.4"}
        assert await ask(served.public, headers) == 200
        assert await ask(served.public, {**headers, "origin": EVIL}) == 403
        assert await ask(served.public, {"x-api-key": key}) == 200
        assert await ask(served.public, {**bearer(key), "x-api-key": key}) == 200
        assert await ask(served.public, {"authorization": f"Basic {key}"}) == 401

    with_apps(tmp_path, test)


def test_pages_of_allowed_origins_may_call(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        key = Directory(served.assembled.link.registry.tenancy).create_key("a", "x", ["generate"], actor="t").secret
        app = {"origin": "https://app.example"}
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        preflight = await served.public.options("/generate", headers={**app, **asks})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, app["origin"])
        answer = await served.public.post("/generate", json=BODY, headers={**app, **bearer(key)})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, app["origin"])
        refused = await served.public.post("/generate", json=BODY, headers=app)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, app["origin"])
        other = await served.public.options("/generate", headers={"origin": EVIL, **asks})
        assert "access-control-allow-origin" not in other.headers

    with_apps(tmp_path, test, allowed_origins="https://app.example")


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("https://a.example", "a.example", True), ("http://a.example", "a.example", True),
        ("https://a.example:8443", "a.example:8443", True), ("https://a.example", "a.example:443", True),
        ("https://a.example", "a.example:8000", False), ("https://a.example:1", "a.example:2", False),
        ("https://a.example", "b.example", False), ("https://a.example:99999", "a.example", False),
        ("file://", "a.example", False), ("https://[::1]", "[::1]", True), ("http://x@a.example", "a.example", True),
    ],
)  # fmt: skip
def test_an_origin_is_compared_by_host_and_port(origin: str, host: str, same: bool) -> None:
    def check() -> None:
        check_origin("POST", Headers({"origin": origin, "host": host}), ())

    if same:
        check()
    else:
        with pytest.raises(Forbidden):
            check()
    check_origin("GET", Headers({"origin": origin, "host": host}), ())


def settings_of(tmp_path: Path, **given: Any) -> Settings:
    return load_settings(Settings, {"registry": str(tmp_path / "registry"), **given}, config=None)


def test_a_service_without_keys_does_not_listen_beyond_this_machine(tmp_path: Path) -> None:
    store = open_registry(str(tmp_path / "registry")).tenancy
    for hosts in (["127.0.0.1", "0.0.0.0"], ["::"], ["prefixd.internal"]):
        with pytest.raises(Forbidden, match="prefixd keys create"):
            open_keyring(store, settings_of(tmp_path), hosts)
    assert not open_keyring(store, settings_of(tmp_path), ["127.0.0.1", "localhost", "::1"]).closed
    assert not open_keyring(store, settings_of(tmp_path, open_access=True), ["0.0.0.0"]).closed
    made = Directory(store).create_key("acme", "x", ["read"], actor="t").key
    Directory(store).revoke(made.id, actor="t")
    assert open_keyring(store, settings_of(tmp_path), ["0.0.0.0"]).closed


def test_an_emptied_registry_opens_no_running_service_and_a_start_without_its_id_begins_an_open_one(
    tmp_path: Path,
) -> None:
    settings, url = settings_of(tmp_path), str(tmp_path / "registry")
    store = open_registry(url)
    Directory(store.tenancy).create_key("acme", "x", ["read"], actor="t")
    running = open_keyring(store.tenancy, settings, ["127.0.0.1"])
    shutil.rmtree(url)
    running.look()
    assert running.closed
    with pytest.raises(RegistryUnavailable):
        open_to_serve(url, registry_id=store.id)
    new = open_to_serve(url, registry_id=None).tenancy
    running.look()
    assert running.closed and not open_keyring(new, settings, ["127.0.0.1"]).closed
    with pytest.raises(Forbidden, match="prefixd keys create"):
        open_keyring(new, settings, ["0.0.0.0"])


def test_the_operators_key_is_made_from_its_hash_and_never_again(tmp_path: Path) -> None:
    store, file, secret = open_registry(str(tmp_path / "registry")).tenancy, tmp_path / "hash", new_secret(new_id())
    presented = parse_secret(secret)
    assert presented is not None
    file.write_text(hash_line(presented))
    for _ in range(2):
        ring = open_keyring(store, settings_of(tmp_path, operator_hash_file=str(file)), ["0.0.0.0"])
        key = ring.find(presented)
        assert key is not None
        assert key.scopes == {"operator"}
    Directory(store).revoke(presented.key_id, actor="t")
    assert open_keyring(store, settings_of(tmp_path, operator_hash_file=str(file)), ["0.0.0.0"]).find(presented) is None
    for text in ("", "x", secret, "AAAAAAAAAAAA " + "0" * 63):
        file.write_text(text)
        with pytest.raises(InvalidKey, match="hash"):
            open_keyring(store, settings_of(tmp_path, operator_hash_file=str(file)), ["0.0.0.0"])


def test_while_the_registry_is_away_known_keys_work_for_a_while_and_unknown_ones_wait(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        directory = Directory(served.assembled.link.registry.tenancy)
        key = directory.create_key("a", "x", ["generate"], actor="t").secret
        gone = directory.create_key("a", "y", ["generate"], actor="t")
        directory.revoke(gone.key.id, actor="t")
        assert await ask(served.public, bearer(key)) == 200
        (tmp_path / "registry").rename(tmp_path / "away")
        unknown = bearer(new_secret(new_id()))
        assert await ask(served.public, bearer(key)) == 200
        assert await ask(served.public, unknown) == 503
        assert await ask(served.public, bearer(gone.secret)) == 401
        assert await ask(served.public, {}) == 401
        deadline = time.monotonic() + 60
        while await ask(served.public, bearer(key)) == 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert await ask(served.public, bearer(key)) == 503
        assert await ask(served.public, {}) == 401
        (tmp_path / "away").rename(tmp_path / "registry")
        while await ask(served.public, bearer(key)) == 503:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert await ask(served.public, bearer(key)) == 200
        assert await ask(served.public, unknown) == 401

    with_apps(tmp_path, test, max_stale_auth_s=FRESH_S / 2)


def test_a_key_that_is_none_costs_an_open_server_no_look(tmp_path: Path) -> None:
    """OpenAI's clients want some key and send it. Each of their requests waited for a look of its own."""

    async def test(served: Served) -> None:
        looks = [0]
        look = served.assembled.keyring.look

        def counted() -> None:
            looks[0] += threading.current_thread().name != "keyring"
            look()

        served.assembled.keyring.look = counted  # type: ignore[method-assign]
        for headers in (bearer("none"), {"x-api-key": "pfx_x"}, {"authorization": "Basic eDp5"}):
            assert await ask(served.public, headers) == 200
        assert looks == [0]
        assert await ask(served.public, bearer(new_secret(new_id()))) == 200
        assert looks[0] >= 1

    with_apps(tmp_path, test)


def test_only_a_preflight_that_is_answered_needs_no_key(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        Directory(served.assembled.link.registry.tenancy).create_key("a", "x", ["read"], actor="t")
        served.assembled.keyring.look()
        for path in ("/prefixes/acme/e2e", "/none", "/health"):
            answer = await served.public.options(path)
            assert answer.status_code == (405 if path == "/health" else 401)

    with_apps(tmp_path, test)


def test_unknown_keys_cost_the_registry_little(tmp_path: Path) -> None:
    """Thousands of made-up keys are looked for together, and known ones are not looked for at all."""

    async def test(served: Served) -> None:
        store = served.assembled.link.registry.tenancy
        key = Directory(store).create_key("a", "x", ["generate"], actor="t").secret
        assert await ask(served.public, bearer(key)) == 200
        looks, look = [0], served.assembled.keyring.look

        def counted() -> None:
            looks[0] += 1
            look()

        served.assembled.keyring.look = counted  # type: ignore[method-assign]
        began = time.monotonic()
        made_up = [ask(served.public, bearer(new_secret(new_id())), "/prefixes") for _ in range(500)]
        assert set(await asyncio.gather(*made_up)) == {401}
        assert looks[0] <= 3 + 14 * (time.monotonic() - began)  # two a second anyway, and at most ten for these
        assert looks[0] < 100

    with_apps(tmp_path, test)
