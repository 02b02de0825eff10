"""``prefixd keys | tenants`` and ``prefixes share``: on a registry, and through a server with an operator's key."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
from typer.core import TyperGroup
from typer.testing import CliRunner

import prefixd
from prefixes.artifact import write_prefix
from prefixes.registry import open_registry
from prefixes.tenancy.directory import Directory, later, utc_now
from prefixes.tenancy.hash_file import write_new
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.secret import new_id, parse_secret
from tests.support.prefixes import make_prefix


class Shell:
    """Runs ``prefixd`` on a registry of its own, with nothing of the user's in the environment."""

    def __init__(self, registry: Path) -> None:
        self.registry = str(registry)
        self.env: dict[str, str | None] = {
            "PREFIXD_REGISTRY": self.registry, "PREFIXD_SERVER": None, "PREFIXD_KEY": None
        }  # fmt: skip

    def run(self, *arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(prefixd.app, list(arguments), env=self.env)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "registry")


@pytest.fixture
def directory(shell: Shell) -> Iterator[Directory]:
    with closing(open_registry(shell.registry)) as registry:
        yield Directory(registry.tenancy)


def test_a_key_is_made_in_one_line_and_shown_once(shell: Shell, directory: Directory) -> None:
    made = shell.json("keys", "create", "--tenant", "acme", "--name", "ci", "--scopes", "generate,publish")
    assert made.keys() >= {"id", "secret", "tenant", "name", "scopes", "expires_at"}
    assert (made["tenant"], made["scopes"]) == ("acme", ["generate", "publish"])
    presented = parse_secret(made["secret"])
    assert presented is not None
    ring = Keyring(directory._store, 60)
    assert ring.find(presented) is not None
    for command in (("keys", "list"), ("keys", "show", made["id"])):
        shown = shell.run(*command).stdout
        assert made["id"] in shown and made["secret"] not in shown
    plain = shell.run("keys", "create", "--scopes", "read")
    assert parse_secret(plain.stdout.strip()) is not None and "not shown again" in plain.stderr


@pytest.mark.parametrize(
    ("tasks", "tenant", "left"),
    [(True, "acme", True), (True, "default", False), (True, None, False), (False, "acme", False)],
)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_first_key_says_that_it_closes_the_registry_and_what_default_keeps(
    shell: Shell, directory: Directory, tasks: bool, tenant: str | None, left: bool, options: tuple[str, ...]
) -> None:
    if tasks:
        with closing(open_registry(shell.registry)) as registry:
            registry.publish("default", "e2e", write_prefix(make_prefix()), record={})
    arguments = ("keys", "create", "--scopes", "read", *(("--tenant", tenant) if tenant else ()), *options)
    first = shell.run(*arguments)
    assert "closed from now on, and every caller needs a key" in first.stderr
    assert ("`--tenant default` makes a key for them" in first.stderr) == left
    assert "closed" not in first.stdout
    assert not options or json.loads(first.stdout)["secret"]
    later_one = shell.run(*arguments).stderr
    assert "closed" not in later_one and "--tenant default" not in later_one


def test_damaged_tasks_of_default_keep_nobody_from_making_the_first_key(shell: Shell, tmp_path: Path) -> None:
    with closing(open_registry(shell.registry)) as registry:
        registry.publish("default", "e2e", write_prefix(make_prefix()), record={})
    for path in (tmp_path / "registry" / "tenants" / "default" / "tasks").rglob("*.json"):
        path.write_text("{")
    assert "registry: " in shell.run("prefixes", "list", code=1).stderr
    made = shell.run("keys", "create", "--scopes", "read", "--tenant", "acme")
    assert parse_secret(made.stdout.strip()) is not None and "makes a key for them" in made.stderr


def test_rotate_and_revoke(shell: Shell, directory: Directory) -> None:
    made = shell.json("keys", "create", "--scopes", "read", "--expires", "30d")
    rotated = shell.json("keys", "rotate", made["id"], "--grace", "0s")
    assert rotated["id"] == made["id"] and rotated["secret"] != made["secret"]
    assert rotated["expires_at"] == made["expires_at"]
    ring = Keyring(directory._store, 60)
    works = [ring.find(found) is not None for one in (made, rotated) if (found := parse_secret(one["secret"]))]
    assert works == [False, True]
    assert shell.json("keys", "revoke", made["id"])["revoked_at"]
    assert "revoked" in shell.run("keys", "list").stdout
    assert "expected one that works" in shell.run("keys", "rotate", made["id"], code=1).stderr


