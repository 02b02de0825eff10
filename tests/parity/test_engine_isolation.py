"""One bad row never harms its neighbours: their outputs stay exact, everybody ends once, every block comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from prefixes.errors import InputTooLong, InvalidArtifact, InvalidParameter
from server.engine import postprocess
from server.engine.engine import Engine
from server.engine.memory.prompt_reuse import chain_root
from server.engine.row import GroupState
from server.engine.types import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Output,
    PrefixKey,
    SamplingParams,
    TokenEvent,
)
from tests.support.engine import (
    KERNELS,
    Counts,
    Library,
    joined_text,
    kernels,
    make_engine,
    run,
    tiny_backbone,
    wait_for_loads,
)
from tests.support.prefixes import make_prefix

POSITIONS = ["first", "middle", "last"]
LOAD_ERROR, OVERFLOW, GEOMETRY, CRASH = (PrefixKey("default", f"bad {index}") for index in range(4))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)


class BadLibrary(Library):
    """Good prefixes, and some that fail in every way there is; loads of held keys wait."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        good = make_prefix(backbone.spec, length=20, seed=99)
        self.gate = threading.Event()
        self.held: set[PrefixKey] = set()
        self.prefixes[OVERFLOW] = Prefix(good.spec, {name: t.double() * 1e200 for name, t in good.tensors.items()})
        self.prefixes[GEOMETRY] = make_prefix(length=20)  # of another backbone: its layers do not fit the pool
        self.prefixes[LOAD_ERROR] = self.prefixes[CRASH] = good

    def load(self, key: PrefixKey) -> Prefix:
        if key in self.held:
            assert self.gate.wait(30)
        if key == LOAD_ERROR:
            raise InvalidArtifact("digest: expected one, got another")
        if key == CRASH:
            raise RuntimeError("a secret that no user may see")
        return super().load(key)

    def bad(self, key: PrefixKey, token_ids: tuple[int, ...] = (5, 6, 7), **params: Any) -> GenerationRequest:
        spec = self.prefixes[key].spec
        return GenerationRequest("bad", "default", token_ids, SamplingParams(**params), key, spec)


@pytest.fixture
def library(backbone: Backbone) -> BadLibrary:
    return BadLibrary(backbone)


def neighbours(library: Library) -> list[GenerationRequest]:
    kinds: list[dict[str, Any]] = [
        {}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "num_return_sequences": 2}, {"logprobs": 2},
        {"do_sample": True, "seed": 4, "repetition_penalty": 1.3},
    ]
    return [
        library.request(
            f"good {index}", index, range(index, 9 * index + 4), max_new_tokens=12, min_new_tokens=12, **kind
        )
        for index, kind in enumerate(kinds)
    ]


def placed(requests: list[GenerationRequest], bad: GenerationRequest, position: str) -> list[GenerationRequest]:
    index = {"first": 0, "middle": 2, "last": len(requests)}[position]
    return [*requests[:index], bad, *requests[index:]]


@pytest.fixture(scope="module")
def alone(backbone: Backbone) -> dict[str, tuple[Output, ...]]:
    """Each neighbour's outputs when it is alone."""
    library, outputs = Library(backbone), {}
    for request in neighbours(library):
        done = run(make_engine(backbone, library), [request])[request.request_id]
        assert isinstance(done, Finished)
        outputs[request.request_id] = done.outputs
    return outputs


def check_neighbours(ended: dict[str, Finished | Failed], alone: dict[str, tuple[Output, ...]]) -> None:
    for name, outputs in alone.items():
        done = ended[name]
        assert isinstance(done, Finished), done
        for mine, expected in zip(done.outputs, outputs, strict=True):
            assert (mine.token_ids, mine.text) == (expected.token_ids, expected.text)
            assert mine.score == (None if expected.score is None else pytest.approx(expected.score, rel=1e-6))


