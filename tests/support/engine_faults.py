"""A fault at any one call between an engine's logits and its events, and what must hold then.

Owns the list of those calls, the requests that run meanwhile, and the check. Knows no test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from typing import Any, Final

import pytest

from prefixes.backbone import Backbone
from server.engine.engine import Engine
from server.engine.types import Event, Failed, Finished, GenerationRequest, Output
from tests.support.engine import Library, make_engine, run

# Every function of ours that is called for one row or one group between a step's logits and its events, by where its
# caller finds it. Those that are called once for all rows (the model, the search for all rows' best tokens) are not
# among them: they fail as the model does. Nor is the giving back of blocks: nothing can make up for that.
CALLS: Final = (
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


def requests(library: Library) -> list[GenerationRequest]:
    """Of every kind; their steps are shared, their prompts go in pieces."""
    kinds: list[dict[str, Any]] = [
        {}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "num_return_sequences": 2, "top_p": 0.9},
        {"logprobs": 2, "stop": ("never",)}, {"num_beams": 2, "no_repeat_ngram_size": 2},
        {"do_sample": True, "seed": 4, "repetition_penalty": 1.3, "top_k": 9, "no_repeat_ngram_size": 3},
    ]  # fmt: skip
    return [
        library.request(f"r{index}", index % 5, range(index, 9 * index + 4), max_new_tokens=10, **kind)
        for index, kind in enumerate(kinds)
    ]


def undisturbed(backbone: Backbone, library: Library) -> dict[str, tuple[Output, ...]]:
    """Each request's outputs when nothing fails."""
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
    """Events until nothing runs."""
    for _ in range(500):
        if not engine.requests:
            return
        yield from engine.step()
    raise AssertionError("no end in sight")


class FaultyRuns:
    """Runs the requests again and again, each time with a fault at another call."""

    def __init__(self, backbone: Backbone, library: Library) -> None:
        self._backbone, self._library = backbone, library
        self._undisturbed = undisturbed(backbone, library)

    @cached_property
    def calls(self) -> dict[str, int]:
        """How often each of CALLS is called when nothing fails."""
        engine = self._engine()
        with pytest.MonkeyPatch.context() as patched:
            probes = {call: Fault(call, None, patched) for call in CALLS}
            run_all(engine)
        return {call: probe.calls for call, probe in probes.items()}

    def check(self, call: str, at: int, *, told: bool) -> int:
        """Let call number ``at`` of ``call`` fail; how many other requests were compared.

        ``told``: at that call the request's end may have been told, if it is one that comes behind the events.

        The request whose call it was ends with one error that tells nothing. The others end once, with the outputs that
        they have undisturbed. Everything is given back, and the engine goes on.
        """
        engine = self._engine()
        with pytest.MonkeyPatch.context() as patched:
            Fault(call, at, patched)
            ends = run_all(engine)
        assert {name: len(events) for name, events in ends.items()} == dict.fromkeys(self._undisturbed, 1), "one end"
        failed = {name: end for name, [end] in ends.items() if isinstance(end, Failed)}
        self._check_failures(call, at, failed, told=told)
        finished = {name: end.outputs for name, [end] in ends.items() if isinstance(end, Finished)}
        for name, outputs in finished.items():
            expected = self._undisturbed[name]
            assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
            assert [output.text for output in outputs] == [output.text for output in expected]
        self._check_engine(engine)
        return len(finished)

    def _engine(self) -> Engine:
        made = make_engine(self._backbone, self._library, max_step_tokens=64, block_size=4)
        run(made, [self._library.request(f"warm {task}", task, [1], max_new_tokens=1) for task in range(5)])
        for request in requests(self._library):
            made.add(request)
        return made

    def _check_failures(self, call: str, at: int, failed: Mapping[str, Failed], *, told: bool) -> None:
        behind_events = call.startswith("server.engine.scheduling")
        assert len(failed) == 1 or (told and behind_events and not failed), (at, failed)
        for failure in failed.values():
            assert (failure.error.code, "secret" in failure.error.message) == ("engine_failure", False)

    def _check_engine(self, engine: Engine) -> None:
        engine.check_integrity()
        assert engine._ledger.available == engine._ledger.capacity
        assert engine._prefixes.idle()
        again = run(engine, [GenerationRequest("again", "default", r.token_ids, r.params, r.prefix, r.prefix_spec)
                             for r in requests(self._library)[:1]])  # fmt: skip
        assert isinstance(again["again"], Finished)
