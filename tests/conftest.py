"""Marks every test by its folder, so that ``pytest -m parity`` and the like work without decorators.

Shows the figures of the campaign of faults behind a run that had some.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.kernels.threads import configure_threads
from tests.support.figures import shown

configure_threads(1)  # before torch is loaded: the workers have a core each, and a second thread would take turns

KINDS = ("unit", "contract", "parity", "e2e", "faults")
ROOT = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(ROOT).parts[0]
        if kind in KINDS:
            item.add_marker(kind)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Here, and not with the campaign: the process that writes the summary need not be one that collects tests."""
    lines = list(shown(report for reports in terminalreporter.stats.values() for report in reports))
    if lines:
        terminalreporter.section("campaign")
        for line in lines:
            terminalreporter.write_line(line)