def test_the_list_says_which_keys_have_expired(shell: Shell, directory: Directory) -> None:
    end = later(utc_now(), 0.05)
    directory.create_key("acme", "short", ["read"], expires_at=end, actor="t")
    directory.create_key("acme", "long", ["read"], expires_at=later(end, 600), actor="t")
    while utc_now() <= end:
        time.sleep(0.01)
    listed = shell.run("keys", "list").stdout
    assert f"expired {end}" in listed and f"until {later(end, 600)}" in listed


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("keys", "create", "--scopes", "genrate"), 1, "expected some of generate"),
        (("keys", "create", "--scopes", "read", "--expires", "soon"), 1, "expected one such as"),
        (("keys", "create", "--scopes", "read", "--expires", "2020-01-01T00:00:00Z"), 1, "a time to come"),
        (("keys", "create", "--scopes", "read", "--tenant", "A B"), 1, "tenant name"),
        (("keys", "create"), 2, "--scopes"),
        (("keys", "rotate", "AAAAAAAAAAAA", "--grace", "1"), 2, "such as 24h"),
        (("keys", "rotate", "AAAAAAAAAAAA", "--grace", "91d"), 1, "expected 0 to 7776000 seconds, got 7862400"),
        (("keys", "revoke", "AAAAAAAAAAAA"), 1, "found none of that id"),
        (("tenants", "block", "nobody"), 1, "found none of that name"),
        (("keys", "create", "--scopes", "read", "--num-beams", "-1"), 1, "num_beams: expected a whole number from 0"),
        (("keys", "limits", "AAAAAAAAAAAA", "--num-beams", "1"), 1, "found none of that id"),
        (("tenants", "limits", "nobody", "--num-beams", "1"), 1, "found none of that name"),
        (("tenants", "limits", "nobody"), 1, "found none of that name"),
        (("tenants", "limits", "nobody", "--num-beams", "1", "--unset", "num-beams"), 2, "got both"),
        (("prefixes", "share", "e2e"), 2, "--everyone"),
        (("prefixes", "share", "e2e", "--nobody", "--everyone"), 2, "--nobody"),
        (("prefixes", "share", "e2e", "--nobody", "--download"), 2, "--nobody"),
        (("prefixes", "share", "e2e", "--download"), 2, "--everyone"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    shell: Shell, directory: Directory, arguments: tuple[str, ...], code: int, told: str
) -> None:
    result = shell.run(*arguments, code=code)
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output and directory.load().keys == {}


def test_tenants_are_made_listed_and_blocked(shell: Shell, directory: Directory) -> None:
    shell.run("tenants", "create", "acme")
    assert "expected a new one" in shell.run("tenants", "create", "acme", code=1).stderr
    assert shell.json("tenants", "list")["tenants"][0]["name"] == "acme"
    assert shell.json("tenants", "block", "acme")["blocked"] is True
    assert "blocked" in shell.run("tenants", "list").stdout
    assert shell.json("tenants", "block", "acme", "--undo")["blocked"] is False
    assert shell.json("tenants", "limits", "acme", "--weight", "2.5")["weight"] == 2.5
    assert "expected 0.01 to 100" in shell.run("tenants", "limits", "acme", "--weight", "0", code=1).stderr
    ring = Keyring(directory._store, 60)
    assert (ring.weight_of("acme"), ring.weight_of("nobody")) == (2.5, 1.0)


def test_a_task_is_shared_and_private_again(shell: Shell, directory: Directory) -> None:
    with closing(open_registry(shell.registry)) as registry:
        registry.publish("default", "e2e", write_prefix(make_prefix()), record={})
    assert "expected a published task" in shell.run("prefixes", "share", "none", "--everyone", code=1).stderr
    shared = shell.json("prefixes", "share", "e2e", "--tenant", "acme", "--tenant", "globex", "--download")
    assert shared == {"task": "default/e2e", "everyone": False, "tenants": ["acme", "globex"], "download": True}
    assert directory.load().shares["default/e2e"].reaches("acme")
    shell.run("prefixes", "delete", "e2e", "--yes")
    assert "with nobody" in shell.run("prefixes", "share", "e2e", "--nobody").stdout  # the name's share was left
    assert directory.load().shares == {}
    assert "with nobody" in shell.run("prefixes", "share", "none", "--nobody").stdout


