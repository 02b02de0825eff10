"""Memory that runs out at any call of a step ends that step's rows, not the engine: the rest waits and is served.

``test_engine_faults`` has the calls that are one request's own. Here are those that are everybody's: queues, blocks,
prefixes, the batch, the reports. A call also raises when it has done its work, so that what it gives is lost.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from prefixes.backbone import Backbone
from server.engine.engine import Engine
from server.engine.types import Failed, Finished, GenerationRequest
from tests.support.bart import tiny_bart
from tests.support.bart_library import BartLibrary
from tests.support.engine import Library, make_engine, run, tiny_backbone
from tests.support.step_faults import Moment, assert_at_rest, fault, serve

SCHEDULING = "server.engine.scheduling"
CALLS = (
    f"{SCHEDULING}.scheduler:Scheduler.schedule",
    f"{SCHEDULING}.scheduler:Scheduler.update",
    f"{SCHEDULING}.scheduler:Scheduler.runnable",
    f"{SCHEDULING}.scheduler:Scheduler.preempt",
    f"{SCHEDULING}.entrance:Entrance.turns",
    f"{SCHEDULING}.entrance:Entrance.take",
    f"{SCHEDULING}.entrance:Entrance._try_admit",
    f"{SCHEDULING}.entrance:Entrance._take_prefix",
    f"{SCHEDULING}.entrance:Entrance.take_in_loads",
    f"{SCHEDULING}.entrance:Entrance._reserve",
    f"{SCHEDULING}.scheduler:Scheduler._fitting_rows",
    f"{SCHEDULING}.scheduler:Scheduler._candidates",
    f"{SCHEDULING}.entrance:Entrance.wait",
    f"{SCHEDULING}.entrance:Entrance.stop_waiting",
    f"{SCHEDULING}.scheduler:Scheduler._stop_running",
    f"{SCHEDULING}.scheduler:Scheduler._end",
    f"{SCHEDULING}.prefill:PrefillBudget.chunks",
    f"{SCHEDULING}.prefill:PrefillBudget.ran",
    f"{SCHEDULING}.encoding:EncoderBudget.choose",
    f"{SCHEDULING}.waiting:WaitingGroups.add",
    f"{SCHEDULING}.waiting:WaitingGroups.remove",
    f"{SCHEDULING}.waiting:WaitingGroups.loaded",
    f"{SCHEDULING}.waiting:WaitingGroups._insert",
    f"{SCHEDULING}.row_blocks:RowBlocks.find",
    f"{SCHEDULING}.row_blocks:RowBlocks.begin",
    f"{SCHEDULING}.row_blocks:RowBlocks.give_up",
    f"{SCHEDULING}.row_blocks:RowBlocks.growth",
    f"{SCHEDULING}.row_blocks:RowBlocks.grow",
    f"{SCHEDULING}.row_blocks:RowBlocks.computed",
    f"{SCHEDULING}.row_blocks:RowBlocks._remember",
    f"{SCHEDULING}.row_blocks:RowBlocks._fork_prompt",
    f"{SCHEDULING}.row_blocks:RowBlocks.continue_beams",
    f"{SCHEDULING}.row_blocks:RowBlocks.release",
    f"{SCHEDULING}.row_blocks:RowBlocks.release_row",
    "server.engine.memory.blocks:BlockLedger.allocate",
    "server.engine.memory.blocks:BlockLedger._make_room",
    "server.engine.memory.blocks:BlockLedger.share",
    "server.engine.memory.blocks:BlockLedger.release",
    "server.engine.memory.blocks:BlockLedger.keep",
    "server.engine.memory.prompt_reuse:PromptReuse.match",
    "server.engine.memory.prompt_reuse:PromptReuse.remember",
    "server.engine.prefixes.store:PrefixStore.settle",
    "server.engine.prefixes.store:PrefixStore.want",
    "server.engine.prefixes.store:PrefixStore.unwant",
    "server.engine.prefixes.store:PrefixStore.status",
    "server.engine.prefixes.store:PrefixStore.reclaim",
    "server.engine.prefixes.store:PrefixStore.try_acquire",
    "server.engine.prefixes.store:PrefixStore.release",
    "server.engine.prefixes.store:PrefixStore.may_claim",
    "server.engine.prefixes.store:PrefixStore.claim",
    "server.engine.prefixes.store:PrefixStore.unclaim",
    "server.engine.prefixes.store:PrefixStore._take_in",
    "server.engine.prefixes.store:PrefixStore._make_resident",
    "server.engine.prefixes.store:PrefixStore._evict",
    "server.engine.prefixes.store:PrefixStore._copy",
    "server.engine.prefixes.store:PrefixStore._drop_copy",
    "server.engine.prefixes.store:PrefixStore._drop_if_unused",
    "server.engine.prefixes.sets:PrefixSets._file",
    "server.engine.prefixes.sets:PrefixSets._fits",
    "server.engine.prefixes.entry:EntrySet.put",
    "server.engine.prefixes.placement:Placement.read",
    "server.engine.prefixes.placement:Placement.release",
    "server.engine.prefixes.loader:PrefixLoader.ask",
    "server.engine.prefixes.loader:PrefixLoader.take_ended",
    "server.engine.prefixes.loader:PrefixLoader.outcome",
    "server.engine.prefixes.loader:PrefixLoader.drop",
    "server.engine.runner:Runner.run",
    "server.engine.runner:Runner.copy_blocks",
    "server.engine.runner:Runner.decoder",
    "server.engine.runner:Runner.forget_encoding",
    "server.engine.batch:BatchBuilder.decoder",
    "server.engine.postprocess:Postprocess.__call__",
    "server.engine.reporter:Reporter.admitted",
    "server.engine.reporter:Reporter.stepped",
    "server.engine.reporter:Reporter.events",
)
ENCODER_CALLS = (
    f"{SCHEDULING}.encoding:EncoderBudget.choose",
    f"{SCHEDULING}.encoding:EncoderBudget.ran",
    f"{SCHEDULING}.row_blocks:RowBlocks.encoded",
    f"{SCHEDULING}.row_blocks:RowBlocks.begin",
    "server.engine.memory.blocks:BlockLedger.allocate",
    "server.engine.memory.prompt_reuse:PromptReuse.match_input",
    "server.engine.memory.prompt_reuse:PromptReuse.remember_input",
    "server.engine.prefixes.placement:Placement.release",
    "server.engine.runner:Runner.encode",
    "server.engine.runner:Runner.decoder",
    "server.engine.runner:Runner._joined",
    "server.engine.batch:BatchBuilder.encoder",
)
ERRORS = (MemoryError, RecursionError, torch.OutOfMemoryError)
MOMENTS: tuple[Moment, ...] = ("before", "after")
MAX_ROWS = 5


class World:
    """A backbone's requests, more than fit in rows and in blocks, and what they give undisturbed.

    Some wait for each other, some are preempted, prefixes are evicted, one of a preempted request too.
    """

    def __init__(self, backbone: Backbone, library: Library, **config: Any) -> None:
        self.backbone, self.library, self.config = backbone, library, config
        self.undisturbed = tokens(serve(self.loaded()))
        assert len(self.undisturbed) == len(self.requests())

    def requests(self) -> list[GenerationRequest]:
        kinds: list[dict[str, Any]] = [
            {}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "num_return_sequences": 2}, {"logprobs": 2}, {},
            {"num_beams": 2}, {"do_sample": True, "seed": 4, "num_return_sequences": 2}, {}, {}, {},
        ]  # fmt: skip
        return [
            self.library.request(
                f"r{index}", index % 5, range(3 * index + 4), max_new_tokens=16, min_new_tokens=16, **kind
            )
            for index, kind in enumerate(kinds)
        ]

    def loaded(self) -> Engine:
        """An engine with all requests waiting."""
        engine = make_engine(
            self.backbone, self.library, block_size=4, max_rows=MAX_ROWS, max_step_tokens=24, deterministic=True,
            **self.config,
        )  # fmt: skip
        for request in self.requests():
            engine.add(request)
        return engine


def tokens(ends: dict[str, Finished | Failed]) -> dict[str, list[tuple[tuple[int, ...], str]]]:
    """The tokens and texts of those that finished."""
    return {
        name: [(output.token_ids, output.text) for output in end.outputs]
        for name, end in ends.items()
        if isinstance(end, Finished)
    }


def check(world: World, call: str) -> None:
    """The first, a middle and the last of the calls raise, each in a run of its own."""
    with fault(call, None) as calls:
        serve(world.loaded())
    assert calls[0] > 0, "nothing calls it any more: name what is called instead"
    numbers = sorted({1, calls[0] // 2 + 1, calls[0]})
    for moment, (at, error) in itertools.product(MOMENTS, zip(numbers, ERRORS, strict=False)):
        engine, place = world.loaded(), f"{moment} call {at}"
        with fault(call, at, moment, error):
            ends = serve(engine)
        assert ends.keys() == world.undisturbed.keys(), f"an end for each, {place}"
        failed = [end.error for end in ends.values() if isinstance(end, Failed)]
        assert len(failed) <= MAX_ROWS, f"what waits is served: no more than one step's rows fail, {place}"
        assert {(one.code, "secret" in one.message) for one in failed} <= {("engine_failure", False)}, place
        finished = tokens(ends)
        assert finished == {name: world.undisturbed[name] for name in finished}, place
        assert_at_rest(engine)
        again = tokens(run(engine, world.requests()[:3]))  # the same engine, as if nothing had happened
        assert again == {name: world.undisturbed[name] for name in ("r0", "r1", "r2")}, place


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> World:
    backbone = tiny_backbone(tmp_path_factory.mktemp("gpt2"), torch.float64)
    return World(backbone, Library(backbone), blocks=30, max_prefix_blocks=11)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> World:
    backbone = tiny_bart(tmp_path_factory.mktemp("bart"), torch.float64)
    return World(backbone, BartLibrary(backbone), blocks=44, max_prefix_blocks=18, max_step_ms=0.001)


@pytest.mark.parametrize("call", CALLS)
def test_memory_that_runs_out_in_a_step_ends_its_rows_and_no_others(gpt2: World, call: str) -> None:
    check(gpt2, call)


@pytest.mark.parametrize("call", ENCODER_CALLS)
def test_with_an_encoder_too_memory_that_runs_out_ends_a_steps_rows_and_no_others(bart: World, call: str) -> None:
    check(bart, call)
