"""When a restore ends, and what it says then: of tenants that did not come back, and of losses on its way."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefixes.cli import app
from prefixes.errors import RegistryMissing, RegistryRestoring, WrongRegistry
from prefixes.registry.base import Store
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.registry.transfer import open_target
from prefixes.spec import TaskRef
from tests.support.redis_registry import DATA, VERSIONS, opened, publish, watched
from tests.support.redis_server import RedisServer
from tests.support.restoring import lose, restore, results, snapshot


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


def test_a_lost_tenant_that_could_not_be_brought_is_not_forgotten(
    server: RedisServer, registry: RedisRegistry, backup: Store, tmp_path: Path
) -> None:
    artifacts = list((tmp_path / "backup" / "tenants" / "acme" / "blobs").iterdir())
    for path in artifacts:
        path.write_bytes(b"rot")
    lose(server, "acme")
    report = restore(server.url, backup)
    assert (results(report), report.forgotten) == ({"acme/e2e": "failed"}, ())
    with pytest.raises(WrongRegistry):
        registry.resolve(TaskRef.parse("acme/e2e"))
    publish(registry, 3)  # the others go on
    for path in artifacts:
        path.write_bytes(DATA[VERSIONS.index(f"sha256:{path.stem}")])
    assert results(restore(server.url, backup)) == {"acme/e2e": "copied"}
    assert registry.resolve(TaskRef.parse("acme/e2e")).version == VERSIONS[1]


@pytest.mark.parametrize("lost", ["acme", "everything"])
def test_a_restore_does_not_end_before_all_of_the_backup_can_be_read(
    server: RedisServer, registry: RedisRegistry, backup: Store, tmp_path: Path, lost: str
) -> None:
    """Else running servers would take what it could not read for deleted."""
    index = tmp_path / "backup" / "tenants" / "acme" / "tasks" / "e2e.json"
    text = index.read_text()
    index.write_text("{")
    if lost == "acme":
        lose(server, lost)
    else:
        server.flush()
    report = restore(server.url, backup)
    assert (report.bad, report.forgotten, report.unfinished) == (1, (), True)
    with pytest.raises(RegistryRestoring):
        registry.resolve(TaskRef.parse("acme/e2e"))
    assert registry.resolve(TaskRef.parse("default/e2e")).version == VERSIONS[2]
    index.write_text(text)
    assert not restore(server.url, backup).unfinished
    assert registry.resolve(TaskRef.parse("acme/e2e")).version == VERSIONS[1]


def test_tenants_whose_list_was_lost_are_found_again(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    """Also those the backup does not know; and not those of another registry, nor an id without data."""
    publish(registry, 3, tenant="newcomer")
    publish(registry, 3)
    tasks = registry.tasks()
    lose(server, "prefixd")
    lose(server, "acme")
    with server.client() as client:
        client.set("prefixd:{stranger}:id", "another")
        client.set("prefixd:{acme}:id", registry.id)
    with pytest.raises(RegistryMissing):
        registry.tasks()
    report = restore(server.url, backup)
    assert (results(report), report.kept, report.forgotten) == ({"acme/e2e": "copied"}, 2, ())
    assert registry.tasks() == tasks


def test_a_registry_made_where_only_the_list_was_lost_is_cleared_away_by_hand(
    server: RedisServer, registry: RedisRegistry, backup: Store
) -> None:
    """As docs/failures.md says: the registry's own keys, and the tenants of the new id; the others outlive it."""
    publish(registry, 3)  # since the backup
    lose(server, "prefixd")
    lose(server, "acme")
    with opened(server.url) as other:
        publish(other, 3, tenant="acme")
        with pytest.raises(WrongRegistry):
            open_target(server.url, registry.id)
    for tag in ("prefixd", "acme"):
        lose(server, tag)
    report = restore(server.url, backup)
    assert (results(report), report.kept) == ({"acme/e2e": "copied"}, 1)
    assert registry.resolve(TaskRef.parse("acme/e2e")).version == VERSIONS[1]
    assert registry.resolve(TaskRef.parse("default/e2e")).version == VERSIONS[3]


@pytest.mark.parametrize("call", ["begin_restoring", "finish_restoring"])
def test_data_lost_in_the_middle_of_a_restore_is_never_taken_for_whole(server: RedisServer, call: str) -> None:
    with opened(server.url) as registry, server.client() as client:
        publish(registry, 0, tenant="acme")
        kept = snapshot(server)
        for number in range(1, 20):
            server.flush()
            for key, value in kept.items():
                client.restore(key, 0, value)
            count = 0

            def lose_all(nth: int, command: object, number: int = number) -> None:
                nonlocal count
                count = nth
                if nth == number:
                    server.flush()

            with opened(server.url, create=False, restoring=True) as restoring:
                if call == "finish_restoring":
                    restoring.begin_restoring()
                with watched(restoring, lose_all):
                    try:
                        getattr(restoring, call)()
                        lost = False
                    except WrongRegistry:
                        lost = True
            if count < number:
                break
            assert lost
            with pytest.raises(RegistryMissing):
                registry.check()
        assert count < number


def test_the_command_tells_what_was_left_alone_what_is_known_no_more_and_that_it_has_not_ended(
    server: RedisServer, registry: RedisRegistry, backup: Store, tmp_path: Path
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(
            app, ["restore", str(tmp_path / "backup"), *arguments], env={"PREFIXD_REGISTRY": server.url}
        )
        return result.exit_code, result.output

    publish(registry, 3, tenant="newcomer")
    for tenant in ("acme", "newcomer"):
        lose(server, tenant)
    index = tmp_path / "backup" / "tenants" / "acme" / "tasks" / "e2e.json"
    text = index.read_text()
    index.write_text("{")
    code, told = run()
    assert code == 1 and "failed     acme/*: registry: " in told
    assert "it still counts as being restored: mend what failed, and run this again" in told
    assert "known no more" not in told
    index.write_text(text)
    code, told = run()
    assert code == 0 and "copied     acme/e2e" in told
    assert "1 tenant(s) had lost nothing and were left alone" in told
    assert "1 lost tenant(s) did not come back, and are known no more: newcomer" in told
    assert "still counts" not in told
