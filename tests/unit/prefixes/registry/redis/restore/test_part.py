"""A registry in Redis that lost a part, as with one node of a Cluster: a restore brings that back, and no more."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from prefixes.errors import RegistryRestoring, TaskNotFound, WrongRegistry
from prefixes.registry.base import Store, TaskInfo
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.registry.transfer import Outcome, open_target, transfer
from prefixes.spec import TaskRef
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_registry import DATA, VERSIONS, assert_in_step, opened, publish
from tests.support.redis_server import RedisServer
from tests.support.restoring import back_up, cut_short, lose, restore, results, snapshot


def test_a_tenant_whose_data_was_lost_comes_back_and_the_others_stay_as_they_are(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    """What they published, promoted or deleted since the backup included."""
    tasks = registry.tasks("acme")
    publish(registry, 3)
    publish(registry, 3, name="bad", tenant="other")
    assert transfer(registry, backup, mirror=True).bad == 0
    registry.delete("other", "bad")
    registry.rollback("default", "e2e")
    others = [registry.tasks(tenant) for tenant in ("default", "other")]
    lose(server, "acme")
    before = snapshot(server)
    assert registry.lost_tenants() == ["acme"]
    looked = restore(server.url, backup, dry_run=True)
    assert (results(looked), looked.kept, looked.forgotten) == ({"acme/e2e": "copied"}, 2, ())
    opened_only = open_target(server.url, backup.id)
    assert opened_only is not None
    opened_only.close()  # refused by its preflight, for example
    assert snapshot(server) == before
    report = restore(server.url, backup)
    assert (results(report), report.kept, report.forgotten, report.unfinished) == (
        {"acme/e2e": "copied"}, 2, (), False,
    )  # fmt: skip
    assert registry.lost_tenants() == []
    assert registry.tasks("acme") == tasks
    assert [registry.tasks(tenant) for tenant in ("default", "other")] == others
    publish(registry, 3, tenant="acme")
    with server.client() as client:
        assert_in_step(client, registry, "default")
        assert not client.exists(TenantKeys("acme").unfinished)


def test_until_all_is_back_what_was_lost_is_away_and_never_not_found(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    publish(registry, 1, tenant="acme", name="summary")
    assert transfer(registry, backup, mirror=True).bad == 0
    lose(server, "acme")
    cut_short(server.url, backup)
    assert registry.resolve(TaskRef.parse("acme/e2e")).version == VERSIONS[1]  # what is back
    assert registry.resolve(TaskRef.parse("default/e2e")).version == VERSIONS[2]  # and what was never away
    for call in (
        lambda: registry.resolve(TaskRef.parse("acme/summary")),
        lambda: registry.tasks("acme"),  # a list that lacks some would be believed, by a backup for example
        lambda: registry.deleted("acme"),
        lambda: registry.audit("acme"),
        lambda: publish(registry, 3),
        lambda: registry.check(),
    ):
        with pytest.raises(RegistryRestoring):
            call()
    before = snapshot(server)
    expected = {"acme/e2e": "unchanged", "acme/summary": "copied"}
    assert results(restore(server.url, backup, dry_run=True)) == expected
    assert snapshot(server) == before
    report = restore(server.url, backup)
    assert (results(report), report.kept) == (expected, 1)  # default's own changes are safe from the second try, too
    with pytest.raises(TaskNotFound):
        registry.resolve(TaskRef.parse("acme/other"))
    publish(registry, 3)


@pytest.mark.parametrize("again", ["default", "acme", "prefixd"])
def test_what_is_lost_between_two_tries_is_brought_back_whole(
    server: RedisServer, registry: RedisRegistry, backup: Store, again: str
) -> None:
    """The second of three is cut short, too: no half tenant passes for one that had lost nothing."""
    for tenant in ("acme", "default"):
        publish(registry, 1, tenant=tenant, name="summary")
    assert transfer(registry, backup, mirror=True).bad == 0
    tasks = registry.tasks()
    lose(server, "acme")
    cut_short(server.url, backup)
    lose(server, again)
    cut_short(server.url, backup)
    report = restore(server.url, backup)
    assert (report.bad, report.forgotten, report.unfinished) == (0, (), False)
    assert registry.tasks() == tasks


def test_what_is_lost_during_a_restore_is_told_and_stays_away_until_the_next(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    lose(server, "acme")

    def lose_another(outcome: Outcome, done: int, due: int) -> None:
        lose(server, "default")

    with closing(open_target(server.url, registry.id) or registry) as target:
        report = transfer(backup, target, progress=lose_another)
    assert results(report) == {"acme/e2e": "copied", "default/*": "failed"}
    assert (report.forgotten, report.unfinished) == ((), False)
    with pytest.raises(WrongRegistry):
        registry.resolve(TaskRef.parse("default/e2e"))
    assert results(restore(server.url, backup)) == {"default/e2e": "copied"}
    assert registry.resolve(TaskRef.parse("default/e2e")).version == VERSIONS[2]


def test_a_restore_does_not_end_while_another_try_may_bring_more(
    server: RedisServer, registry: RedisRegistry, backup: Store, tmp_path: Path
) -> None:
    """Running servers would take what is missing for deleted, and the next backup would delete it as well."""
    server.flush()
    with server.client() as client, closing(open_target(server.url, registry.id) or registry) as target:
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        try:
            report = transfer(backup, target)
        finally:
            client.config_set("maxmemory", 0)
    assert (report.bad, report.unfinished) == (2, True)
    with pytest.raises(RegistryRestoring):
        registry.resolve(TaskRef.parse("acme/e2e"))
    assert not restore(server.url, backup).unfinished
    assert registry.resolve(TaskRef.parse("acme/e2e")).version == VERSIONS[1]


def test_damage_in_the_backup_that_the_restore_does_not_need_is_told_and_holds_nothing_up(
    server: RedisServer, registry: RedisRegistry, tmp_path: Path
) -> None:
    publish(registry, 3, name="gone", tenant="acme")
    with closing(back_up(registry, tmp_path)) as backup:
        registry.delete("acme", "gone")
        assert transfer(registry, backup, mirror=True).bad == 0
        next((tmp_path / "backup" / "tenants" / "acme" / "deleted").iterdir()).write_text("{")
        (tmp_path / "backup" / "tenants" / "default" / "tasks" / "e2e.json").write_text("{")
        lose(server, "acme")
        report = restore(server.url, backup)
        assert results(report) == {"acme/e2e": "copied", "acme/*": "failed", "default/*": "failed"}
        assert (report.kept, report.forgotten, report.unfinished) == (1, (), False)
    assert registry.resolve(TaskRef.parse("acme/e2e")).version == VERSIONS[1]
    assert registry.resolve(TaskRef.parse("default/e2e")).version == VERSIONS[2]


def test_a_first_try_that_did_not_begin_costs_the_others_nothing(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    """The registry's own node was lost, and the preflight refused the new one, for example."""
    publish(registry, 3)
    lose(server, "prefixd")
    lose(server, "acme")
    for _ in range(2):
        with closing(open_target(server.url, registry.id) or registry):
            pass
    with closing(open_target(server.url, registry.id) or registry) as target:
        report = transfer(backup, target, replace=True)
    assert (results(report), report.kept) == ({"acme/e2e": "copied"}, 1)
    assert registry.resolve(TaskRef.parse("default/e2e")).version == VERSIONS[3]


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
        assert results(report) == {f"{name}/e2e": "copied" for name in names[:9] if name in lost}
        assert report.kept == len(names) - len(lost)
        gone = lost - set(names[:9])
        assert set(report.forgotten) <= gone  # none where the list of tenants was lost with them
        kept: list[TaskInfo] = [tasks[name] for name in sorted(set(names) - gone)]
        assert registry.tasks() == kept
        for task in kept:
            assert registry.fetch(task.tenant, task.versions[0].version) in DATA
        for name in names:
            publish(registry, 3, tenant=name)
        assert registry.tenants() == sorted(names)
