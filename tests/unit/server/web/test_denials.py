"""The audit of denials: who, what and why, at a bounded rate, whatever the registry does meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from prefixes.errors import RegistryUnavailable
from prefixes.tenancy.denial import DENIALS_KEPT, Denial
from prefixes.tenancy.directory import Directory
from server.web.denials import BURST, MOST_FAILURES, PAUSE_S, DenialLog
from tests.support.apps import Served, with_apps
from tests.support.callers import NOBODY, bearer, make_callers


class Store:
    """Keeps what is written; can be away, or stand still at a gate."""

    def __init__(self) -> None:
        self.written: dict[str | None, list[Denial]] = {}
        self.away, self.asked = False, 0
        self.gate: threading.Event | None = None
        self.reached = threading.Event()

    def note_denials(self, tenant: str | None, denials: Sequence[Denial]) -> None:
        self.asked += 1
        self.reached.set()
        if self.gate:
            assert self.gate.wait(60)
        if self.away:
            raise RegistryUnavailable("away")
        self.written.setdefault(tenant, []).extend(denials)

    def total(self, tenant: str | None) -> int:
        return sum(denial.count for denial in self.written.get(tenant, []))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_log(clock: Clock | None = None) -> tuple[Store, DenialLog]:
    store = Store()
    return store, DenialLog(Mock(note_denials=store.note_denials), clock or Clock())


def denial() -> Denial:
    return Denial("2026-01-01T00:00:00.000Z", "K", "generate", "POST /generate", "", "no", "r")


def test_a_flood_is_summed_up_and_another_tenants_denial_is_written_beside_it() -> None:
    clock = Clock()
    store, log = make_log(clock)
    for _ in range(1000):
        log.note("flood", denial)
        log.note(None, denial)
    log.note("acme", denial)
    log.write()
    assert [len(store.written[tenant]) for tenant in ("flood", None, "acme")] == [BURST, BURST, 1]
    clock.now += PAUSE_S
    log.write()
    assert [(one.count, one.action) for one in store.written["flood"][BURST:]] == [(980, "")]
    assert store.total("flood") == store.total(None) == 1000 and store.total("acme") == 1
    for _ in range(600):
        clock.now += 1
        log.note("flood", denial)
        log.write()
    assert len(store.written["flood"]) <= BURST + 1 + 600 / PAUSE_S + 1
    log.close()
    assert store.total("flood") == 1600, "the last sum is written at the end"


def test_what_cannot_be_written_waits_in_a_bounded_place_and_is_counted() -> None:
    clock = Clock()
    store, log = make_log(clock)
    store.away = True
    for _ in range(3 * DENIALS_KEPT):
        clock.now += PAUSE_S
        log.note("acme", denial)
        log.write()
    assert store.written == {} and len(log._tenants["acme"].waiting) <= DENIALS_KEPT
    store.away = False
    log.write()
    log.close()
    assert store.total("acme") == 3 * DENIALS_KEPT
    assert len(store.written["acme"]) <= DENIALS_KEPT + 1


def test_a_registry_that_is_away_is_not_asked_for_each_tenant() -> None:
    """Each takes as long as a registry is waited for, and a shutdown waits for all."""
    store, log = make_log()
    for tenant in range(100):
        log.note(f"t{tenant}", denial)
    store.away = True
    log.write()
    assert store.asked == MOST_FAILURES
    store.away = False
    log.write()
    assert sum(map(store.total, store.written)) == 100


def test_a_registry_that_stands_still_holds_up_no_request() -> None:
    store, log = make_log()
    store.gate = threading.Event()
    log.note("acme", denial)
    writer = threading.Thread(target=log.write)
    writer.start()
    assert store.reached.wait(60)
    for _ in range(100):
        log.note("acme", denial)  # would hang
    store.gate.set()
    writer.join(60)
    log.close()
    assert store.total("acme") == 101


async def audit_of(served: Served, headers: dict[str, str], query: str = "") -> list[dict[str, Any]]:
    """What the audit tells a caller of denials so far."""
    served.assembled.denials.write(last=True)
    answer = await served.public.get(f"/audit{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    denials: list[dict[str, Any]] = answer.json()["denials"]
    return denials


def test_a_tenant_reads_who_of_its_own_was_refused_and_nothing_of_others(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        registry = served.assembled.link.registry
        registry.publish("acme", "e2e", served.data, record={})
        callers = make_callers(registry.tenancy)
        served.assembled.keyring.look()
        owner, foreign, reader = (callers.headers[name] for name in ("owner", "foreign", "only read"))
        key = {who: (await served.public.get("/caller", headers=headers)).json()["key_id"]
               for who, headers in (("foreign", foreign), ("reader", reader))}  # fmt: skip
        body = {"task": "acme/e2e", "input": "the prompt", "parameters": {"max_new_tokens": 1}}
        await served.public.post("/generate", json=body, headers={**reader, "x-request-id": "own-1"})
        for name in ("acme/e2e", "acme/none", "nobody/e2e"):
            await served.public.post("/generate", json={**body, "task": name}, headers=foreign)
        batch = {"items": [body, {**body, "task": "acme/none"}]}
        await served.public.post("/generate/batch", json=batch, headers=foreign)
        await served.public.get(f"/keys/{callers.spare}", headers=foreign)
        own = await audit_of(served, owner)
        assert [(d["key"], d["action"], d["route"], d["what"], d["request_id"]) for d in own] == [
            (key["reader"], "generate", "POST /generate", "acme/e2e", "own-1")
        ]
        assert "expected a key with the scope generate" in own[0]["reason"]
        theirs = await audit_of(served, foreign)
        assert {(d["key"], d["what"], d["count"]) for d in theirs} == {(key["foreign"], "", 1)}
        assert sorted((d["route"], d["reason"]) for d in theirs) == [
            ("GET /keys/{key_id}", "key_not_found"),
            *[("POST /generate", "task_not_found")] * 3,
            *[("POST /generate/batch", "task_not_found")] * 2,
        ]
        assert "acme" not in str(theirs) and "prompt" not in str(own), "nor of what is not there"
        await served.public.post("/prefixes/e2e/share", json={"tenants": ["globex"]}, headers=owner)
        await served.public.delete("/prefixes/acme/e2e", headers=foreign)
        last, *_ = await audit_of(served, foreign)
        assert (last["action"], last["what"]) == ("delete", "acme/e2e")
        assert (await audit_of(served, callers.headers["operator"], "?tenant=globex"))[0] == last
        assert len(await audit_of(served, owner)) == 1

    with_apps(tmp_path, test)


def test_a_secret_whose_grace_is_over_is_told_from_an_expired_key(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        directory = Directory(served.assembled.link.registry.tenancy)
        made = directory.create_key("acme", "ci", ["keys"], actor="test")
        new = directory.rotate(made.key.id, grace_s=0.01, actor="test")
        await asyncio.sleep(0.05)  # a request that begins within the grace may be refused after it, for another reason
        reasons: set[str] = set()
        async with asyncio.timeout(60):
            while not reasons:  # the service's own thread may be writing the denial
                await served.public.get("/caller", headers=bearer(made.secret))
                reasons = {d["reason"] for d in await audit_of(served, bearer(new.secret))}
        assert reasons == {"a replaced secret"}

    with_apps(tmp_path, test)


def test_who_has_no_working_key_is_told_to_its_tenant_or_to_operators(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        callers = make_callers(served.assembled.link.registry.tenancy)
        served.assembled.keyring.look()
        owner, operator = callers.headers["owner"], callers.headers["operator"]
        for who in (*NOBODY, "blocked"):
            await served.public.get("/prefixes/acme/e2e", headers=callers.headers[who])
        mine = await audit_of(served, owner)
        assert sorted(d["reason"] for d in mine) == ["a revoked key", "an expired key"]
        assert {d["route"] for d in mine} == {"GET /prefixes/{tenant}/{name}"}
        unknown = await audit_of(served, operator, "?unknown=true")
        assert sorted(d["reason"] for d in unknown) == [
            "a malformed key", "a malformed key", "an unknown key", "an unknown key", "no key", "two keys that differ"
        ]  # fmt: skip
        assert {d["key"] for d in unknown} == {None} and "acme" not in str(unknown)
        blocked = await audit_of(served, operator, "?tenant=initech")
        assert [d["reason"] for d in blocked] == ["tenant initech is blocked"]
        refused = await served.public.get("/audit?unknown=true", headers=owner)
        assert refused.status_code == 403
        for headers in callers.headers.values():
            for secret in headers.values():
                assert secret.rpartition(" ")[2] not in str([mine, unknown, blocked])

    with_apps(tmp_path, test)


def test_lists_and_what_is_allowed_leave_no_denial(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        registry = served.assembled.link.registry
        for name in ("a", "b"):
            registry.publish("acme", name, served.data, record={})
        secret = Directory(registry.tenancy).create_key("globex", "x", ["read", "keys"], actor="test").secret
        served.assembled.keyring.look()
        for path in ("/prefixes", "/v1/models", "/caller", "/keys", "/prefixes/none"):
            await served.public.get(path, headers=bearer(secret))
        assert await audit_of(served, bearer(secret)) == []

    with_apps(tmp_path, test)
