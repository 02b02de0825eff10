"""A registry that an earlier commit wrote is read whole, and worked on as if nothing had happened in between."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import read_prefix, write_prefix
from prefixes.errors import Conflict, RegistryRestoring, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import Store, VersionInfo
from prefixes.registry.records import audit_to_dict, deleted_to_dict, task_to_dict, version_to_dict
from prefixes.spec import TaskRef
from tests.support.redis_registry import DATA, VERSIONS
from tests.support.redis_server import SERVERS
from tests.support.stored import Stored

TENANTS = ["acme", "default", "initech"]
CENTURY_S = 100 * 365 * 86400.0


@pytest.fixture
def url(stored: Stored) -> str:
    return stored.url("registry")


@pytest.fixture
def registry(url: str, told: dict[str, Any]) -> Iterator[Store]:
    with closing(open_registry(url, create=False, registry_id=told["id"])) as registry:
        yield registry


@pytest.fixture
def told(stored: Stored) -> dict[str, Any]:
    """What the commit that wrote it reads of it."""
    read: dict[str, Any] = stored.read("registry")
    return read


def publish(registry: Store, tenant: str, name: str, data: bytes, key: str | None = None) -> VersionInfo:
    return registry.publish(tenant, name, data, record={"later": True}, actor="today", idempotency_key=key)


def everything(registry: Store) -> dict[str, Any]:
    """As ``told``, but for the artifacts."""
    return {
        "id": registry.id,
        "tenants": registry.tenants(),
        "tasks": [task_to_dict(task) for task in registry.tasks()],
        "deleted": [deleted_to_dict(item) for item in registry.deleted()],
        "audit": {tenant: audit(registry, tenant) for tenant in TENANTS},
    }


def audit(registry: Store, tenant: str) -> list[dict[str, str | None]]:
    return [audit_to_dict(entry) for entry in registry.audit(tenant)]


def of_task(told: dict[str, Any], name: str) -> dict[str, Any]:
    """The task ``tenant/name``, or the deleted one."""
    (task,) = [task for task in [*told["tasks"], *told["deleted"]] if task["task"] == name]
    found: dict[str, Any] = task
    return found


def production(registry: Store, ref: str) -> str:
    return registry.resolve(TaskRef.parse(ref)).version


def test_tasks_history_records_deletions_and_audit_are_read_as_they_were(registry: Store, told: dict[str, Any]) -> None:
    assert everything(registry) == {key: value for key, value in told.items() if key != "artifacts"}
    assert registry.lost_tenants() == []
    # The story itself, so that nothing passes by being absent from both.
    task = registry.inspect("acme", "e2e")
    moves = [entry.action for entry in task.history["production"]]
    assert moves == ["publish", "publish", "promote", "rollback", "publish"]
    assert set(task.aliases) == {"production", "canary"}
    assert len(task.versions) == 4
    assert {"note": "ä ☕"} in [version.record for version in task.versions]
    assert [task["task"] for task in told["tasks"]] == [
        "acme/back", "acme/copied", "acme/e2e", "acme/replaced", "default/e2e",
    ]  # fmt: skip
    assert sorted(item["task"] for item in told["deleted"]) == ["acme/gone", "acme/replaced"]
    actions = {entry["action"] for entry in told["audit"]["acme"]}
    assert actions == {"publish", "promote", "rollback", "delete", "undelete", "copy", "purge"}


def test_every_artifact_is_the_one_that_was_published(registry: Store, told: dict[str, Any]) -> None:
    assert len(told["artifacts"]) == 7
    for name, digest in told["artifacts"].items():
        tenant, _, version = name.partition("/")
        data = registry.fetch(tenant, version)
        assert hashlib.sha256(data).hexdigest() == digest
        assert write_prefix(read_prefix(data, expected_version=version)) == data
    sites = {site for version in registry.inspect("acme", "e2e").versions for site in version.spec.sites}
    assert sites == {"decoder", "encoder", "cross"}
    with pytest.raises(TaskNotFound):
        registry.fetch("initech", next(iter(told["artifacts"])).partition("/")[2])


def test_a_publish_that_is_repeated_under_a_stored_key_answers_as_the_first_time(
    registry: Store, told: dict[str, Any]
) -> None:
    known = of_task(told, "acme/e2e")
    assert len(known["once"]) == 3
    before = everything(registry)
    for item in known["once"]:
        (first,) = [version for version in known["versions"] if version["version"] == item["version"]]
        assert version_to_dict(publish(registry, "acme", "e2e", DATA[0], item["key"])) == first
    for item in of_task(told, "acme/gone")["once"]:
        with pytest.raises(Conflict, match="expected a publish key that is new"):
            publish(registry, "acme", "gone", DATA[0], item["key"])
    assert everything(registry) == before


def test_content_that_is_stored_is_the_same_version_today(registry: Store, told: dict[str, Any]) -> None:
    for version in of_task(told, "acme/e2e")["versions"]:
        again = publish(registry, "initech", "e2e", registry.fetch("acme", version["version"]))
        assert (again.version, again.size) == (version["version"], version["size"])


def test_work_goes_on_where_it_stopped(registry: Store, url: str, told: dict[str, Any]) -> None:
    first, second = [item["version"] for item in of_task(told, "acme/e2e")["once"]][:2]
    assert publish(registry, "acme", "e2e", DATA[0]).version == VERSIONS[0]
    registry.rollback("acme", "e2e", actor="today")
    assert production(registry, "acme/e2e") == first
    registry.promote("acme", "e2e", VERSIONS[0], expected_current=first, actor="today")
    for version in (first, second, first):  # down the history that was stored
        registry.rollback("acme", "e2e", actor="today")
        assert production(registry, "acme/e2e") == version
    with pytest.raises(Conflict, match="expected an earlier version"):
        registry.rollback("acme", "e2e", actor="today")
    registry.undelete("acme", "gone", actor="today")
    registry.delete("acme", "copied", actor="today")
    registry.rollback("default", "e2e", actor="today")
    publish(registry, "initech", "e2e", DATA[1])

    gone = of_task(told, "acme/gone")
    del gone["deleted_at"]
    with closing(open_registry(url, create=False)) as other:
        assert task_to_dict(other.inspect("acme", "gone")) == gone
        assert {f"{item.task.tenant}/{item.task.name}" for item in other.deleted()} == {
            "acme/replaced", "acme/copied"
        }  # fmt: skip
        done = {
            "acme": ["publish", "rollback", "promote", "rollback", "rollback", "rollback", "undelete", "delete"],
            "default": ["rollback"],
            "initech": ["publish"],
        }
        for tenant, actions in done.items():
            entries = audit(other, tenant)
            new = [entry["action"] for entry in entries if entry["actor"] == "today"]
            assert new[::-1] == actions
            assert entries[len(new) :] == told["audit"][tenant]
        for name in told["artifacts"]:
            tenant, _, version = name.partition("/")
            read_prefix(other.fetch(tenant, version), expected_version=version)


def test_the_clean_up_takes_what_was_deleted_and_what_nobody_names(
    registry: Store, stored: Stored, told: dict[str, Any]
) -> None:
    lease_for(stored, -1.0)
    kept = {version for task in told["tasks"] for version in artifacts(task)}
    deleted = {version for task in told["deleted"] for version in artifacts(task)} - kept
    report = registry.gc(retention_s=0, actor="today")
    assert sorted(report.tasks) == ["acme/gone", "acme/replaced"]
    assert report.failed == ()
    taken = {artifact for artifact in report.artifacts if artifact.startswith("acme/")}
    assert len(deleted) == 1
    assert len(taken - deleted) == 1, "what a killed publisher left"
    assert taken > deleted
    others = [artifact for artifact in report.artifacts if artifact not in taken]
    assert len(others) == (stored.kind == "redis"), "there, what initech's killed publisher had leased"
    assert registry.deleted() == []
    assert [task_to_dict(task) for task in registry.tasks()] == told["tasks"]
    for artifact in told["artifacts"]:
        tenant, _, version = artifact.partition("/")
        if artifact in kept:
            read_prefix(registry.fetch(tenant, version), expected_version=version)
        else:
            with pytest.raises(TaskNotFound):
                registry.fetch(tenant, version)
    registry.delete("default", "e2e")
    assert set(registry.gc(retention_s=0).artifacts) == {artifact for artifact in kept if artifact[:8] == "default/"}


@pytest.mark.parametrize("stored", SERVERS, indirect=True)
def test_a_publisher_that_is_still_at_work_keeps_its_artifact(
    registry: Store, stored: Stored, told: dict[str, Any]
) -> None:
    lease_for(stored, 60.0)
    report = registry.gc(retention_s=0)
    assert len(report.tasks) == 2
    assert len(report.artifacts) == 1
    lease_for(stored, -1.0)
    report = registry.gc(retention_s=CENTURY_S)  # however old the stored registry is by now
    assert len([artifact for artifact in report.artifacts if artifact.startswith("acme/")]) == 1


@pytest.mark.parametrize("stored", ["disk"], indirect=True)
def test_what_killed_writers_left_in_the_folder_is_gone_after_the_next_change(registry: Store, url: str) -> None:
    root = Path(url.removeprefix("disk://"))
    patterns = ("*/deleted/e2e@*", "*/references/*/e2e@*", "*/blobs/.tmp-*")
    assert [len(left(root, pattern)) for pattern in patterns] == [1, 2, 1]
    for tenant in TENANTS:
        publish(registry, tenant, "new", DATA[0])
    assert [len(left(root, pattern)) for pattern in patterns] == [0, 0, 0]
    assert [entry["actor"] for entry in audit(registry, "acme")][:2] == ["today", "late"]
    registry.gc(retention_s=0)
    named = {f"{path.parent.parent.name}/{path.name}" for path in left(root, "*/references/*")}
    assert named == {f"{path.parent.parent.name}/{path.stem}" for path in left(root, "*/blobs/*")}


def test_a_registry_that_was_being_restored_is_restored_to_its_end(registry: Store, stored: Stored) -> None:
    url = stored.url("restoring")
    with pytest.raises(RegistryRestoring):
        open_registry(url)
    with closing(open_registry(url, create=False, registry_id=registry.id, restoring=True)) as restored:
        assert restored.restoring
        assert restored.tenants() == ["acme", "default"]
        assert restored.kept_tenants() == frozenset()
        for task in registry.tasks():
            new = restored.adopt(task, lambda version, tenant=task.tenant: registry.fetch(tenant, version))  # type: ignore[misc]
            assert new == (task.name != "copied"), "one was back already"
        restored.finish_restoring()
    with closing(open_registry(url, create=False)) as restored:
        assert restored.tasks() == registry.tasks()
        assert restored.lost_tenants() == []
        assert len(restored.audit("acme")) == len(registry.tasks("acme"))
        restored.rollback("acme", "e2e")
    if stored.kind == "redis":
        with stored.client(1) as client:
            assert not list(client.scan_iter(match="*unfinished*"))


def artifacts(task: dict[str, Any]) -> list[str]:
    tenant = task["task"].partition("/")[0]
    return [f"{tenant}/{version['version']}" for version in task["versions"]]


def left(root: Path, pattern: str) -> list[Path]:
    return list((root / "tenants").glob(pattern))


def lease_for(stored: Stored, seconds: float) -> None:
    """Have the leases that were stored end in so many seconds; on disk there are none."""
    if stored.kind == "redis":
        with stored.client() as client:
            keys = list(client.scan_iter(match="prefixd:{*}:lease:*"))
            assert len(keys) == 2
            for key in keys:
                for publisher in client.zrange(key, 0, -1):
                    client.zadd(key, {publisher: (time.time() + seconds) * 1000}, xx=True)
