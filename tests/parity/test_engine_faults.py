"""A fault at any call between logits and event ends one request: its neighbours stay exact, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from prefixes.backbone import Backbone
from server.engine.engine import Engine
from server.engine.types import Event, Failed, Finished, GenerationRequest, Output
from tests.support.engine import Library, make_engine, run, tiny_backbone

# Every function of ours that is called for one row or one group between a step's logits and its events, by where its
# caller finds it. Those that are called once for all rows (the model, the search for all rows' best tokens) are not
# among them: they fail as the model does. Nor is the giving back of blocks: nothing can make up for that.
CALLS = (
    "server.engine.postprocess:Postprocess._choice",
    "server.engine.postprocess:Postprocess._take_token",
    "server.engine.postprocess:Postprocess._choose_beams",
    "server.engine.postprocess:Postprocess._processed_scores",
    "server.engine.postprocess:processed",
    "server.engine.decoding.sampler:Sampler.choose",
    "server.engine.decoding.sampler:Sampler._draw",
    "server.engine.decoding.sampler:Sampler._processed",
    "server.engine.decoding.sampler:processed",
    "server.engine.decoding.sampler:warped",
    "server.engine.decoding.sampler:gumbel",
    "server.engine.decoding.sampler:raw_logprob",
    "server.engine.decoding.processors:_banned_by_ngrams",
    "server.engine.decoding.processors:_top_p",
    "server.engine.decoding.token_rules:TokenRules.cut_short",
    "server.engine.decoding.beams:BeamSearch.choose",
    "server.engine.decoding.beams:BeamSearch.advance",
    "server.engine.decoding.beams:BeamSearch._finish",
    "server.engine.decoding.beams:BeamSearch._satisfied",
    "server.engine.decoding.state:DecodingState.fork",
    "server.engine.decoding.detokenizer:Detokenizer.push",
    "server.engine.decoding.detokenizer:Detokenizer.finish",
    "server.engine.decoding.detokenizer:Detokenizer.take",
    "server.engine.reporter:Reporter.events",
    "server.engine.reporter:Reporter._note_token",
    "server.engine.reporter:Reporter._finished",
    "server.engine.reporter:Reporter._outputs",
    "server.engine.reporter:Reporter._usage",
    "server.engine.scheduling.row_blocks:RowBlocks.computed",
    "server.engine.scheduling.row_blocks:RowBlocks._remember",
    "server.engine.scheduling.row_blocks:RowBlocks._fork_prompt",
    "server.engine.scheduling.row_blocks:RowBlocks.continue_beams",
)
POSITIONS = ("first", "middle", "last")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)


@pytest.fixture(scope="module")
def library(backbone: Backbone) -> Library:
    return Library(backbone)


def requests(library: Library) -> list[GenerationRequest]:
    kinds: list[dict[str, Any]] = [
        {}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "num_return_sequences": 2, "top_p": 0.9},
        {"logprobs": 2, "stop": ("never",)}, {"num_beams": 2, "no_repeat_ngram_size": 2},
        {"do_sample": True, "seed": 4, "repetition_penalty": 1.3, "top_k": 9, "no_repeat_ngram_size": 3},
    ]  # fmt: skip
    return [
        library.request(f"r{index}", index % 5, range(index, 9 * index + 4), max_new_tokens=10, **kind)
        for index, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
def undisturbed(backbone: Backbone, library: Library) -> dict[str, tuple[Output, ...]]:
    ended = run(make_engine(backbone, library, max_step_tokens=64, block_size=4), requests(library))
    return {name: end.outputs for name, end in ended.items() if isinstance(end, Finished)}


class Fault:
    """Raises at call number ``at`` of ``call``; counts the calls."""

    def __init__(self, call: str, at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        module, _, name = call.partition(":")
        owner: Any = import_module(module)
        *parents, attribute = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        real, self.calls = getattr(owner, attribute), 0

        def counted(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                raise RuntimeError("a secret that no user may see")
            return real(*arguments, **named)

        monkeypatch.setattr(owner, attribute, counted)


def run_all(engine: Engine) -> dict[str, list[Finished | Failed]]:
    """Run to the end; the terminal events of each request."""
    ends: dict[str, list[Finished | Failed]] = {}
    for event in steps(engine):
        if isinstance(event, Finished | Failed):
            ends.setdefault(event.request_id, []).append(event)
    return ends


def steps(engine: Engine) -> Iterator[Event]:
    for _ in range(500):
        if not engine.requests:
            return
        yield from engine.step()
    raise AssertionError("no end in sight")


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("call", CALLS)
def test_a_fault_between_logits_and_event_is_one_requests_own(
    backbone: Backbone, library: Library, undisturbed: dict[str, tuple[Output, ...]], call: str, position: str
) -> None:
    def engine() -> Engine:
        made = make_engine(backbone, library, max_step_tokens=64, block_size=4)
        run(made, [library.request(f"warm {task}", task, [1], max_new_tokens=1) for task in range(5)])
        for request in requests(library):
            made.add(request)
        return made

    counted, disturbed = engine(), engine()
    with pytest.MonkeyPatch.context() as patched:
        probe = Fault(call, None, patched)
        run_all(counted)
    assert probe.calls > 0, "nothing calls it any more: name what is called instead"
    at = {"first": 1, "middle": probe.calls // 2 + 1, "last": probe.calls}[position]
    with pytest.MonkeyPatch.context() as patched:
        Fault(call, at, patched)
        ends = run_all(disturbed)
    assert {name: len(events) for name, events in ends.items()} == dict.fromkeys(undisturbed, 1), "one end for each"
    failed = {name: end for name, [end] in ends.items() if isinstance(end, Failed)}
    told_before = call.startswith("server.engine.scheduling")  # its end may be told by then: blocks come behind events
    assert len(failed) == 1 or (told_before and position == "last"), failed
    for failure in failed.values():
        assert (failure.error.code, "secret" in failure.error.message) == ("engine_failure", False)
    for name, [end] in ends.items():
        if isinstance(end, Finished):
            assert [output.token_ids for output in end.outputs] == [out.token_ids for out in undisturbed[name]]
            assert [output.text for output in end.outputs] == [out.text for out in undisturbed[name]]
    disturbed.check_integrity()
    assert disturbed._ledger.available == disturbed._ledger.capacity
    assert disturbed._prefixes.idle()
    again = run(disturbed, [GenerationRequest("again", "default", r.token_ids, r.params, r.prefix, r.prefix_spec)
                            for r in requests(library)[:1]])  # fmt: skip
    assert isinstance(again["again"], Finished)
