"""The machines that the scheduling tests drive; a file with settings of its own gives them in its own ``make``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.scheduling import Machine, Make


@pytest.fixture
def make() -> Iterator[Make]:
    """Machines with the settings that are given, closed when the test has ended."""
    made: list[Machine] = []

    def machine(blocks: int, **settings: Any) -> Machine:
        made.append(Machine(blocks, **settings))
        return made[-1]

    yield machine
    for one in made:
        one.close()
