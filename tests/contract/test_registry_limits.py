"""What every store promises of its limits: what would pass one is refused whole, what is stored beyond one is read."""

from __future__ import annotations

from typing import Any

import pytest

from prefixes.errors import LimitReached
from prefixes.registry import limits, open_registry
from prefixes.registry.base import Store
from prefixes.registry.limits import RECORD_BYTES, RECORD_ENTRIES
from tests.support.redis_registry import DATA, publish, resolve


def test_a_record_is_bounded_over_all_uploads_of_its_version(registry: Store, url: str) -> None:
    """Each upload brought entries of its own, and forty of them made a task of 40 MB, which every resolve read."""
    large = "x" * (RECORD_BYTES // 4)
    for number in range(3):
        registry.publish("default", "e2e", DATA[0], record={f"entry-{number}": large})
    before, audit = registry.inspect("default", "e2e"), registry.audit("default")
    with pytest.raises(LimitReached, match=f"expected at most {RECORD_BYTES} bytes of JSON .*, got") as caught:
        registry.publish("default", "e2e", DATA[0], record={"entry-3": large})
    assert caught.value.detail["expected"] == RECORD_BYTES < caught.value.detail["got"]
    assert open_registry(url).inspect("default", "e2e") == before
    assert registry.audit("default") == audit
    registry.publish("default", "e2e", DATA[0], record={"small": 1})


def test_a_record_has_so_many_entries_at_most(registry: Store) -> None:
    publish(registry, 0, record={str(number): number for number in range(RECORD_ENTRIES - 1)})
    publish(registry, 0, record={"last": True})
    with pytest.raises(LimitReached, match=f"expected at most {RECORD_ENTRIES} entries .*, got {RECORD_ENTRIES + 1}"):
        publish(registry, 0, record={"one": "more"})
    assert len(registry.inspect("default", "e2e").versions[0].record) == RECORD_ENTRIES


def test_a_first_record_that_is_too_large_stores_nothing(registry: Store) -> None:
    with pytest.raises(LimitReached):
        publish(registry, 0, record={"text": "x" * RECORD_BYTES})
    assert (registry.tasks(), registry.tenants()) == ([], [])
    assert registry.gc(retention_s=0).artifacts == ()


def test_a_record_that_is_larger_already_stays_readable(
    registry: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record: dict[str, Any] = {str(number): "x" * 1000 for number in range(20)}
    publish(registry, 0, 1, record=record)
    before = registry.inspect("default", "e2e")
    monkeypatch.setattr(limits, "RECORD_BYTES", 5000)
    monkeypatch.setattr(limits, "RECORD_ENTRIES", 5)
    assert open_registry(url).inspect("default", "e2e") == before
    publish(registry, 1, record=record)  # adds nothing
    registry.rollback("default", "e2e")
    assert resolve(registry, "e2e") == 0
    registry.delete("default", "e2e")
    assert registry.undelete("default", "e2e").versions == before.versions
    with pytest.raises(LimitReached):
        publish(registry, 0, record={"more": 1})
