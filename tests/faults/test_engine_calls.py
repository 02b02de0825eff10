"""A fault at the calls between logits and event, at random ones of their numbers."""

from __future__ import annotations

import random
from typing import Final

import pytest
import torch

from tests.support.engine import Library, tiny_backbone
from tests.support.engine_faults import CALLS, FaultyRuns
from tests.support.figures import Figures

EACH: Final = 2
"""Of one function's calls so many fail, one in each run: the first, a middle and the last do in ``tests/parity``."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> FaultyRuns:
    backbone = tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)
    return FaultyRuns(backbone, Library(backbone))


@pytest.mark.parametrize("call", CALLS)
def test_a_fault_at_any_call_is_one_requests_own(runs: FaultyRuns, figures: Figures, call: str) -> None:
    calls = runs.calls[call]
    numbers = random.Random(call).sample(range(1, calls + 1), min(EACH, calls))
    for at in sorted(numbers):
        figures.cases += 1
        figures.compared += runs.check(call, at, told=True)
