"""Prose ends at 120 characters: in every page, and in every docstring of the packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pages import PAGES, prose
from tests.support.paths import ROOT

WIDTH = 120


def too_long(line: str) -> bool:
    """A table's line, an image and a lone address may be longer."""
    exempt = line.lstrip().startswith(("|", "![")) or " " not in line.strip()
    return len(line) > WIDTH and not exempt


def docstring_lines() -> Iterator[tuple[str, str]]:
    """(place, line) of every docstring: of modules, classes, functions and documented values."""
    for package in ("prefixes", "server", "trainer"):
        for path in sorted((ROOT / package).rglob("*.py")):
            source = path.read_text()
            lines = source.splitlines()
            for node in ast.walk(ast.parse(source)):
                match node:
                    case ast.Expr(value=ast.Constant(value=str())):
                        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                            yield f"{path.relative_to(ROOT)}:{number}", lines[number - 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_prose_of_a_page_is_wrapped(page: Path) -> None:
    long = [f"{page.name}:{number}" for number, line in enumerate(prose(page), 1) if too_long(line)]
    assert long == [], f"expected lines of at most {WIDTH} characters"


def test_docstrings_are_wrapped() -> None:
    found = list(docstring_lines())
    assert len(found) > 1000
    assert [place for place, line in found if too_long(line)] == [], f"expected lines of at most {WIDTH} characters"


def test_a_long_line_of_prose_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```\n{'code ' * 30}\n```\n| {'cell ' * 30}|\n<https://{'x' * 130}>\n{'word ' * 30}\n")
    assert [number for number, line in enumerate(prose(page), 1) if too_long(line)] == [6]
