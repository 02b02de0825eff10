"""A registry in Redis that lost a part, as with one node of a Cluster: a restore brings that back, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prefixes.errors import RegistryMissing, RegistryRestoring, TaskNotFound, WrongRegistry
from prefixes.registry import open_registry
from prefixes.registry.base import Store, TaskInfo
from prefixes.registry.redis import RedisRegistry
from prefixes.registry.transfer import Outcome, Report, open_target, transfer
from prefixes.spec import TaskRef
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_registry import DATA, VERSIONS, assert_in_step, opened, publish
from tests.support.redis_server import RedisServer


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    shared.flush()
    return shared


@pytest.fixture
def registry(server: RedisServer) -> Iterator[RedisRegistry]:
    """Two tenants with a task each."""
    with opened(server.url) as registry:
        publish(registry, 0, 1, tenant="acme")
        publish(registry, 2)
        yield registry


@pytest.fixture
def backup(registry: RedisRegistry, tmp_path: Path) -> Iterator[Store]:
    with closing(back_up(registry, tmp_path)) as backup:
        yield backup


def back_up(registry: Store, folder: Path) -> Store:
    backup = open_registry(f"disk://{folder / 'backup'}", registry_id=registry.id)
    assert transfer(registry, backup, mirror=True).bad == 0
    return backup


def restore(url: str, backup: Store, *, dry_run: bool = False) -> Report:
    target = open_target(url, backup.id, dry_run=dry_run)
    assert target is not None
    with closing(target):
        return transfer(backup, target, dry_run=dry_run)


def lose(server: RedisServer, tag: str) -> None:
    """Everything under a hash tag is gone, as with the node that had it."""
    with server.client() as client:
        client.delete(*client.scan_iter(match=f"*{{{tag}}}*", count=1000))


def snapshot(server: RedisServer) -> dict[bytes, bytes]:
    with server.client() as client:
        return {key: client.dump(key) for key in client.scan_iter(count=1000)}


def results(report: Report) -> dict[str, str]:
    return {outcome.task: outcome.result for outcome in report.outcomes}


def test_a_tenant_whose_data_was_lost_comes_back_and_the_others_stay_as_they_are(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    tasks = registry.tasks()
    publish(registry, 3)  # since the backup
    lose(server, "acme")
    before = snapshot(server)
    assert registry.lost_tenants() == ["acme"]
    expected = {"acme/e2e": "copied", "default/e2e": "conflict"}
    looked = restore(server.url, backup, dry_run=True)
    assert (results(looked), looked.forgotten) == (expected, ())
    assert snapshot(server) == before
    report = restore(server.url, backup)
    assert (results(report), report.forgotten) == (expected, ())
    assert registry.lost_tenants() == []
    assert registry.tasks("acme") == [task for task in tasks if task.tenant == "acme"]
    assert registry.resolve(TaskRef.parse("default/e2e")).version == VERSIONS[3]
    publish(registry, 3, tenant="acme")
    with server.client() as client:
        assert_in_step(client, registry, "default")


def test_until_it_is_back_a_lost_tenant_is_away_and_never_not_found(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    lose(server, "acme")
    target = open_target(server.url, registry.id)
    assert target is not None

    def cut_short(outcome: Outcome, done: int, due: int) -> None:
        assert outcome.task == "acme/e2e"
        raise KeyboardInterrupt

    for ref in ("acme/e2e", "acme/other"):
        with pytest.raises(RegistryRestoring):
            registry.resolve(TaskRef.parse(ref))
    with closing(target), pytest.raises(KeyboardInterrupt):
        transfer(backup, target, progress=cut_short)
    assert registry.resolve(TaskRef.parse("acme/e2e")).version == VERSIONS[1]
    assert registry.resolve(TaskRef.parse("default/e2e")).version == VERSIONS[2]
    with pytest.raises(RegistryRestoring):
        registry.resolve(TaskRef.parse("acme/other"))
    with pytest.raises(RegistryRestoring):
        publish(registry, 3)
    assert results(restore(server.url, backup)) == {"acme/e2e": "unchanged", "default/e2e": "unchanged"}
    with pytest.raises(TaskNotFound):
        registry.resolve(TaskRef.parse("acme/other"))
    publish(registry, 3)


def test_a_lost_tenant_that_the_backup_has_not_got_is_told_and_may_begin_anew(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    publish(registry, 3, tenant="newcomer")
    lose(server, "newcomer")
    with pytest.raises(WrongRegistry):
        publish(registry, 3, tenant="newcomer")
    assert restore(server.url, backup, dry_run=True).forgotten == ("newcomer",)
    assert registry.lost_tenants() == ["newcomer"]
    assert restore(server.url, backup).forgotten == ("newcomer",)
    assert registry.tenants() == ["acme", "default"]
    publish(registry, 3, tenant="newcomer")
    assert registry.tenants() == ["acme", "default", "newcomer"]


def test_tenants_whose_list_was_lost_are_found_again(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    """Also those the backup does not know; and not those of another registry that lie about."""
    publish(registry, 3, tenant="newcomer")
    tasks = registry.tasks()
    lose(server, "prefixd")
    with server.client() as client:
        client.set("prefixd:{stranger}:id", "another")
    with pytest.raises(RegistryMissing):
        registry.tasks()
    report = restore(server.url, backup)
    assert (results(report), report.forgotten) == ({"acme/e2e": "unchanged", "default/e2e": "unchanged"}, ())
    assert registry.tasks() == tasks
    assert registry.tenants() == ["acme", "default", "newcomer"]


@pytest.mark.slow
@pytest.mark.parametrize("node", range(3))
def test_a_cluster_with_one_node_emptied_is_restored_without_a_restart(node: int, tmp_path: Path) -> None:
    """Whichever node it is: that of the registry's id too. Others lose nothing that was made since the backup."""
    names = [f"tenant{number}" for number in range(12)]
    with RedisCluster() as cluster, opened(cluster.url) as registry:
        for name in names[:9]:
            publish(registry, 0, 1, tenant=name)
        with closing(back_up(registry, tmp_path)) as backup:
            for name in names[9:]:
                publish(registry, 2, tenant=name)
            tasks = {task.tenant: task for task in registry.tasks()}
            cluster.nodes[node].flush()
            lost = {name for name in names if cluster.node_of(f"{{{name}}}") is cluster.nodes[node]}
            assert lost
            report = restore(cluster.url, backup)
        expected = {f"{name}/e2e": "copied" if name in lost else "unchanged" for name in names[:9]}
        assert results(report) == expected
        gone = lost - set(names[:9])
        assert set(report.forgotten) <= gone  # none where the list of tenants was lost with them
        kept: list[TaskInfo] = [tasks[name] for name in sorted(set(names) - gone)]
        assert registry.tasks() == kept
        for task in kept:
            assert registry.fetch(task.tenant, task.versions[0].version) in DATA
        for name in names:
            publish(registry, 3, tenant=name)
        assert registry.tenants() == sorted(names)