def test_an_operators_secret_is_for_its_owner_and_its_hash_for_services(shell: Shell, tmp_path: Path) -> None:
    secret, hashed = tmp_path / "secret", tmp_path / "hash"
    files = ("--secret-file", str(secret), "--hash-file", str(hashed))
    shell.run("keys", "new-secret", *files)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and stat.S_IMODE(hashed.stat().st_mode) == 0o644
    presented = parse_secret(secret.read_text().strip())
    assert presented is not None
    assert hashed.read_text() == f"{presented.key_id} {presented.digest}\n"
    before = secret.read_text()
    assert "expected a new file" in shell.run("keys", "new-secret", *files, code=1).stderr
    assert secret.read_text() == before
    secret.unlink()
    assert "hash: expected a new file" in shell.run("keys", "new-secret", *files, code=1).stderr
    assert not secret.exists()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The keys that servers are shown."""
    found: list[str | None] = []

    class Seen:
        def __init__(self, url: str, *, api_key: str | None = None) -> None:
            found.append(api_key)
            raise OSError("seen")

    monkeypatch.setattr("prefixes.client.RemoteRegistry", Seen)
    return found


@pytest.mark.parametrize("given", ["option", "file", "variable", "variable's file"])
def test_a_key_is_presented_from_where_it_is_given(
    shell: Shell, tmp_path: Path, given: str, seen: list[str | None]
) -> None:
    secret, file = f"pfx_{new_id()}", tmp_path / "key"
    write_new(file, f"{secret}\n", 0o600)
    options = {"option": ("--key", secret), "file": ("--key", f"@{file}")}.get(given, ())
    if given.startswith("variable"):
        shell.env["PREFIXD_KEY"] = secret if given == "variable" else f"@{file}"
    result = shell.run("prefixes", "list", "--server", "http://localhost:1", *options, code=1)
    assert seen == [secret]
    assert ("other users of this machine" in result.stderr) == ("warning" in result.stderr) == (given == "option")
    assert secret not in result.output
    bad = shell.run("prefixes", "list", "--server", "http://localhost:1", "--key", "@/nowhere", code=1)
    assert "cannot read /nowhere" in bad.stderr
    assert "--key: expected --server" in shell.run("prefixes", "list", "--key", "@/nowhere", code=2).stderr


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
@pytest.mark.parametrize("given", ["option", "variable"])
def test_a_key_file_that_is_open_to_others_is_warned_of_once_and_taken(
    shell: Shell, tmp_path: Path, seen: list[str | None], mode: int, given: str
) -> None:
    secret, file = f"pfx_{new_id()}", tmp_path / "key"
    file.write_text(secret)
    file.chmod(mode)
    shell.env["PREFIXD_KEY"] = f"@{file}" if given == "variable" else None
    options = ("--key", f"@{file}") if given == "option" else ()
    result = shell.run("prefixes", "list", "--server", "http://localhost:1", *options, code=1)
    assert seen == [secret] and result.stderr.count("warning") == 1
    assert f"{file} is open to other users (mode {mode:04o}); expected 0600" in result.stderr
    assert secret not in result.output


def options_of(group: Any, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """Each command below ``group``, by all of its words, and its visible options."""
    for name in group.commands:
        _, command, _ = group.resolve_command(typer.Context(group), [name])
        if isinstance(command, TyperGroup):
            yield from options_of(command, f"{path}{name} ")
        else:
            shown = (one for one in command.params if not getattr(one, "hidden", False))
            yield path + name, {option for one in shown for option in one.opts}


def test_every_command_that_goes_to_a_service_takes_a_key() -> None:
    commands = dict(options_of(typer.main.get_command(prefixd.app)))
    clients = {name for name, options in commands.items() if options & {"--server", "--trainer"}}
    assert clients >= {"train", "evaluate", "prefixes list", "usage", "jobs submit"}
    assert {name for name, options in commands.items() if "--key" in options} == clients
