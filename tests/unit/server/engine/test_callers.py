"""What the engine says of its callers: who runs, who waits, and whose request ended how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefixes.backbone import Backbone
from server.engine.observer import SilentObserver
from server.engine.types import FinishReason, Usage
from tests.support.engine import Library, make_engine, tiny_backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder: Path = tmp_path_factory.mktemp("backbone")
    return tiny_backbone(folder, torch.float64)


class Ends(SilentObserver):
    def __init__(self) -> None:
        self.seen: list[tuple[str | None, str, FinishReason | None, Usage]] = []

    def on_finish(
        self, task: str | None, caller: str, reason: FinishReason | None, usage: Usage, seconds: float
    ) -> None:
        self.seen.append((task, caller, reason, usage))


def test_stats_name_the_callers_that_run_and_wait_and_nobody_else(backbone: Backbone) -> None:
    library = Library(backbone)
    engine = make_engine(backbone, library, max_rows=3)
    for name, caller in (("a", "acme"), ("b", "acme"), ("c", "globex"), ("d", "globex"), ("e", "globex")):
        engine.add(replace(library.request(name, 0, [1, 2], max_new_tokens=3, min_new_tokens=3), caller=caller))
    assert (engine.stats().running_by_caller, engine.stats().waiting_by_caller) == ({}, {"acme": 2, "globex": 3})
    engine.step()
    stats = engine.stats()
    assert sum(stats.running_by_caller.values()) == stats.running == 3
    both = {who: stats.running_by_caller[who] + stats.waiting_by_caller.get(who, 0) for who in ("acme", "globex")}
    assert both == {"acme": 2, "globex": 3}
    while engine.has_work:
        engine.step()
    assert (engine.stats().running_by_caller, engine.stats().waiting_by_caller) == ({}, {})
    engine.close()


def test_an_end_is_reported_with_who_asked_and_not_with_whose_task_it_is(backbone: Backbone) -> None:
    library, ends = Library(backbone), Ends()
    engine = make_engine(backbone, library, observer=ends)
    wanted = {"max_new_tokens": 2, "min_new_tokens": 2}
    engine.add(replace(library.request("whole", 0, [1, 2, 3], **wanted), task="acme/e2e", caller="globex"))
    engine.add(replace(library.request("cut", 0, [1, 2], **wanted), task="acme/e2e", caller="initech"))
    engine.step()
    engine.abort("cut")
    while engine.has_work:
        engine.step()
    assert {(task, caller, reason, usage.input_tokens) for task, caller, reason, usage in ends.seen} == {
        ("acme/e2e", "globex", FinishReason.LENGTH, 3),
        ("acme/e2e", "initech", FinishReason.ABORT, 2),
    }
    engine.close()
