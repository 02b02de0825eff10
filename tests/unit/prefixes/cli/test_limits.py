"""``prefixd tenants limits``, ``keys limits`` and the limits of ``keys create``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from prefixes.registry import open_registry
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import NAMES, TENANT_LIMITS, Limits
from tests.unit.prefixes.cli.test_keys import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "registry")


def table(text: str) -> dict[str, list[str]]:
    """The rows of a table of limits: what is set, and what is in force."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}


@pytest.mark.parametrize("name", NAMES)
def test_every_limit_has_an_option_of_tenants_and_of_keys(shell: Shell, name: str) -> None:
    option = f"--{name.replace('_', '-')}"
    made = shell.json("keys", "create", "--tenant", "acme", "--scopes", "read", option, "5")
    assert made["limits"] == {name: 5}
    assert shell.json("tenants", "limits", "acme", option, "4")["limits"] == {name: 4}
    assert shell.json("keys", "limits", made["id"], option, "3")["limits"] == {name: 3}
    with closing(open_registry(shell.registry)) as registry:
        state = Directory(registry.tenancy).load()
    assert state.tenants["acme"].limits == Limits(**{name: 4})
    assert state.keys[made["id"]].limits == Limits(**{name: 3})


def test_without_an_option_the_limits_are_shown_and_nothing_changes(shell: Shell) -> None:
    shell.run("tenants", "create", "acme")
    shell.run("tenants", "limits", "acme", "--requests-per-minute", "60", "--weight", "2")
    shown = table(shell.run("tenants", "limits", "acme").stdout)
    assert shown.keys() == {"weight", *NAMES}
    assert (shown["weight"], shown["requests_per_minute"]) == (["2", "2"], ["60", "60"])
    assert shown["registry_tasks"] == ["-", str(TENANT_LIMITS.registry_tasks)]
    told = shell.json("tenants", "limits", "acme")
    assert (told["limits"], told["weight"]) == ({"requests_per_minute": 60}, 2)
    assert told["limits_in_force"] == {"requests_per_minute": 60, **dict(TENANT_LIMITS.given())}
    with closing(open_registry(shell.registry)) as registry:
        changes = Directory(registry.tenancy).load().changes
    assert [change.action for change in changes] == ["tenant-create", "tenant-limits"]


def test_a_limit_is_taken_away_and_the_others_stay(shell: Shell) -> None:
    shell.run("tenants", "create", "acme")
    shell.run("tenants", "limits", "acme", "--open-jobs", "1", "--num-beams", "2", "--tokens-per-day", "3")
    left = shell.json("tenants", "limits", "acme", "--unset", "open-jobs", "--unset", "num_beams")
    assert left["limits"] == {"tokens_per_day": 3}
    assert left["limits_in_force"]["open_jobs"] == TENANT_LIMITS.open_jobs
    assert "expected some of requests_per_minute" in shell.run(
        "tenants", "limits", "acme", "--unset", "beams", code=1
    ).stderr  # fmt: skip


def test_a_key_above_its_tenant_is_told_that_the_tenants_limit_holds(shell: Shell) -> None:
    shell.run("tenants", "create", "acme")
    shell.run("tenants", "limits", "acme", "--requests-per-minute", "60")
    options = ("keys", "create", "--tenant", "acme", "--scopes", "read", "--requests-per-minute")
    assert "holds" not in shell.run(*options, "60").stderr
    told = "requests_per_minute: 90 is above what tenant acme has; 60 holds"
    assert told in shell.run(*options, "90").stderr
    key = shell.json(*options, "90")
    shown = shell.run("keys", "limits", key["id"])
    assert table(shown.stdout)["requests_per_minute"] == ["90", "60"] and told in shown.stderr
