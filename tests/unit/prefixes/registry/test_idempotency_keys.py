"""Publish keys in the JSON of a task: kept with it, and absent where a task was written before there were any."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from prefixes.registry import open_registry
from prefixes.registry.records import task_from_dict, task_to_dict
from prefixes.registry.redis.keys import TenantKeys
from tests.support.disk import DATA, INDEX, VERSIONS, prepare
from tests.support.redis_server import RedisServer


def before_there_were_keys(raw: bytes) -> bytes:
    """A task's JSON as it was then, and nothing else that is new."""
    task: dict[str, Any] = json.loads(raw)
    assert task.pop("once") == []
    assert sorted(task) == ["aliases", "format", "history", "task", "versions"]
    return json.dumps(task).encode()


def test_a_file_written_before_there_were_keys_is_read_and_takes_its_first(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / INDEX).write_bytes(before_there_were_keys((tmp_path / INDEX).read_bytes()))
    for file in (tmp_path / "tenants/default/deleted").glob("*.json"):
        raw = json.loads(file.read_bytes())
        del raw["once"]
        file.write_text(json.dumps(raw))
    registry = open_registry(str(tmp_path), create=False)
    assert registry.inspect("default", "e2e").idempotency_keys == ()
    first = registry.publish("default", "e2e", DATA[2], record={}, idempotency_key="job-1")
    registry.rollback("default", "e2e")
    assert registry.publish("default", "e2e", DATA[2], record={}, idempotency_key="job-1") == first
    assert registry.inspect("default", "e2e").aliases == {"production": VERSIONS[1]}
    assert registry.undelete("default", "old").idempotency_keys == ()


def test_a_task_in_redis_written_before_there_were_keys_is_read_and_takes_its_first() -> None:
    with RedisServer() as server, closing(open_registry(server.url)) as registry, server.client() as client:
        registry.publish("default", "e2e", DATA[1], record={})
        key = TenantKeys("default").task("e2e")
        client.set(key, before_there_were_keys(client.get(key)))
        first = registry.publish("default", "e2e", DATA[2], record={}, idempotency_key="job-1")
        registry.rollback("default", "e2e")
        assert registry.publish("default", "e2e", DATA[2], record={}, idempotency_key="job-1") == first
        assert registry.inspect("default", "e2e").aliases == {"production": VERSIONS[1]}


def test_keys_survive_their_json_in_their_order(tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path))
    for number, key in enumerate(("z", "a", "m")):
        registry.publish("default", "e2e", DATA[number], record={}, idempotency_key=key)
    task = open_registry(str(tmp_path), create=False).inspect("default", "e2e")
    assert [known.key for known in task.idempotency_keys] == ["z", "a", "m"]
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task)))) == task
    raw = task_to_dict(task)
    raw["once"][0]["version"] = "sha256:" + "0" * 64
    with pytest.raises(ValueError, match="expected publish keys of its versions"):
        task_from_dict(raw)
