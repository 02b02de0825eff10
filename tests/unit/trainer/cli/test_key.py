"""``--key`` of ``prefixd train`` and ``prefixd evaluate``: the same as every other client's."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import prefixd
from prefixes.errors import RegistryUnavailable
from prefixes.tenancy.hash_file import write_new
from prefixes.tenancy.secret import new_id
from tests.support.trainer import toy_pairs, write_jsonl
from trainer.training import publish

NOWHERE: dict[str, str | None] = dict.fromkeys(("PREFIXD_KEY", "PREFIXD_REGISTRY", "PREFIXD_SERVER"))
COMMANDS = ("train", "evaluate")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The keys that servers are shown; then they are away."""
    found: list[str | None] = []

    class Away:
        def __init__(self, url: str, *, api_key: str | None = None) -> None:
            found.append(api_key)
            raise RegistryUnavailable("seen")

    monkeypatch.setattr("prefixes.client.RemoteRegistry", Away)
    monkeypatch.setattr(publish, "RemoteRegistry", Away)
    return found


def run(folder: Path, command: str, *more: str) -> Result:
    write_jsonl(folder / "data.jsonl", toy_pairs(6))
    return CliRunner().invoke(
        prefixd.app, [command, "--task", "toy", "--data", str(folder / "data.jsonl"), *more], env=NOWHERE
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("literal", [False, True])
def test_the_key_is_shown_to_the_server_and_a_literal_one_is_warned_of(
    tmp_path: Path, seen: list[str | None], command: str, literal: bool
) -> None:
    secret, file = f"pfx_{new_id()}", tmp_path / "key"
    write_new(file, f"{secret}\n", 0o600)
    result = run(tmp_path, command, "--server", "http://server", "--key", secret if literal else f"@{file}")
    assert (result.exit_code, seen) == (1, [secret]), result.output
    assert ("other users of this machine" in result.stderr) == literal
    assert secret not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_key_without_a_server_is_wrong_usage(tmp_path: Path, seen: list[str | None], command: str) -> None:
    result = run(tmp_path, command, "--registry", str(tmp_path / "registry"), "--key", "@key")
    assert (result.exit_code, "--key: expected --server" in result.stderr, seen) == (2, True, []), result.output
