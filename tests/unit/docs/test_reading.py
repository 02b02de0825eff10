"""docs/reading.md names files and functions that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "reading.md").read_text()


def named() -> Iterator[tuple[str, str]]:
    """(file, class or function or method) of every "Where:" in the page."""
    for line in re.findall(r"Where: (.+(?:\n.+)*)", PAGE):
        file = ""
        for word in re.findall(r"`([^`]+)`", line):
            if word.endswith(".py"):
                file = word
            else:
                yield file, word


def defined(file: str) -> set[str]:
    """The classes, functions and methods of a file; none where there is no such file."""
    path = ROOT / file
    if not path.is_file():
        return set()
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            members = [member for member in node.body if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {node.name, *(f"{node.name}.{member.name}" for member in members)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
    return found


def test_every_file_and_function_that_the_page_names_exists() -> None:
    wanted = list(named())
    assert len(wanted) > 60
    assert {f"{file} {name}" for file, name in wanted if name not in defined(file)} == set()
