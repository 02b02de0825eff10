"""What every part of the campaign has: its figures, and a tiny backbone whose answers are the same on every server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.figures import Figures
from tests.support.server import TinyWorld, make_world


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    """The test's own, under its module's name; shown at the end of the run, also when the test fails."""
    made = Figures(Path(request.node.path).stem.removeprefix("test_").replace("_", " "))
    yield made
    request.node.user_properties.append(made.as_property())


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A tiny GPT-2: one family is enough where no model is meant."""
    return make_world(tmp_path_factory.mktemp("backbone"))
