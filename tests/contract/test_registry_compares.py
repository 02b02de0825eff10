"""What every store promises of a publish that names what its alias points at, and of what the audit says of it."""

from __future__ import annotations

from typing import Any

import pytest

from prefixes.errors import Conflict, InvalidParameter
from prefixes.registry import open_registry
from prefixes.registry.base import NOWHERE, Store
from tests.support.processes import FORK, in_processes
from tests.support.redis_registry import DATA, VERSIONS, publish, resolve


def test_a_publish_compares_before_it_sets_and_a_refused_one_leaves_nothing(registry: Store) -> None:
    publish(registry, 0, expected_current=NOWHERE)
    before = registry.inspect("default", "e2e"), registry.audit("default")
    with pytest.raises(Conflict, match=f"publish of .* expected no such alias, got {VERSIONS[0]}"):
        publish(registry, 1, expected_current=NOWHERE)
    with pytest.raises(Conflict, match=f"expected it at {VERSIONS[2]}, got {VERSIONS[0]}") as caught:
        publish(registry, 1, expected_current=VERSIONS[2], idempotency_key="job-1")
    assert caught.value.detail == {"expected": VERSIONS[2], "got": VERSIONS[0]}
    assert (registry.inspect("default", "e2e"), registry.audit("default")) == before
    publish(registry, 1, expected_current=VERSIONS[0], idempotency_key="job-1")
    publish(registry, 2)
    publish(registry, 1, expected_current=VERSIONS[0], idempotency_key="job-1")  # a repetition is none
    assert resolve(registry, "e2e") == 2


def test_there_is_nothing_to_compare_where_no_alias_moves(registry: Store) -> None:
    with pytest.raises(InvalidParameter, match="expected_current: expected an alias that moves"):
        publish(registry, 0, alias=None, expected_current=NOWHERE)
    assert registry.tasks("default") == []


def test_the_audit_keeps_why_a_publish_moved_no_alias(registry: Store) -> None:
    publish(registry, 0)
    publish(registry, 1, alias=None, note="gate rejected: bleu 3.1 against 40.2")
    last, first = registry.audit("default")
    assert (last.alias, last.new, last.note) == (None, VERSIONS[1], "gate rejected: bleu 3.1 against 40.2")
    assert first.note is None
    for note in ("", "two\nlines", "line\n", "\x1b[31m", "x" * 501):
        with pytest.raises(InvalidParameter, match="note: expected 1 to 500"):
            publish(registry, 2, note=note)


def _publish_first(index: int, url: str, wins: Any) -> None:
    registry = open_registry(url)
    options: dict[str, Any] = {"record": {}, "actor": f"job-{index}", "idempotency_key": f"job-{index}"}
    try:
        registry.publish("default", "e2e", DATA[index], expected_current=VERSIONS[3], **options)
        wins.put(index)
    except Conflict:
        registry.publish("default", "e2e", DATA[index], alias=None, note="the alias moved meanwhile", **options)


def test_of_several_publishes_over_one_version_one_moves_the_alias_and_the_others_none(url: str) -> None:
    registry = open_registry(url)
    publish(registry, 3)
    wins = FORK.SimpleQueue()
    assert in_processes(3, _publish_first, url, wins) == [0, 0, 0]
    winner = wins.get()
    assert wins.empty()
    task = registry.inspect("default", "e2e")
    assert [entry.version for entry in task.history["production"]] == [VERSIONS[3], VERSIONS[winner]]
    assert {info.version for info in task.versions} == set(VERSIONS), "what lost is published without the alias"
    entries = registry.audit("default")[:3]
    assert sorted(entry.note or "" for entry in entries) == ["", *["the alias moved meanwhile"] * 2]
