"""A server whose registry is away for longer than keys work: it is not ready, and goes on being watched."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixes.tenancy import keyring
from tests.support.apps import Served, with_apps
from tests.support.clock import Ahead
from tests.support.outlasting import DAY_S, TOLD, Outage, check_refused

BODY = {"input": "x", "parameters": {"max_new_tokens": 1}}
WORDS = "keys cannot be checked: the registry has been away for more than 60 s"


def outage(tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> Outage:
    assembled = served.assembled
    return Outage.of(tmp_path / "registry", assembled.link.registry.tenancy, assembled.keyring, monkeypatch)


def test_known_keys_read_the_metrics_however_long_the_registry_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a minute of an outage its alerts were over: the service that would tell of it refused to."""

    async def test(served: Served) -> None:
        away = outage(tmp_path, served, monkeypatch)
        away.begin()
        for away.clock.seconds in (0, 61, 30 * DAY_S):
            assert await away.metrics(served.admin) == TOLD, away.clock.seconds
        away.end()
        here = await away.metrics(served.admin)
        assert here == {name: 401 if status == 503 else status for name, status in TOLD.items()}

    with_apps(tmp_path, test)


def test_nothing_but_reading_the_metrics_outlasts_the_time_for_which_keys_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(served: Served) -> None:
        away = outage(tmp_path, served, monkeypatch)
        away.begin()
        away.clock.seconds = 61
        for name in ("operator", "metrics"):
            headers = away.headers[name]
            for method, path in (("GET", "/admin/residents"), ("POST", "/admin/gc"), ("POST", "/metrics")):
                check_refused(await served.admin.request(method, path, headers=headers), WORDS)
            for path in ("/prefixes", "/v1/models", "/keys", "/audit", "/openapi.json"):
                check_refused(await served.public.get(path, headers=headers), WORDS)
            check_refused(await served.public.post("/generate", json=BODY, headers=headers), WORDS)

    with_apps(tmp_path, test)


def test_a_server_with_keys_is_not_ready_once_no_key_can_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that it was, for four minutes, and refused all that a proxy therefore sent to it."""

    async def test(served: Served) -> None:
        away = outage(tmp_path, served, monkeypatch)
        away.begin()
        key = away.headers["other scope"]
        for away.clock.seconds, works in ((0, True), (55, True), (61, False)):
            answer = await served.public.post("/generate", json=BODY, headers=key)
            assert (answer.status_code == 200) == works, answer.text
            for client in (served.public, served.admin):
                ready = await client.get("/ready")
                if works:
                    assert ready.status_code == 200, ready.text
                else:
                    check_refused(ready, WORDS)
                assert (await client.get("/health")).status_code == 200
        away.end()
        assert (await served.public.get("/ready")).json()["status"] == "ready"
        assert (await served.public.post("/generate", json=BODY, headers=key)).status_code == 200

    with_apps(tmp_path, test)


def test_an_open_server_stays_ready_without_its_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(served: Served) -> None:
        clock = Ahead()
        monkeypatch.setattr(keyring, "time", clock)
        (tmp_path / "registry").rename(tmp_path / "away")
        served.assembled.keyring.look()
        clock.seconds = DAY_S
        assert (await served.public.get("/ready")).status_code == 200
        assert (await served.public.post("/generate", json=BODY)).status_code == 200

    with_apps(tmp_path, test)