def check_idle(engine: Engine) -> None:
    """Nothing is held: whatever is resident could be given back."""
    engine.check_integrity()
    assert engine.requests == 0
    assert engine._ledger.available == engine._ledger.capacity
    assert engine._prefixes.idle()
    assert not engine.has_work


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("key", "code"),
    [(LOAD_ERROR, "invalid_artifact"), (CRASH, "engine_failure"), (OVERFLOW, "engine_failure"),
     (GEOMETRY, "engine_failure")],
    ids=["load error", "loader crash", "overflow", "geometry"],
)
def test_a_bad_prefix_fails_its_own_request(
    backbone: Backbone, library: BadLibrary, alone: dict[str, tuple[Output, ...]], key: PrefixKey, code: str,
    position: str, name: str,
) -> None:
    engine = make_engine(backbone, library, max_step_tokens=16, max_rows=12, kernels=kernels(name, torch.float64))
    ended = run(engine, placed(neighbours(library), library.bad(key), position))
    failed = ended["bad"]
    assert isinstance(failed, Failed)
    assert failed.error.code == code
    assert "secret" not in failed.error.message
    check_neighbours(ended, alone)
    check_idle(engine)


@pytest.mark.parametrize("params", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_what_was_computed_beside_infinities_is_not_remembered(
    backbone: Backbone, library: BadLibrary, params: dict[str, Any]
) -> None:
    """The chunks of a long prompt were remembered before its logits were seen: the next request began with NaN."""
    engine = make_engine(backbone, library, max_step_tokens=16, max_rows=4)
    bad = library.bad(OVERFLOW, tuple(range(60)), max_new_tokens=2, **params)
    good = library.request("good", 1, range(60), max_new_tokens=2)
    ended = run(engine, [bad, good])
    assert isinstance(ended["bad"], Failed)
    assert isinstance(ended["good"], Finished)
    reuse = engine._scheduler._blocks._reuse
    assert reuse is not None
    assert reuse.match(chain_root(bad), bad.token_ids)[0] == []
    found, _ = reuse.match(chain_root(good), good.token_ids)
    assert len(found) == 59 // 16
    engine._ledger.release(found)


@pytest.mark.parametrize("params", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_a_group_of_rows_that_are_not_finite_fails_once(
    backbone: Backbone, library: BadLibrary, alone: dict[str, tuple[Output, ...]], params: dict[str, Any]
) -> None:
    engine = make_engine(backbone, library, max_rows=12)
    ended = run(engine, placed(neighbours(library), library.bad(OVERFLOW, **params), "middle"))
    assert isinstance(ended["bad"], Failed)
    check_neighbours(ended, alone)
    check_idle(engine)


@pytest.mark.parametrize("name", KERNELS)
def test_blocks_that_held_nan_are_clean_for_whoever_gets_them_next(
    backbone: Backbone, library: BadLibrary, alone: dict[str, tuple[Output, ...]], name: str
) -> None:
    """A row of NaN leaves NaN in the blocks it gives back. Behind a later row's end it reached that row through the
    attention mask, which is added to the scores: NaN - inf is NaN."""
    engine = make_engine(backbone, library, blocks=24, max_rows=12, kernels=kernels(name, torch.float64))
    spoiling = library.bad(OVERFLOW, tuple(range(299)))
    for _ in range(2):
        assert isinstance(run(engine, [spoiling])["bad"], Failed)
        engine._ledger.release(engine._ledger.allocate(23))  # forget what is kept for reuse; turn the free list
    spoilt = engine._runner._cache.keys[1].isnan().any(dim=-1).flatten(1).all(dim=1)  # in the second layer
    assert int(spoilt.sum()) > 15
    check_neighbours(run(engine, neighbours(library)), alone)
    check_idle(engine)


@pytest.mark.parametrize(
    ("length", "error"), [(320, InputTooLong), (10_000, InputTooLong), (0, InvalidParameter)]
)
def test_what_cannot_run_is_refused_before_anything_is_held(
    backbone: Backbone, library: BadLibrary, length: int, error: type[Exception]
) -> None:
    engine = make_engine(backbone, library)
    with pytest.raises(error):
        engine.check(library.request("bad", 0, [1] * length))
    check_idle(engine)


def test_refusals_say_expected_and_got(backbone: Backbone, library: BadLibrary) -> None:
    engine = make_engine(backbone, library, blocks=30, max_rows=4)
    cases: list[tuple[GenerationRequest, str]] = [
        (library.request("r", 5, [1] * 220), "at most 219 tokens (a window of 320, less 100 of the prefix and one to"),
        (library.request("r", 0, [1, 304]), "expected token ids from 0 to 303, got 304"),
        (library.request("r", 0, [-1]), "expected token ids from 0 to 303, got -1"),
        (library.request("r", 0, [1], num_beams=5), "expected at most 4 rows, got 5"),
        (library.request("r", 0, [1] * 300, num_beams=4, max_new_tokens=20), "the request may need"),
    ]
    for request, message in cases:
        with pytest.raises((InputTooLong, InvalidParameter)) as caught:
            engine.check(request)
        assert message in caught.value.message
    assert engine.check(library.request("r", 5, [1] * 219)) is None  # type: ignore[func-returns-value]


def test_a_prefix_beside_the_pinned_ones_must_fit_its_share(backbone: Backbone, library: BadLibrary) -> None:
    """Accepted against the whole of max_prefix_bytes, it waited for ever or, with others, was failed by the pin."""
    geometry = backbone.spec.sites["decoder"]
    block = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * 16 * 8
    engine = make_engine(backbone, library, max_prefix_bytes=8 * block)
    pinned, large = library.request("pinned", 5, [1, 2], max_new_tokens=2), library.request("large", 6, [1, 2])
    assert pinned.prefix is not None and pinned.prefix_spec is not None
    engine.check(large)
    engine.add(large)
    with pytest.raises(InvalidParameter, match="pin: expected room beside each accepted request"):
        engine.pin(pinned.prefix, pinned.prefix_spec)
    assert isinstance(run(engine, [])["large"], Finished)
    engine.pin(pinned.prefix, pinned.prefix_spec)
    with pytest.raises(InputTooLong, match="expected at most 1 blocks"):
        engine.check(large)  # although the pin is not loaded
    with pytest.raises(InputTooLong, match="expected at most 1 blocks"):
        engine.add(large)  # checked before the pin was asked for
    assert isinstance(run(engine, [pinned])["pinned"], Finished)
    engine.unpin(pinned.prefix)
    engine.check(large)


def test_what_is_accepted_while_a_pin_loads_ends_well_beside_it(backbone: Backbone, library: BadLibrary) -> None:
    """Pins counted once they were in blocks: a request that fitted until then died in the middle of its stream."""
    engine = make_engine(backbone, library, blocks=14)  # 13, of which the pin takes 7
    key = library.keys[5]
    assert key is not None
    library.held.add(key)
    engine.pin(key, library.prefixes[key].spec)
    greedy = {"min_new_tokens": 94, "max_new_tokens": 94}
    with pytest.raises(InputTooLong, match="may need 7 blocks of 16 tokens, there are 6"):
        engine.check(library.request("large", 0, [1, 2, 3], **greedy))
    fits = library.request("fits", 0, [1, 2], **greedy)
    engine.check(fits)
    engine.add(fits)
    events = [event for _ in range(40) for event in engine.step()]
    library.gate.set()
    ended = run(engine, [], events=events)
    assert isinstance(ended["fits"], Finished)
    assert ended["fits"].usage.output_tokens == 94
    assert engine.residents() == {key}


def test_a_pin_that_cannot_be_loaded_keeps_its_room_and_is_tried_again(
    backbone: Backbone, library: BadLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(backbone, library, blocks=14)
    key = LOAD_ERROR
    engine.pin(key, library.prefixes[key].spec)
    wait_for_loads(engine)
    engine.step()
    assert "a pinned prefix could not be loaded" in caplog.text
    large = library.request("large", 0, [1, 2, 3], max_new_tokens=180)
    with pytest.raises(InputTooLong, match="may need 12 blocks of 16 tokens, there are 11"):
        engine.check(large)
    engine._prefixes._loader._load = Library.load.__get__(library)  # it is well again
    assert isinstance(run(engine, [library.bad(key, max_new_tokens=2)])["bad"], Finished)
    assert engine.residents() == {key}
    engine.unpin(key)
    engine.check(large)


# --- abort ---


LONG = {"max_new_tokens": 50, "min_new_tokens": 50}


def waiting(engine: Engine, library: BadLibrary) -> GenerationRequest:
    engine.add(library.request("occupant", 0, [1, 2], num_beams=12, max_new_tokens=20))  # all rows
    return library.request("bad", 0, [1, 2, 3], max_new_tokens=50)


def loading(engine: Engine, library: BadLibrary) -> GenerationRequest:
    library.held.add(LOAD_ERROR)
    return library.bad(LOAD_ERROR, max_new_tokens=50)


def prefilling(engine: Engine, library: BadLibrary) -> GenerationRequest:
    return library.request("bad", 5, [3] * 200, max_new_tokens=12)


def decoding(engine: Engine, library: BadLibrary) -> GenerationRequest:
    return library.request("bad", 6, [3] * 3, **LONG)


def in_beams(engine: Engine, library: BadLibrary) -> GenerationRequest:
    return library.request("bad", 6, [3] * 3, num_beams=3, **LONG)


def in_several_outputs(engine: Engine, library: BadLibrary) -> GenerationRequest:
    return library.request("bad", 6, [3] * 3, do_sample=True, num_return_sequences=3, **LONG)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "stage", [waiting, loading, prefilling, decoding, in_beams, in_several_outputs], ids=lambda stage: stage.__name__
)
def test_an_abort_at_any_stage_ends_its_own_request(
    backbone: Backbone, library: BadLibrary, alone: dict[str, tuple[Output, ...]], position: str,
    stage: Callable[[Engine, BadLibrary], GenerationRequest],
) -> None:
    engine = make_engine(backbone, library, max_step_tokens=16, max_rows=12)
    run(engine, [library.request(f"warm {task}", task, [1], max_new_tokens=1) for task in range(7)])  # all are loaded
    requests = placed(neighbours(library), stage(engine, library), position)
    events: list[Event] = []
    for request in requests:
        engine.check(request)
        engine.add(request)
    group = engine._groups["bad"]
    for _ in range(3):
        events += engine.step()
    while stage not in (waiting, loading) and not (group.started or group.rows[0].computed):
        events += engine.step()
    while stage in (decoding, in_beams, in_several_outputs) and group.rows[0].decoding.output_length < 3:
        events += engine.step()
    assert (group.state is GroupState.WAITING) == (stage in (waiting, loading)), "not at the stage that was meant"
    aborted = engine.abort("bad")
    assert engine.abort("bad") == []
    assert isinstance(aborted[-1], Finished)
    assert {output.finish_reason for output in aborted[-1].outputs} == {FinishReason.ABORT}
    library.gate.set()  # what was being loaded may come now, for nobody
    tokens = aborted[-1].usage.output_tokens
    assert (tokens > 0) == (stage in (decoding, in_beams, in_several_outputs)), "not at the stage that was meant"
    ended = run(engine, [], events=events)
    ended |= {event.request_id: event for event in events if isinstance(event, Finished | Failed)}
    terminal = [event.request_id for event in [*events, *aborted] if isinstance(event, Finished | Failed)]
    occupant = ["occupant"] if stage is waiting else []
    assert sorted(terminal) == sorted([*occupant, *(request.request_id for request in requests)])
    check_neighbours(ended, alone)
    check_idle(engine)


def test_an_aborted_outputs_pieces_join_to_its_text_too(backbone: Backbone, library: BadLibrary) -> None:
    """What was held back for a possible stop string was in the final text but in no event."""
    probe = library.request("probe", 1, [1, 2, 3], max_new_tokens=30, min_new_tokens=30)
    done = run(make_engine(backbone, library), [probe])["probe"]
    assert isinstance(done, Finished)
    text = done.outputs[0].text
    assert len(text) > 8
    for cut in range(1, 20):
        stop = text[len(text) // 2 :] + "never"  # held back from the middle to the end
        engine = make_engine(backbone, library)
        engine.add(library.request("r", 1, [1, 2, 3], max_new_tokens=30, min_new_tokens=30, stop=(stop,)))
        events: list[Event] = []
        while sum(isinstance(event, TokenEvent) for event in events) < cut:
            events += engine.step()
        events += engine.abort("r")
        assert isinstance(events[-1], Finished)
        assert joined_text(events, "r") == events[-1].outputs[0].text


# --- exceptions ---


@pytest.mark.parametrize("where", ["model", "all rows' best tokens"])
def test_an_exception_in_a_step_fails_its_rows_and_the_next_requests_run(
    backbone: Backbone, library: BadLibrary, alone: dict[str, tuple[Output, ...]], where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(backbone, library, max_rows=3)  # the rest waits, and is not touched
    requests = neighbours(library)
    requests = [requests[0], requests[3], requests[4], requests[1], requests[2]]
    run(engine, [library.request(f"warm {task}", task, [1], max_new_tokens=1) for task in range(5)])  # all are loaded
    for request in requests:
        engine.add(request)
    events: list[Event] = []
    while sum(isinstance(event, TokenEvent) for event in events) < 9:
        events += engine.step()
    owner, name = (engine._runner._model, "embed") if where == "model" else (postprocess, "best_tokens")

    def broken(*arguments: object) -> None:
        raise RuntimeError("a secret that no user may see")

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, broken)
        failed = engine.step()
    assert {event.request_id for event in failed} == {"good 0", "good 3", "good 4"}
    for event in failed:
        assert isinstance(event, Failed)
        assert event.error.code == "engine_failure"
        assert "secret" not in event.error.message
    again = [GenerationRequest(f"again {r.request_id}", r.caller, r.token_ids, r.params, r.prefix, r.prefix_spec)
             for r in requests[:3]]
    ended = run(engine, again)
    check_neighbours({name.removeprefix("again "): done for name, done in ended.items()}, alone)
    check_idle(engine)


# --- what else is promised ---


def test_one_step_over_rows_of_many_tasks_is_one_call_of_the_decoder(backbone: Backbone, library: BadLibrary) -> None:
    """Counted at a layer of the model, not by the engine's own counter."""
    counts = Counts()
    engine = make_engine(backbone, library, max_rows=32, observer=counts)
    model, calls = engine._runner._model, []
    first, *others = model.layers

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[0]))
        return first(*arguments)

    model.layers = [counted, *others]  # type: ignore[misc,list-item]
    kinds: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}]
    for index in range(18):
        request = library.request(f"r{index}", index % 9, range(index + 1), max_new_tokens=6, **kinds[index // 9])
        engine.add(request)
    while engine.requests:
        before = len(calls)
        engine.step()
        assert len(calls) - before <= 1
    assert len(calls) == len(counts.steps) == engine.forwards["decoder"]
    assert calls == [tokens for _, _, tokens in counts.steps]
    assert max(tasks for _, tasks, _ in counts.steps) == 9
    assert max(rows for rows, _, _ in counts.steps) > 18
    assert counts.forwards == [{"decoder": 1}] * len(calls)


@pytest.mark.parametrize("params", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1, "num_return_sequences": 2}],
                         ids=str)
