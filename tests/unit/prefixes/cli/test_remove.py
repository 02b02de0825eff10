"""``prefixd prefixes delete`` of a version and ``prune``, on a registry and through a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixes.client import RemoteRegistry
from prefixes.registry import open_registry
from tests.support.redis_registry import VERSIONS, publish
from tests.unit.prefixes.cli.test_cli import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    publish(open_registry(shell.url), 0, 1, 2, 3)
    return shell


def versions(shell: Shell) -> list[int]:
    return [VERSIONS.index(info.version) for info in open_registry(shell.url).inspect("default", "e2e").versions]


def test_a_version_is_deleted_by_its_shortened_digest(shell: Shell) -> None:
    short = VERSIONS[1][: len("sha256:") + 8]
    assert shell.run("delete", f"e2e@{short}", input="n\n", code=1).exception
    assert versions(shell) == [3, 2, 1, 0]
    assert shell.run("delete", f"e2e@{short}", "--yes").stdout == f"deleted default/e2e@{VERSIONS[1]}\n"
    assert versions(shell) == [3, 2, 0]
    assert shell.json("delete", f"e2e@{VERSIONS[0]}", "--yes") == {
        "task": "default/e2e", "version": VERSIONS[0], "deleted": True,
    }  # fmt: skip
    assert "expected no alias that points at it, got production" in shell.error("delete", f"e2e@{VERSIONS[3]}", "-y")
    assert "expected [TENANT/]NAME or" in shell.run("delete", "e2e@production", "-y", code=2).stderr
    assert versions(shell) == [3, 2]


def test_a_prune_keeps_the_newest_versions_and_those_with_an_alias(shell: Shell) -> None:
    shell.run("promote", f"e2e@{VERSIONS[0]}", "--alias", "stable")
    told = shell.json("prune", "e2e", "--keep", "2", "--dry-run")
    assert told == {
        "task": "default/e2e", "deleted": [VERSIONS[1]], "kept": [VERSIONS[3], VERSIONS[2], VERSIONS[0]],
        "dry_run": True,
    }  # fmt: skip
    shown = shell.run("prune", "e2e", "--keep=2", "--dry-run").stdout
    assert "would delete 1 version(s) of default/e2e, 3 stay" in shown
    assert versions(shell) == [3, 2, 1, 0]
    assert shell.json("prune", "e2e", "--keep", "2") == {**told, "dry_run": False}
    assert versions(shell) == [3, 2, 0]
    shell.run("prune", "e2e", "--keep", "1")
    assert versions(shell) == [3, 0]
    assert "deleted 0 version(s)" in shell.run("prune", "e2e", "--keep", "1").stdout
    assert "expected a published task, found none" in shell.error("prune", "nothing", "--keep", "1")
    shell.run("prune", "e2e", "--keep", "0", code=2)
    shell.run("prune", "e2e", code=2)


def test_a_prune_leaves_a_version_that_gets_an_alias_meanwhile(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefixes.registry.disk.registry import DiskRegistry

    delete = DiskRegistry.delete_version

    def promoted_before(self: DiskRegistry, tenant: str, name: str, version: str, **options: str) -> None:
        if version == VERSIONS[1]:
            self.promote(tenant, name, version, alias="canary")
        delete(self, tenant, name, version, **options)

    monkeypatch.setattr(DiskRegistry, "delete_version", promoted_before)
    told = shell.json("prune", "e2e", "--keep", "1")
    assert told["deleted"] == [VERSIONS[2], VERSIONS[0]]
    assert VERSIONS[1] in told["kept"]
    assert versions(shell) == [3, 1]


def test_a_prune_through_a_server_asks_it_for_each_version(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = open_registry(shell.url), []

    def delete_version(self: RemoteRegistry, tenant: str, name: str, version: str, **options: str) -> None:
        asked.append((tenant, name, version))

    monkeypatch.setattr(RemoteRegistry, "inspect", lambda self, tenant, name: store.inspect(tenant, name))
    monkeypatch.setattr(RemoteRegistry, "delete_version", delete_version)
    shell.env["PREFIXD_REGISTRY"] = None
    told = shell.json("prune", "default/e2e", "--keep", "2", "--server", "http://localhost:1")
    assert asked == [("default", "e2e", version) for version in told["deleted"]] == [
        ("default", "e2e", VERSIONS[1]), ("default", "e2e", VERSIONS[0]),
    ]  # fmt: skip
