"""Lists the repository's pages and tells their prose from the rest. Knows no page's content."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.paths import ROOT

FOLDERS = ("docs", "prefixes", "server", "trainer", "tests", "benchmarks", "docker")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]


def prose(page: Path) -> list[str]:
    """The page's lines, empty in place of those within fenced blocks."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        fence = re.match(r"\s*```", line) is not None
        fenced = fenced != fence
        lines.append("" if fenced or fence else line)
    return lines