@pytest.mark.parametrize(("task", "prefix"), [(0, 0), (5, 100)])
def test_an_output_past_the_window_ends_with_length(
    backbone: Backbone, library: BadLibrary, task: int, prefix: int, params: dict[str, Any]
) -> None:
    request = library.request("r", task, [7] * (320 - prefix - 7), max_new_tokens=50, min_new_tokens=50, **params)
    done = run(make_engine(backbone, library), [request])["r"]
    assert isinstance(done, Finished)
    for output in done.outputs:
        assert output.finish_reason is FinishReason.LENGTH
        assert len(output.token_ids) == 7


def test_a_repeated_prompt_gives_the_same_tokens_for_less_work(backbone: Backbone, library: BadLibrary) -> None:
    kinds: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5, "num_return_sequences": 2}]
    for params in kinds:
        counts = Counts()
        engine = make_engine(backbone, library, observer=counts)
        work, outputs = [], []
        for index in range(2):
            before = sum(tokens for _, _, tokens in counts.steps)
            request = library.request(f"r{index}", 3, range(100), max_new_tokens=10, **params)
            done = run(engine, [request])[f"r{index}"]
            assert isinstance(done, Finished)
            outputs.append(done.outputs)
            work.append(sum(tokens for _, _, tokens in counts.steps) - before)
        assert outputs[0] == outputs[1]
        assert work[0] - work[1] == 96
        assert engine._ledger.available == engine._ledger.capacity


