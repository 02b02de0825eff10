"""Every ``prefixd`` command in the documentation exists, with every option that it is given there."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile
from typing import Any

import pytest
import typer
import typer.main
from typer.core import TyperGroup

import prefixd
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """(page, command line) of all fenced blocks, continued lines joined, comments cut off."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("prefixd "):
                    found.append((page.name, line.partition("   #")[0].strip()))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_documented_command_has_its_options(page: str, line: str) -> None:
    command: Any = typer.main.get_command(prefixd.app)
    alone = takewhile(lambda word: word not in ("|", ">", "&&"), shlex.split(line)[1:])
    words = [word.strip("[]") for word in alone]  # brackets: what may be left out
    while words and isinstance(command, TyperGroup):
        assert words[0] in command.commands, f"{page}: no command {words[0]!r} in {line!r}"
        _, command, words = command.resolve_command(typer.Context(command), words)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= known, f"{page}: {given - known} in {line!r}"


def test_there_are_commands_in_the_documentation() -> None:
    assert len(commands()) > 20
