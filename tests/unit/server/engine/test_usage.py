"""What a request's end says it took is what the engine computed for it, whatever ended it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from server.engine.engine import Engine
from server.engine.scheduling.plan import StepPlan
from server.engine.types import Event, Failed, Finished, FinishReason, GenerationRequest, PrefixKey, TokenEvent, Usage
from tests.support.engine import Library, make_engine, random_mix, tiny_backbone, wait_for_loads


class Broken(Library):
    """Its second task's prefix cannot be loaded."""

    def load(self, key: PrefixKey) -> Prefix:
        if key == self.keys[1]:
            raise OSError("broken")
        return super().load(key)


class Computed:
    """Notes what each call of the model computed for whom. One call in ``every`` fails."""

    def __init__(self, engine: Engine, noise: random.Random, every: int) -> None:
        self.inputs: Counter[str] = Counter()
        self.ran: set[str] = set()
        self._run, self._noise, self._every = engine._runner.run, noise, every
        engine._runner.run = self  # type: ignore[method-assign]

    def __call__(self, plan: StepPlan) -> Any:
        self.ran.update(group.request.request_id for group in plan.groups)
        if plan.rows and self._noise.randrange(self._every) == 0:
            raise RuntimeError("a fault of everybody's")
        result = self._run(plan)
        for row in plan.rows:
            name = row.group.request.request_id
            self.inputs[name] = max(self.inputs[name], min(row.end, row.group.prompt_length))
        return result


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder: Path = tmp_path_factory.mktemp("backbone")
    return tiny_backbone(folder)


@pytest.mark.parametrize("seed", range(3))
def test_usage_is_what_was_computed_under_random_aborts_faults_and_preemption(backbone: Backbone, seed: int) -> None:
    noise, library = random.Random(seed), Broken(backbone)
    engine = make_engine(
        backbone, library, blocks=45, max_rows=12, max_step_tokens=32, reuse_prompts=False, max_prefix_blocks=20
    )
    computed = Computed(engine, noise, every=40)
    requests = [one for one in random_mix(library, 90, 45, noise) if len(one.token_ids) < 100]
    by_id = {one.request_id: one for one in requests}
    events: list[Event] = []
    while requests or engine.requests:
        if requests and noise.random() < 0.5:
            engine.add(requests.pop())
        if noise.random() < 0.1 and engine._groups:
            events += engine.abort(noise.choice(sorted(engine._groups)))
        if noise.random() < 0.05 and engine._scheduler.running:
            engine._scheduler.preempt(noise.choice(engine._scheduler.running))
        wait_for_loads(engine)
        events += engine.step()
    streamed = Counter[str]()
    for event in events:
        if isinstance(event, TokenEvent):
            streamed[event.request_id] += len(event.token_ids)
    ends = [event for event in events if isinstance(event, Finished | Failed)]
    assert len(ends) == len(by_id)
    kinds = {(check(by_id[end.request_id], end, computed, streamed), end.usage is not None) for end in ends}
    assert kinds >= {("finished", True), ("aborted", True), ("failed", True), ("failed", False)}


def check(request: GenerationRequest, end: Finished | Failed, computed: Computed, streamed: Counter[str]) -> str:
    """Compare an end's usage with what was noted; how it ended."""
    name, usage = request.request_id, end.usage
    prefix = request.prefix_spec.length("decoder") if request.prefix_spec else 0
    if isinstance(end, Failed) and usage is None:
        assert name not in computed.ran
        return "failed"
    assert usage is not None
    assert usage.input_tokens == computed.inputs[name]
    assert usage.prefix_tokens == (prefix if name in computed.ran else 0)
    if request.params.num_beams == 1:
        assert usage.output_tokens == streamed[name]
    if isinstance(end, Failed):
        return "failed"
    given = sum(len(output.token_ids) for output in end.outputs)
    assert usage.output_tokens == given
    if FinishReason.ABORT in {output.finish_reason for output in end.outputs}:
        return "aborted"
    assert usage == Usage(len(request.token_ids), prefix, given)
    return "finished"


def test_an_abort_before_the_first_step_took_nothing(backbone: Backbone) -> None:
    engine = make_engine(backbone, library := Library(backbone))
    engine.add(library.request("r", 3, [1] * 40, max_new_tokens=5))
    [end] = engine.abort("r")
    assert isinstance(end, Finished) and end.usage == Usage(0, 0, 0)


def test_beams_that_are_given_up_are_not_billed_with_a_failure(backbone: Backbone) -> None:
    engine = make_engine(backbone, library := Library(backbone))
    engine.add(library.request("r", 0, [1] * 8, max_new_tokens=9, min_new_tokens=9, num_beams=4))
    for _ in range(3):
        engine.step()
    [end] = engine._end_with_error(list(engine._groups.values()), RuntimeError())
    assert isinstance(end, Failed) and end.usage == Usage(8, 0, 3)


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize("preempted", [False, True])
def test_what_was_computed_of_an_input_counts_when_its_blocks_are_gone(
    backbone: Backbone, fault: bool, preempted: bool
) -> None:
    engine = make_engine(backbone, library := Library(backbone), max_step_tokens=16, max_rows=8, reuse_prompts=False)
    engine.add(library.request("r", 0, [1] * 100, max_new_tokens=5))
    for _ in range(2):
        engine.step()
    [group] = engine._scheduler.running
    if preempted:
        engine._scheduler.preempt(group)
    [end] = engine._end_with_error([group], RuntimeError()) if fault else engine.abort("r")
    assert isinstance(end, Finished | Failed) and end.usage == Usage(32, 0, 0)
