"""What ``make serve`` and ``make trainer`` run, by ``make -n``: with the demo, and with a backbone that is fetched."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from tests.support.paths import ROOT


def commands(target: str, *variables: str) -> list[list[str]]:
    """The words of each command, without running one."""
    done = subprocess.run(
        ["make", "--dry-run", "--assume-old=install", target, *variables],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if ".venv/bin/prefixd" in line]


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def test_serving_the_demo_fetches_nothing() -> None:
    [serve] = commands("serve")
    assert (option(serve, "--backbone"), option(serve, "--registry")) == ("demo", "var/registry")
    [trainer] = commands("trainer")
    assert (option(trainer, "--backbone"), option(trainer, "--registry")) == (None, "var/registry")


def test_serving_a_fetched_backbone_fetches_it_before() -> None:
    fetch, serve = commands("serve", "BACKBONE=smollm2")
    assert fetch[1:] == ["backbones", "fetch", "smollm2"]
    assert (option(serve, "--backbone"), option(serve, "--registry")) == ("smollm2", "var/registry-smollm2")
    [trainer] = commands("trainer", "BACKBONE=smollm2")
    assert (option(trainer, "--backbone"), option(trainer, "--registry")) == ("smollm2", "var/registry-smollm2")


@pytest.mark.parametrize("target", ["serve", "trainer"])
def test_a_registry_that_is_named_is_the_one(target: str) -> None:
    assert option(commands(target, "BACKBONE=smollm2", "REGISTRY=mine")[-1], "--registry") == "mine"
