"""A fault at any call between logits and event ends one request: its neighbours stay exact, and nothing is lost.

The first, a middle and the last of each call; ``tests/faults`` has them at many more.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.engine import Library, tiny_backbone
from tests.support.engine_faults import CALLS, FaultyRuns

POSITIONS = ("first", "middle", "last")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> FaultyRuns:
    backbone = tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)
    return FaultyRuns(backbone, Library(backbone))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("call", CALLS)
def test_a_fault_between_logits_and_event_is_one_requests_own(runs: FaultyRuns, call: str, position: str) -> None:
    calls = runs.calls[call]
    assert calls > 0, "nothing calls it any more: name what is called instead"
    at = {"first": 1, "middle": calls // 2 + 1, "last": calls}[position]
    runs.check(call, at, told=position == "last")