def test_reused_prompts_are_not_shared_between_tenants_or_versions(backbone: Backbone, library: BadLibrary) -> None:
    base = library.request("r0", 3, range(100), max_new_tokens=2)
    assert base.prefix is not None
    other_version = PrefixKey(base.prefix.tenant, "sha256:other")
    other_owner = PrefixKey("other", base.prefix.version)
    library.prefixes[other_version] = library.prefixes[other_owner] = library.prefixes[base.prefix]
    counts = Counts()
    engine = make_engine(backbone, library, observer=counts)
    variants = [
        ("default", base.prefix), ("default", other_version), ("default", other_owner), ("other", base.prefix),
        ("default", None), ("other", None),
    ]
    outputs: dict[PrefixKey | None, tuple[Output, ...]] = {}
    for index, (tenant, key) in enumerate(variants):
        before = sum(tokens for _, _, tokens in counts.steps)
        spec = base.prefix_spec if key else None
        request = GenerationRequest(f"v{index}", tenant, base.token_ids, base.params, key, spec)
        done = run(engine, [request])[f"v{index}"]
        assert isinstance(done, Finished)
        assert sum(tokens for _, _, tokens in counts.steps) - before == 101, "somebody else's blocks were used"
        outputs[key] = done.outputs
    assert outputs[base.prefix] == outputs[other_version] == outputs[other_owner]


