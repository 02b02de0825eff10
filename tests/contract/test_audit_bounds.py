"""What every store promises of an audit's size: the latest entries, the oldest first to go, each tenant its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from prefixes.registry import open_registry
from prefixes.registry.base import AuditEntry, Store
from prefixes.registry.disk import log
from prefixes.registry.redis import commands, writer
from tests.support.disk import DATA, VERSIONS

KEPT = 100
"""A node of a stream has as many entries, so that there may be twice as many."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(writer, "AUDIT_KEPT", KEPT)
    monkeypatch.setattr(commands, "AUDIT_KEPT", KEPT)
    monkeypatch.setattr(log, "AUDIT_BYTES", 2 * KEPT * 300)
    yield


def entry(number: int) -> AuditEntry:
    return AuditEntry(f"2026-01-01T00:00:00.{number:03}Z", "ci", "publish", "acme/e2e", None, None, VERSIONS[0])


def test_an_audit_keeps_its_latest_entries_whatever_another_tenant_does(
    small: None, url: str, registry: Store
) -> None:
    """It grew without bound on disk."""
    for tenant in ("acme", "globex"):
        registry.publish(tenant, "e2e", DATA[0], record={})
        registry.publish(tenant, "e2e", DATA[1], record={})
    for number in range(3 * KEPT):
        registry.promote("acme", "e2e", VERSIONS[number % 2], actor=f"actor-{number}")
    with closing(open_registry(url)) as again:
        found = again.audit("acme", limit=10 * KEPT)
        assert KEPT / 2 < len(found) <= 2 * KEPT + 20
        assert [one.actor for one in found] == [f"actor-{number}" for number in reversed(range(3 * KEPT))][: len(found)]
        assert len(again.audit("globex")) == 2
        again.rollback("acme", "e2e", actor="after")
        assert again.audit("acme", limit=2) == [*again.audit("acme", limit=1), found[0]]


def test_an_audit_from_elsewhere_takes_the_place_and_the_next_change_comes_behind_it(registry: Store) -> None:
    registry.publish("acme", "e2e", DATA[0], record={}, actor="here")
    entries = [entry(number) for number in range(300)]
    registry.replace_audit("acme", entries)
    assert registry.audit("acme", limit=1000) == entries[::-1]
    registry.publish("acme", "e2e", DATA[1], record={}, actor="later")
    found = registry.audit("acme", limit=1000)
    assert (found[0].actor, found[1:]) == ("later", entries[::-1])
    registry.replace_audit("initech", entries)
    assert registry.tenants() == ["acme", "initech"]
    assert registry.tasks("initech") == [] and registry.lost_tenants() == []


def test_a_long_audit_from_elsewhere_is_bounded_too(small: None, registry: Store) -> None:
    entries = [entry(number) for number in range(900)]
    registry.replace_audit("acme", entries)
    found = registry.audit("acme", limit=1000)
    assert KEPT / 2 < len(found) <= 2 * KEPT + 20 and found == entries[::-1][: len(found)]
