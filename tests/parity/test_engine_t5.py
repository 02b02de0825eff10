"""T5, v1.1 and mT5: every row of random mixes equals the plain reference run alone, with prefixes at any site."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import InputTooLong
from server.engine.types import Failed, Finished, GenerationRequest, TokenEvent
from tests.support.bart_library import SUBSETS, BartLibrary, check_sampling_depends_on_nothing_else
from tests.support.bart_reference import parts_of
from tests.support.engine import KERNELS, Counts, Library, LogitsRecorder, joined_text, kernels, make_engine, run
from tests.support.t5 import KINDS, save_tiny_t5, tiny_t5
from tests.support.t5_reference import reference_generate, reference_logits

INPUTS = (1, 2, 15, 16, 17, 40, 150)


@pytest.fixture(scope="module")
def make_backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Backbone]:
    @functools.cache
    def make(kind: str = "t5", dtype: torch.dtype = torch.float64, **options: Any) -> Backbone:
        return tiny_t5(tmp_path_factory.mktemp("t5"), kind, dtype, **options)

    return make


def prefix_parts(library: Library, request: GenerationRequest, dtype: torch.dtype) -> Any:
    return parts_of(library.prefixes[request.prefix] if request.prefix else None, dtype)


def check(backbone: Backbone, library: Library, request: GenerationRequest, outcome: Finished | Failed) -> None:
    assert isinstance(outcome, Finished), outcome
    prefix, positions = prefix_parts(library, request, backbone.model.dtype)
    wanted = reference_generate(backbone, request.token_ids, prefix, positions, request.params)
    assert [list(output.token_ids) for output in outcome.outputs] == [tokens for tokens, _ in wanted], request
    for output, (_, score) in zip(outcome.outputs, wanted, strict=True):
        assert score is None or output.score == pytest.approx(score, rel=1e-4)


def random_requests(library: Library, vocab: int, rows: int, rng: random.Random) -> list[GenerationRequest]:
    """Greedy, and beams with random settings, over all tasks."""
    requests = []
    for index in range(rows):
        params: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 7, 20])}
        if rng.random() < 0.5:
            params |= {"num_beams": 4, "num_return_sequences": rng.choice([1, 3]), "early_stopping": rng.random() < 0.5}
            params["length_penalty"] = rng.choice([1.0, 0.8, 0.0, 2.0])
        params["repetition_penalty"] = rng.choice([1.0, 1.0, 1.3])
        params["no_repeat_ngram_size"] = rng.choice([0, 2, 3])
        params["min_new_tokens"] = min(rng.choice([0, 6, 11]), params["max_new_tokens"])
        tokens = [rng.randrange(vocab) for _ in range(rng.choice(INPUTS))]
        requests.append(library.request(f"r{index}", index % len(library.keys), tokens, **params))
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_mix_equals_the_reference_alone(
    make_backbone: Callable[..., Backbone], kind: str, kernel: str
) -> None:
    """Exact in float64. Requests arrive while others run, in memory so short that groups are preempted."""
    rng, backbone = random.Random(f"{kind} {kernel}"), make_backbone(kind)
    library, counts = BartLibrary(backbone), Counts()
    engine = make_engine(
        backbone, library, blocks=90, observer=counts, kernels=kernels(kernel, torch.float64), max_rows=40,
        max_step_tokens=120, max_step_ms=0.001, max_encoder_tokens=rng.choice([100, 2000]), max_prefix_blocks=14,
        reuse_prompts=rng.random() < 0.5,
    )  # fmt: skip
    requests = random_requests(library, backbone.spec.vocab_size, 12, rng)
    ended = run(engine, requests, rng, preempt=0.1)
    engine.close()
    for request in requests:
        check(backbone, library, request, ended[request.request_id])
    assert all(calls <= 1 for forwards in counts.forwards for calls in forwards.values()), "one call per stage"
    assert counts.preemptions and counts.evictions


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_within_the_contracts_bound(
    make_backbone: Callable[..., Backbone], kind: str, dtype: torch.dtype, kernel: str
) -> None:
    """An engine gives logits in float32, whatever the model computes in."""
    rng, exact = random.Random(7), make_backbone(kind)
    backbone = exact if dtype == torch.float64 else load_backbone(exact.name, dtype=dtype)
    library = BartLibrary(backbone)
    requests = [
        library.request(f"r{task}", task, [rng.randrange(320) for _ in range(rng.choice(INPUTS))],
                        max_new_tokens=6, min_new_tokens=6)
        for task in range(len(SUBSETS))
    ]  # fmt: skip
    engine = make_engine(backbone, library, blocks=400, kernels=kernels(kernel, dtype), max_rows=24)
    recorder = LogitsRecorder(engine)
    run(engine, requests, rng)
    engine.close()
    for request in requests:
        prefix, positions = prefix_parts(library, request, torch.float64)
        for tokens, got in recorder.logits[request.request_id].items():
            expected = reference_logits(exact.model, request.token_ids, tokens, prefix, positions)[-1]
            greatest = float(expected.abs().max())
            bound = 1e-7 * greatest if dtype == torch.float64 else max(1e-4, 1e-5 * greatest)
            assert float((got.double() - expected).abs().max()) <= bound


def test_without_a_prefix_a_text_gives_what_transformers_generates(make_backbone: Callable[..., Backbone]) -> None:
    """From the text on: the tokenizer's end token behind it, the start token before the output, its generation config.
    """
    backbone = make_backbone("t5 v1.1")
    library, engine = BartLibrary(backbone), make_engine(backbone, BartLibrary(backbone))
    for index, text in enumerate(("Blue Spice is a coffee shop", "name : café ☕", "item 7 cheap")):
        ids = backbone.prompt_encoder.encode(backbone.input_template, text)
        ended = run(engine, [library.request(f"r{index}", 0, ids, max_new_tokens=12)])[f"r{index}"]
        assert isinstance(ended, Finished)
        inputs = backbone.tokenizer(text, return_tensors="pt")
        # Its cache has as many layers as the encoder and fails on this deeper decoder.
        searched = backbone.model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False)
        expected = searched[0, 1:].tolist()
        assert list(ended.outputs[0].token_ids) == expected
    engine.close()


def test_sampled_outputs_depend_on_nothing_but_the_request(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("t5")
    library = BartLibrary(backbone)
    requests = [
        library.request(f"r{index}", index, range(3, index + 5), max_new_tokens=12, do_sample=True,
                        num_return_sequences=3, seed=index, top_k=20)
        for index in range(len(SUBSETS))
    ]  # fmt: skip
    check_sampling_depends_on_nothing_else(backbone, library, requests)


def test_streamed_text_is_the_tokenizers_own(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("t5")
    library, engine = BartLibrary(backbone), make_engine(backbone, BartLibrary(backbone))
    events: list[Any] = []
    ended = run(engine, [
        library.request(f"r{seed}", 1, range(3, 20), max_new_tokens=20, do_sample=True, temperature=3.0, seed=seed)
        for seed in range(6)
    ], events=events)  # fmt: skip
    engine.close()
    for name, outcome in ended.items():
        assert isinstance(outcome, Finished)
        ids = list(outcome.outputs[0].token_ids)
        text = backbone.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        assert joined_text(events, name) == outcome.outputs[0].text == text
    assert any(" " in event.text for event in events if isinstance(event, TokenEvent)), "words apart"


def test_an_input_of_the_whole_window_fits_and_one_more_token_does_not(tmp_path: Path) -> None:
    """The window is the tokenizer's. An unshifted prefix takes no position of it, a shifted one its length."""
    backbone = tiny_t5(tmp_path, window=200)
    library = BartLibrary(backbone)
    engine = make_engine(backbone, library)
    assert isinstance(run(engine, [library.request("r", 2, [5] * 200, max_new_tokens=2)])["r"], Finished)
    for task, most in ((2, 200), (6, 196)):
        with pytest.raises(InputTooLong) as caught:
            engine.check(library.request("r", task, [5] * (most + 1)))
        assert caught.value.detail == {"expected": most, "got": most + 1}
    engine.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    """transformers cannot run these prefixes: its error is that of the same inputs without them."""
    save_tiny_t5(tmp_path, "t5 v1.1")
    exact, backbone = load_backbone(str(tmp_path), dtype=torch.float64), load_backbone(str(tmp_path), dtype=dtype)
    rng, library = random.Random(5), BartLibrary(exact)
    engine = make_engine(backbone, library, blocks=300, max_rows=18)
    recorder = LogitsRecorder(engine)
    requests = [
        library.request(f"h{i}", i % len(SUBSETS), [rng.randrange(320) for _ in range(rng.choice([1, 5, 16, 90]))],
                        max_new_tokens=8)
        for i in range(16)
    ]  # fmt: skip
    ended = run(engine, requests, rng, preempt=0.1)
    engine.close()
    ours, theirs = [], []
    for request in requests:
        assert isinstance(ended[request.request_id], Finished)
        prefix, positions = prefix_parts(library, request, torch.float64)
        for tokens, logits in recorder.logits[request.request_id].items():
            ours.append(logits - reference_logits(exact.model, request.token_ids, tokens, prefix, positions)[-1])
            with torch.inference_mode():
                ids = torch.tensor([list(request.token_ids)]), torch.tensor([list(tokens)])
                alone = backbone.model(input_ids=ids[0], decoder_input_ids=ids[1]).logits[0, -1]
            theirs.append(alone.double() - reference_logits(exact.model, request.token_ids, tokens, {}, {})[-1])
    mine, other = torch.stack(ours), torch.stack(theirs)
    assert float(mine.square().mean().sqrt()) <= 2 * float(other.square().mean().sqrt())
    assert float(mine.abs().max()) <= 2 * float(other.abs().max())
