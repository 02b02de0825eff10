"""BART: every row of random mixes equals the plain reference run alone, and every step makes one call per stage."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.artifact import read_prefix, write_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import InputTooLong
from server.engine.kernels import select_kernels
from server.engine.types import Failed, Finished, FinishReason, GenerationRequest, Usage
from tests.support.bart import tiny_bart
from tests.support.bart_library import SUBSETS, BartLibrary, check_sampling_depends_on_nothing_else
from tests.support.bart_reference import parts_of, reference_generate, reference_logits
from tests.support.engine import KERNELS, Counts, Library, LogitsRecorder, kernels, make_engine, run

INPUTS = (1, 2, 15, 16, 17, 40, 150, 400, 1000)


@pytest.fixture(scope="module")
def make_backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Backbone]:
    @functools.cache
    def make(dtype: torch.dtype = torch.float64, **options: Any) -> Backbone:
        folder: Path = tmp_path_factory.mktemp("bart")
        generation = {"forced_bos_token_id": 0, "forced_eos_token_id": 2} if options.pop("forced", False) else None
        return tiny_bart(folder, dtype, window=1024, generation=generation, **options)

    return make


def expected(backbone: Backbone, library: Library, request: GenerationRequest) -> list[tuple[list[int], float | None]]:
    prefix = library.prefixes[request.prefix] if request.prefix else None
    tensors, positions = parts_of(prefix, backbone.model.dtype)
    return reference_generate(
        backbone.model, request.token_ids, tensors, positions, request.params, backbone.decoder_prompt,
        backbone.forced_first, backbone.forced_last, backbone.eos_token_ids,
    )  # fmt: skip


def random_requests(library: Library, vocab: int, rows: int, rng: random.Random) -> list[GenerationRequest]:
    tasks = [index % len(library.keys) for index in range(rows)]
    rng.shuffle(tasks)
    requests = []
    for index, task in enumerate(tasks):
        params: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 7, 20])}
        if rng.random() < 0.5:
            params |= {"num_beams": 6, "num_return_sequences": rng.choice([1, 3]), "early_stopping": rng.random() < 0.5}
            params["length_penalty"] = rng.choice([1.0, 0.8, 0.0, 2.0])
        params["repetition_penalty"] = rng.choice([1.0, 1.0, 1.3])
        params["no_repeat_ngram_size"] = rng.choice([0, 2, 3])
        params["min_new_tokens"] = min(rng.choice([0, 6, 11]), params["max_new_tokens"])
        tokens = [rng.randrange(vocab) for _ in range(rng.choice(INPUTS))]
        requests.append(library.request(f"r{index}", task, tokens, **params))
    return requests


def check(outcome: Finished | Failed, wanted: list[tuple[list[int], float | None]]) -> None:
    assert isinstance(outcome, Finished), outcome
    assert [list(output.token_ids) for output in outcome.outputs] == [tokens for tokens, _ in wanted]
    for output, (_, score) in zip(outcome.outputs, wanted, strict=True):
        assert score is None or output.score == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pressed", [True, False])
def test_every_row_of_a_mix_equals_the_reference_alone(
    make_backbone: Callable[..., Backbone], pressed: bool, seed: int, kernel: str
) -> None:
    """Exact in float64, greedy and beam 6. ``pressed``: requests arrive while others run, in memory so short that
    groups are preempted and prefixes evicted; else all at once, six tasks and more in one step.
    """
    rng = random.Random(seed)
    backbone = make_backbone(layers=[(2, 3), (3, 2), (2, 2)][seed], forced=seed != 1, logits_bias=seed == 1)
    library, counts = BartLibrary(backbone), Counts()
    engine = make_engine(
        backbone, library, blocks=rng.choice([130, 160]) if pressed else 900, observer=counts,
        kernels=kernels(kernel, torch.float64), max_rows=40 if pressed else 120, max_step_tokens=120,
        max_step_ms=0.001 if pressed else 1e6, max_encoder_tokens=rng.choice([100, 2000]),
        max_prefix_blocks=14 if pressed else 100, reuse_prompts=rng.random() < 0.5,
    )  # fmt: skip
    requests = random_requests(library, backbone.spec.vocab_size, 16, rng)
    ended = run(engine, requests, rng if pressed else None, preempt=0.1)
    engine.close()
    for request in requests:
        check(ended[request.request_id], expected(backbone, library, request))
    for forwards in counts.forwards:
        assert all(calls <= 1 for calls in forwards.values()), "one call per stage, whatever the number of tasks"
    if pressed:
        assert counts.preemptions and counts.evictions and library.loads > len(library.prefixes)
    else:
        assert max(rows for rows, _, _ in counts.steps) >= 12 and max(tasks for _, tasks, _ in counts.steps) >= 6
        assert any(forwards == {"encoder": 1, "decoder": 1} for forwards in counts.forwards), "both stages in one step"


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_logits_keep_the_numeric_contract(make_backbone: Callable[..., Backbone], kernel: str) -> None:
    rng = random.Random(7)
    backbone = make_backbone(torch.float32, layers=(2, 3))
    library = BartLibrary(backbone)
    engine = make_engine(backbone, library, blocks=400, kernels=kernels(kernel, torch.float32), max_rows=24)
    recorder = LogitsRecorder(engine)
    requests = [
        library.request(f"r{index}", index % len(library.keys), [rng.randrange(300) for _ in range(rng.choice(INPUTS))],
                        max_new_tokens=12)
        for index in range(16)
    ]  # fmt: skip
    run(engine, requests, rng)
    engine.close()
    model = backbone.model.double()
    try:
        for request in requests:
            tensors, positions = parts_of(library.prefixes[request.prefix] if request.prefix else None, torch.float64)
            for tokens, logits in recorder.logits[request.request_id].items():
                wanted = reference_logits(model, request.token_ids, tokens, tensors, positions)[-1]
                tolerance = max(1e-4, 1e-5 * float(wanted.abs().max()))
                assert float((logits.double() - wanted).abs().max()) <= tolerance
    finally:
        backbone.model.float()


def test_an_artifact_gives_the_logits_of_the_tensors_in_memory(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(layers=(2, 3))
    library = BartLibrary(backbone)
    for key, prefix in library.prefixes.items():
        library.prefixes[key] = read_prefix(write_prefix(prefix))
    engine = make_engine(backbone, library)
    recorder = LogitsRecorder(engine)
    fresh = BartLibrary(backbone)
    requests = [library.request(f"r{task}", task, range(20), max_new_tokens=3) for task in range(len(SUBSETS))]
    run(engine, requests)
    engine.close()
    for request in requests:
        tensors, positions = parts_of(fresh.prefixes[request.prefix] if request.prefix else None, torch.float64)
        for tokens, logits in recorder.logits[request.request_id].items():
            wanted = reference_logits(backbone.model, request.token_ids, tokens, tensors, positions)[-1]
            assert torch.allclose(logits, wanted.float(), atol=1e-6)


def test_sampled_outputs_depend_on_nothing_but_the_request(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(forced=True)
    library = BartLibrary(backbone)
    requests = [
        library.request(f"r{index}", index % len(SUBSETS), range(index + 1), max_new_tokens=12, do_sample=True,
                        num_return_sequences=3, seed=index, top_k=20)
        for index in range(12)
    ]  # fmt: skip
    check_sampling_depends_on_nothing_else(backbone, library, requests)


def test_an_abort_in_the_middle_of_encoding_leaves_the_others_as_they_were(
    make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone()
    library = BartLibrary(backbone)
    engine = make_engine(backbone, library, max_step_ms=0.001)
    # Their prefixes are loaded before, so that all are admitted at once: one that came late would find others decoding.
    run(engine, [library.request(f"before{index}", index + 2, range(5), max_new_tokens=1) for index in range(4)])
    requests = [library.request(f"r{index}", index + 2, range(20 + index), max_new_tokens=6) for index in range(4)]
    for request in requests:
        engine.add(request)
    engine.step()
    assert not engine._scheduler.waiting
    assert all(group.encoding for group in engine._scheduler.running), "nobody is through the encoder yet"
    engine.abort("r1")
    ended = run(engine, [])
    engine.close()
    for request in (requests[0], *requests[2:]):
        check(ended[request.request_id], expected(backbone, library, request))


def test_an_abort_in_the_middle_of_encoding_took_its_share_of_the_input(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    library = BartLibrary(backbone)
    engine = make_engine(backbone, library, max_step_ms=0.001)
    engine.add(library.request("r", 0, range(21), max_new_tokens=6))
    engine.step()
    begun = engine._groups["r"].input
    assert begun is not None and 0 < begun.done < begun.units
    share = 21 * begun.done // begun.units
    [aborted] = engine.abort("r")
    assert isinstance(aborted, Finished) and aborted.usage == Usage(share, 0, 0) and 0 < share < 21


def test_an_output_cut_by_a_forced_end_says_so(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(forced=True)
    library = BartLibrary(backbone)
    engine = make_engine(backbone, library)
    ended = run(engine, [library.request("r", 1, range(9), max_new_tokens=5, min_new_tokens=5)])["r"]
    engine.close()
    assert isinstance(ended, Finished)
    [output] = ended.outputs
    assert output.token_ids[0] == 0 and output.token_ids[-1] == 2 and len(output.token_ids) == 5
    assert output.finish_reason is FinishReason.LENGTH


def test_an_input_of_the_whole_window_fits_and_one_more_token_does_not(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    library = BartLibrary(backbone)
    engine = make_engine(backbone, library)
    ended = run(engine, [library.request("r", 2, [5] * 1024, max_new_tokens=2)])
    assert isinstance(ended["r"], Finished)
    for task, most in ((2, 1024), (6, 1020)):  # an unshifted encoder prefix takes no position, a shifted one its length
        with pytest.raises(InputTooLong) as caught:
            engine.check(library.request("r", task, [5] * (most + 1)))
        assert caught.value.detail == {"expected": most, "got": most + 1}
    engine.close()


def half_precision_errors(backbone: Backbone, exact: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors against float64 of the engine's logits, over all tasks, and of transformers' own, without prefixes."""
    rng, library = random.Random(5), BartLibrary(exact)
    engine = make_engine(backbone, library, blocks=300, max_rows=18, kernels=kernels_of(backbone))
    recorder = LogitsRecorder(engine)
    requests = [
        library.request(f"h{i}", i % len(SUBSETS), [rng.randrange(300) for _ in range(rng.choice([1, 5, 16, 90]))],
                        max_new_tokens=8)
        for i in range(16)
    ]  # fmt: skip
    ended = run(engine, requests, rng, preempt=0.1)
    engine.close()
    ours, theirs = [], []
    for request in requests:
        assert isinstance(ended[request.request_id], Finished)
        tensors, positions = parts_of(library.prefixes[request.prefix] if request.prefix else None, torch.float64)
        device = backbone.model.device
        for tokens, logits in recorder.logits[request.request_id].items():
            truth = reference_logits(exact.model, request.token_ids, tokens, tensors, positions)[-1]
            ours.append(logits.cpu().double() - truth)
            inputs = {"input_ids": [request.token_ids], "decoder_input_ids": [tokens]}
            with torch.inference_mode():
                alone = backbone.model(**{k: torch.tensor(v, device=device) for k, v in inputs.items()}).logits[0, -1]
            bare = reference_logits(exact.model, request.token_ids, tokens, {}, {})[-1]
            theirs.append(alone.cpu().double() - bare)
    return torch.stack(ours), torch.stack(theirs)


def kernels_of(backbone: Backbone) -> Any:
    return select_kernels(backbone.model.device, backbone.model.dtype)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")])],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_transformers(
    tmp_path: Path, dtype: torch.dtype, device: str
) -> None:
    """transformers cannot run these prefixes: its error is that of the same inputs without them."""
    exact = tiny_bart(tmp_path, torch.float64, window=1024)
    backbone = load_backbone(str(tmp_path), dtype=dtype, device=device)
    ours, theirs = half_precision_errors(backbone, exact)
    assert float(ours.square().mean().sqrt()) <= 2 * float(theirs.square().mean().sqrt())
    assert float(ours.abs().max()) <= 2 * float(theirs.abs().max())
