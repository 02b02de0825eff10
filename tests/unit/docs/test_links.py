"""Every link from one page to another, or to a file of the repository, leads somewhere; its anchor too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.pages import PAGES, prose


def links(page: Path) -> list[str]:
    """The targets of ``[text](target)`` that are no addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.+?)\s*$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_there_are_links() -> None:
    assert sum(len(links(page)) for page in PAGES) > 50
