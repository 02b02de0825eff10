"""``prefixd prefixes undelete | gc | audit | copy | backup | restore``: they do what they say, in either store."""

from __future__ import annotations

import getpass
import json
import platform
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from prefixes.artifact import version_of, write_prefix
from prefixes.cli import app, copies
from prefixes.cli.show import size
from prefixes.registry import open_registry, registry_path, shown_url
from tests.support.places import Folder, Place, Places, redis_server
from tests.support.prefixes import make_prefix
from tests.support.redis_server import RedisServer

PREFIXES = [make_prefix(seed=seed) for seed in range(3)]
VERSIONS = [version_of(prefix) for prefix in PREFIXES]
ME = f"cli:{getpass.getuser()}@{platform.node()}"
COMMANDS = ("undelete", "gc", "audit", "copy", "backup", "restore")


class Shell:
    """Runs commands on the registry of a place, with nothing of the user's in the environment."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self.folder = place, folder
        self.env: dict[str, str | None] = {
            "PREFIXD_REGISTRY": place.url,
            "PREFIXD_SERVER": None,
            "XDG_DATA_HOME": str(folder / "data"),
        }

    def run(self, *arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, list(arguments), env=self.env)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code).stdout)

    def error(self, *arguments: str) -> str:
        """The one line on stderr of a command that fails."""
        result = self.run(*arguments, code=1)
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        return str(lines[0])

    def wrong(self, *arguments: str) -> str:
        """What wrong usage is told."""
        return " ".join(str(self.run(*arguments, code=2).stderr).replace("│", " ").split())

    def publish(self, *indices: int, task: str = "e2e") -> None:
        for index in indices:
            path = self.folder / f"{index}.safetensors"
            path.write_bytes(write_prefix(PREFIXES[index]))
            self.run("publish", str(path), "--task", task)

    def results(self, *arguments: str, code: int = 0) -> dict[str, str]:
        return {task["task"]: task["result"] for task in self.json(*arguments, code=code)["tasks"]}


@pytest.fixture(params=["disk", "redis"], scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer | None]:
    with redis_server(request.param) as found:
        yield found


@pytest.fixture
def places(server: RedisServer | None, tmp_path: Path) -> Places:
    return Places(tmp_path, server)


@pytest.fixture
def shell(places: Places, tmp_path: Path) -> Shell:
    return Shell(places.new("registry"), tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Shell:
    """For what is the same whatever the store."""
    return Shell(Folder(tmp_path / "registry"), tmp_path)


def test_a_deleted_task_comes_back(shell: Shell) -> None:
    shell.publish(0, 1)
    shell.run("delete", "e2e", "--yes")
    (gone,) = shell.json("list", "--deleted")["deleted"]
    assert (gone["task"], gone["versions"]) == ("default/e2e", 2)
    assert "default/e2e" in shell.run("list", "--deleted", "--tenant", "default").stdout
    assert shell.json("list", "--deleted", "--tenant", "acme")["deleted"] == []
    assert shell.json("undelete", "e2e")["aliases"] == {"production": VERSIONS[1]}
    assert shell.json("list", "--deleted")["deleted"] == []
    assert "expected no task of that name" in shell.error("undelete", "e2e")
    assert "expected a deleted task" in shell.error("undelete", "nothing")


def test_gc_takes_what_is_past_and_says_so(shell: Shell) -> None:
    shell.publish(0)
    shell.publish(1, task="other")
    shell.run("delete", "other", "--yes")
    assert shell.run("gc").stdout == "took 0 deleted task(s) and 0 artifact(s), 0 B\n"
    due = {
        "tasks": ["default/other"],
        "artifacts": [f"default/{VERSIONS[1]}"],
        "freed_bytes": len(write_prefix(PREFIXES[1])),
        "failed": [],
    }
    assert shell.json("gc", "--retention", "0", "--dry-run") == {**due, "dry_run": True}
    looked = shell.run("gc", "--retention", "0s", "--dry-run").stdout
    assert "task      default/other" in looked and "would take 1 deleted task(s) and 1 artifact(s)" in looked
    assert len(shell.json("list", "--deleted")["deleted"]) == 1
    assert shell.json("gc", "--retention", "0d", "--yes") == {**due, "dry_run": False}
    assert shell.json("list", "--deleted")["deleted"] == []
    assert "expected a deleted task" in shell.error("undelete", "other")
    assert shell.json("verify")["bad"] == 0


def test_gc_tells_a_damaged_tenant_and_cleans_the_others(disk: Shell) -> None:
    for tenant in ("acme", "default"):
        disk.publish(1, task=f"{tenant}/other")
        disk.run("delete", f"{tenant}/other", "--yes")
    root = registry_path(disk.place.url)
    next((root / "tenants" / "acme" / "deleted").iterdir()).write_text("{")
    result = disk.run("gc", "--retention", "0", "--yes", code=1)
    assert "task      default/other" in result.stdout and "took 1 deleted task(s)" in result.stdout
    assert "not cleaned: acme: registry: " in result.stderr
    report = disk.json("gc", code=1)
    assert (report["tasks"], [text.partition(":")[0] for text in report["failed"]]) == ([], ["acme"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("7d", 604800), ("7", 604800), ("1.5d", 129600), ("36h", 129600), ("5m", 300), ("0", 0)]
)
def test_a_retention_is_days_or_has_a_unit(
    disk: Shell, text: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixes.registry.base import GcReport
    from prefixes.registry.disk.registry import DiskRegistry

    asked: list[float] = []

    def gc(self: DiskRegistry, *, retention_s: float, **rest: Any) -> GcReport:
        asked.append(retention_s)
        return GcReport((), (), 0)

    disk.publish(0)
    monkeypatch.setattr(DiskRegistry, "gc", gc)
    disk.run("gc", "--retention", text, "--yes")
    assert asked == [seconds]


@pytest.mark.parametrize("text", ["", "d", "-1", "7 weeks", "1e9", "nan", "7w"])
def test_another_retention_is_wrong_usage(disk: Shell, text: str) -> None:
    disk.publish(0)
    assert "expected days, or a number with s, m, h or d" in disk.wrong("gc", "--retention", text)


def test_every_change_is_in_the_audit_with_who_made_it(shell: Shell) -> None:
    shell.publish(0, 1)
    shell.publish(2, task="other")
    shell.run("promote", f"e2e@{VERSIONS[0]}")
    shell.run("rollback", "e2e")
    shell.run("delete", "e2e", "--yes")
    shell.run("undelete", "e2e")
    shell.run("delete", "e2e", "--yes")
    shell.run("gc", "--retention", "0", "-y")
    entries = shell.json("audit", "default")["entries"]
    assert {entry["actor"] for entry in entries} == {ME}
    assert [entry["action"] for entry in entries if entry["task"] == "default/e2e"] == [
        "purge", "delete", "undelete", "delete", "rollback", "promote", "publish", "publish",
    ]  # fmt: skip
    promoted = next(entry for entry in entries if entry["action"] == "promote")
    assert (promoted["alias"], promoted["old"], promoted["new"]) == ("production", VERSIONS[1], VERSIONS[0])
    table = shell.run("audit", "default").stdout
    assert ME in table and VERSIONS[0][:19] in table
    assert shell.json("audit", "acme")["entries"] == []


def test_the_audit_of_a_task_is_as_long_as_asked_behind_others_changes(shell: Shell) -> None:
    shell.publish(0)
    shell.publish(0, 1, 2, 0, 1, 2, task="busy")
    assert [entry["action"] for entry in shell.json("audit", "default/e2e", "--limit", "1")["entries"]] == ["publish"]
    assert len(shell.json("audit", "default/busy", "--limit", "3")["entries"]) == 3
    assert len(shell.json("audit", "default/busy")["entries"]) == 6
    assert "task name: expected" in shell.error("audit", "default/Not A Name")
    shell.run("audit", "default", "--limit", "0", code=2)


def test_copy_brings_tasks_to_another_registry(shell: Shell, places: Places) -> None:
    shell.publish(0, 1)
    shell.publish(2, task="acme/sum")
    shell.publish(2, task="gone")
    shell.run("delete", "gone", "--yes")
    target = places.new("other").url
    looked = shell.json("copy", shell.place.url, target, "--dry-run")
    assert (looked["counts"]["copied"], looked["target_id"], looked["dry_run"]) == (2, None, True)
    assert "found none" in shell.error("list", "--registry", target)
    assert shell.results("copy", shell.place.url, target, "--task", "e2e") == {"default/e2e": "copied"}
    assert shell.results("copy", shell.place.url, target, "--tenant", "acme") == {"acme/sum": "copied"}
    sizes = [size(sum(len(write_prefix(prefix)) for prefix in some)) for some in (PREFIXES[2:], PREFIXES[:2])]
    assert shell.run("copy", shell.place.url, target).stdout.splitlines() == [
        f"unchanged  acme/sum (1 version(s), {sizes[0]})",
        f"unchanged  default/e2e (2 version(s), {sizes[1]})",
        f"in {shown_url(target)}: 2 unchanged",
        "1 deleted task(s) were left behind: `undelete` them first to take them along",
    ]
    assert shell.json("inspect", "e2e") == shell.json("inspect", "e2e", "--registry", target)
    assert shell.json("audit", "acme", "--registry", target)["entries"][0]["action"] == "copy"

    shell.run("rollback", "e2e")
    report = shell.json("copy", shell.place.url, target, code=1)
    assert (report["bad"], report["counts"]["conflict"], report["deleted_left_behind"]) == (1, 1, 1)
    assert "conflict   default/e2e: task default/e2e: expected none or the same one there" in shell.run(
        "copy", shell.place.url, target, code=1
    ).stdout
    assert shell.results("copy", shell.place.url, target, "--replace")["default/e2e"] == "replaced"
    assert shell.json("verify", "--registry", target)["bad"] == 0


def test_a_bad_artifact_is_told_and_the_rest_is_copied(disk: Shell, places: Places) -> None:
    disk.publish(0, 1)
    disk.publish(2, task="other")
    next(disk.folder.rglob(f"{VERSIONS[1].removeprefix('sha256:')}.safetensors")).write_bytes(write_prefix(PREFIXES[0]))
    result = disk.run("copy", disk.place.url, places.new("other").url, code=1)
    assert f"failed     default/e2e: digest: expected {VERSIONS[1]}, got {VERSIONS[0]}" in result.stdout
    assert "copied     default/other" in result.stdout
    assert ": 1 copied, 1 failed" in result.stdout


def test_a_backup_is_taken_looked_at_and_restored(shell: Shell) -> None:
    """The registry is lost; one that had it open goes on when the backup is restored."""
    backup = shell.folder / "backup"
    shell.publish(0, 1)
    shell.publish(2, task="acme/sum")
    before = shell.json("inspect", "e2e")
    assert shell.json("backup", str(backup), "--dry-run")["counts"]["copied"] == 2
    assert not backup.exists()
    taken = shell.json("backup", str(backup))
    assert taken["counts"]["copied"] == 2
    assert taken["source_id"] == taken["target_id"]
    assert shell.json("verify", "--registry", str(backup))["bad"] == 0
    assert shell.json("backup", str(backup))["counts"]["unchanged"] == 2
    assert shell.results("restore", str(backup)) == {"acme/sum": "unchanged", "default/e2e": "unchanged"}

    with closing(open_registry(shell.place.url)) as replica:
        shell.place.wipe()
        kept = Folder(backup).contents()
        looked = shell.run("restore", str(backup), "--dry-run")
        assert f"would be, in {shown_url(shell.place.url)}: 2 copied\nit would be made" in looked.stdout
        assert "found none" in shell.error("list")
        restored = shell.json("restore", str(backup))
        assert restored["target_id"] == taken["source_id"] == replica.id
        assert Folder(backup).contents() == kept
        replica.check()
        assert replica.inspect("default", "e2e").aliases == {"production": VERSIONS[1]}
    assert shell.json("inspect", "e2e") == before
    assert shell.json("audit", "default")["entries"][0]["actor"] == ME


def test_a_restore_into_another_registry_is_refused_unless_asked_for(shell: Shell, places: Places) -> None:
    backup = str(shell.folder / "backup")
    shell.publish(0)
    shell.run("backup", backup)
    other = places.new("other").url
    with closing(open_registry(other)) as found:
        theirs = found.id
    for arguments in (["restore", backup], ["restore", backup, "--dry-run"]):
        message = shell.error(*arguments, "--registry", other)
        assert f"got {theirs}: another registry" in message and "--into-other" in message
        assert shown_url(other) in message
    assert "another registry" in shell.error("backup", backup, "--registry", other)
    assert shell.json("list", "--registry", other)["prefixes"] == []
    assert shell.results("restore", backup, "--registry", other, "--into-other") == {"default/e2e": "copied"}


def test_a_restore_leaves_what_is_there_unless_told_to_replace(shell: Shell) -> None:
    backup = str(shell.folder / "backup")
    shell.publish(0, 1)
    shell.run("backup", backup)
    shell.run("rollback", "e2e")
    shell.publish(2, task="new")
    assert shell.results("restore", backup, code=1) == {"default/e2e": "conflict"}
    assert shell.json("inspect", "e2e")["aliases"]["production"] == VERSIONS[0]
    assert shell.results("restore", backup, "--replace", "--dry-run") == {"default/e2e": "replaced"}
    assert shell.json("inspect", "e2e")["aliases"]["production"] == VERSIONS[0]
    assert shell.results("restore", backup, "--replace") == {"default/e2e": "replaced"}
    assert shell.json("inspect", "e2e")["aliases"]["production"] == VERSIONS[1]
    assert shell.json("inspect", "new")["aliases"] == {"production": VERSIONS[2]}


@pytest.mark.parametrize(
    "arguments",
    [["gc"], ["audit", "default"], ["backup", "b"], ["restore", "b"], ["list", "--deleted"]],
    ids=lambda arguments: arguments[0],
)
def test_what_no_server_offers_says_so(disk: Shell, arguments: list[str]) -> None:
    disk.publish(0)
    expected = "this command works on the registry itself; give --registry"
    assert expected in disk.wrong(*arguments, "--server", "http://127.0.0.1:9")
    disk.env.update(PREFIXD_REGISTRY=None, PREFIXD_SERVER="http://127.0.0.1:9")
    assert expected in disk.wrong(*arguments)
    assert "not a server's URL" in disk.wrong(*arguments, "--registry", "http://127.0.0.1:9")


def test_wrong_usage_and_missing_registries_make_nothing(disk: Shell) -> None:
    nowhere, target = str(disk.folder / "nowhere"), str(disk.folder / "target")
    assert "found none" in disk.error("copy", nowhere, target)
    assert "found none" in disk.error("restore", nowhere)
    assert "found none" in disk.error("backup", target)
    disk.publish(0)
    assert "expected two registries" in disk.wrong("copy", disk.place.url, str(disk.folder / "registry/"))
    assert "expected two registries" in disk.wrong("backup", str(disk.folder / "registry"))
    assert "expected two registries" in disk.wrong("restore", str(disk.folder / "registry"))
    assert "expected a folder" in disk.wrong("backup", "redis://127.0.0.1:9/0")
    assert "not a server's URL" in disk.wrong("copy", disk.place.url, "http://127.0.0.1:9")
    assert "expected one of --tenant and --task" in disk.wrong(
        "copy", disk.place.url, target, "--tenant", "acme", "--task", "e2e"
    )
    (disk.folder / "thesis").mkdir()
    (disk.folder / "thesis/thesis.tex").touch()
    assert "found thesis.tex" in disk.error("backup", str(disk.folder / "thesis"))
    assert "expected a published task" in disk.error("copy", disk.place.url, target, "--task", "nothing")
    assert sorted(path.name for path in disk.folder.iterdir()) == ["0.safetensors", "registry", "thesis"]


def test_a_bar_is_for_terminals_alone(disk: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.publish(0)
    target = str(disk.folder / "target")
    assert disk.run("copy", disk.place.url, target).stderr == ""
    monkeypatch.setattr(copies, "Console", lambda **options: Console(**options, force_terminal=True))
    shown = disk.run("copy", disk.place.url, target)
    assert "1/1" in shown.stderr
    assert shown.stdout.splitlines()[0].endswith(": 1 unchanged")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_kind_of_registry(disk: Shell, command: str) -> None:
    shown = " ".join(disk.run(command, "--help").stdout.split())
    for form in ("disk:///PATH", "redis[s]://HOST[:PORT][/DB]", "redis[s]+sentinel://", "redis[s]+cluster://"):
        assert form in shown


def test_a_password_is_in_no_error(disk: Shell) -> None:
    disk.publish(0)
    secret = "redis://user:tr0ub4dor@127.0.0.1:9/0?timeout_s=0.2"
    backup = str(disk.folder / "backup")
    disk.run("backup", backup)
    for arguments in (["gc"], ["list"], ["backup", backup], ["restore", backup], ["copy", disk.place.url, secret]):
        message = disk.error(*arguments, *([] if arguments[0] == "copy" else ["--registry", secret]))
        assert "redis://127.0.0.1:9/0" in message
        assert "tr0ub4dor" not in message


@pytest.mark.parametrize("retention", ["0", "0.001s", "1s", "59m"])
def test_a_clean_up_that_keeps_less_than_an_hour_is_asked_for(disk: Shell, retention: str) -> None:
    result = disk.run("gc", "--retention", retention, code=1)
    assert f"--retention: expected 1h or more, got {retention}. Take for good" in result.stderr
    assert "took" not in result.output


def test_a_clean_up_that_keeps_an_hour_asks_nothing(disk: Shell) -> None:
    disk.publish(0)
    assert "took 0 deleted task(s)" in disk.run("gc", "--retention", "1h").stdout