@pytest.mark.parametrize("params", [{}, {"do_sample": True, "seed": 9, "num_return_sequences": 3}], ids=str)
def test_streamed_pieces_join_to_the_text_and_stop_strings_end_it(
    backbone: Backbone, library: BadLibrary, params: dict[str, Any]
) -> None:
    plain = library.request("plain", 2, [4, 5, 6], max_new_tokens=40, min_new_tokens=30, **params)
    done = run(make_engine(backbone, library), [plain])["plain"]
    assert isinstance(done, Finished)
    middle = done.outputs[0].text[10:13]
    stopping = library.request(
        "stopping", 2, [4, 5, 6], max_new_tokens=40, min_new_tokens=30, stop=(middle,), **params
    )
    events: list[Event] = []
    ended = run(make_engine(backbone, library), [plain, stopping], events=events)
    for name, finished in ended.items():
        assert isinstance(finished, Finished)
        for index, output in enumerate(finished.outputs):
            assert joined_text(events, name, index) == output.text
            tokens = [t for e in events if isinstance(e, TokenEvent) and (e.request_id, e.index) == (name, index)
                      for t in e.token_ids]
            assert tuple(tokens) == output.token_ids
    stopped, whole = ended["stopping"], done.outputs[0].text
    assert isinstance(stopped, Finished)
    assert stopped.outputs[0].finish_reason is FinishReason.STOP
    assert stopped.outputs[0].text == whole[: whole.find(middle)]
