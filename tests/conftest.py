"""Marks every test by its folder, so that ``pytest -m parity`` and the like work without decorators."""

from __future__ import annotations

from pathlib import Path

import pytest

KINDS = ("unit", "contract", "parity", "e2e")
ROOT = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(ROOT).parts[0]
        if kind in KINDS:
            item.add_marker(kind)
