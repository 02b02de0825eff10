"""Tokens that a model's own generation config suppresses or forces: the engine's outputs are those of ``generate``."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import InvalidParameter
from server.engine.types import Failed, Finished, GenerationRequest
from tests.support.bart import save_tiny_bart
from tests.support.bart_reference import until_end
from tests.support.engine import Library, make_engine, oracle, run
from tests.support.prefixes import save_tiny_gpt2

SEARCHES: tuple[dict[str, Any], ...] = (
    {},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_beams": 3, "min_new_tokens": 6, "no_repeat_ngram_size": 2, "length_penalty": 0.5},
)
PROMPTS = ([7], [5, 9], [3, 1, 4, 1, 5, 9, 2, 6, 5])
SAVE: dict[str, Callable[..., Any]] = {"gpt2": save_tiny_gpt2, "bart": save_tiny_bart}


def with_config(folder: Path, family: str, **fields: Any) -> Backbone:
    """A random backbone in float64 whose generation config has ``fields``."""
    SAVE[family](folder, **({"n_positions": 320} if family == "gpt2" else {"window": 256}))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return load_backbone(str(folder), dtype=torch.float64)


def requests(library: Library) -> list[GenerationRequest]:
    tasks = len(library.keys)
    return [
        library.request(f"{number}-{index}", (number + index) % tasks, prompt, max_new_tokens=12, **search)
        for number, prompt in enumerate(PROMPTS)
        for index, search in enumerate(SEARCHES)
    ]


@torch.inference_mode()
def expected(backbone: Backbone, library: Library, request: GenerationRequest) -> list[list[int]]:
    """What ``generate`` gives, which reads the model's own generation config."""
    if backbone.spec.family == "gpt2":
        prefix = library.prefixes[request.prefix] if request.prefix else None
        return [tokens for tokens, _ in oracle(backbone, prefix, request)]
    params = request.params
    found = backbone.model.generate(
        torch.tensor([request.token_ids]),
        attention_mask=torch.ones(1, len(request.token_ids), dtype=torch.long),
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens or None,
        num_beams=params.num_beams,
        num_return_sequences=params.num_return_sequences,
        length_penalty=params.length_penalty,
        repetition_penalty=params.repetition_penalty,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
    )
    return [until_end(sequence[1:].tolist(), backbone.eos_token_ids) for sequence in found]


def library_of(backbone: Backbone) -> Library:
    """GPT-2's tasks have prefixes; without them ``generate`` is BART's oracle as it is."""
    return Library(backbone) if backbone.spec.family == "gpt2" else Library(backbone, (0,))


def answers(backbone: Backbone, library: Library, asked: list[GenerationRequest]) -> dict[str, list[list[int]]]:
    engine = make_engine(backbone, library, blocks=900, max_rows=40, max_step_tokens=64)
    ended = run(engine, asked)
    engine.close()
    answered = {}
    for name, event in ended.items():
        assert isinstance(event, Finished), event
        answered[name] = [list(output.token_ids) for output in event.outputs]
    return answered


def likely(backbone: Backbone) -> tuple[list[int], list[int]]:
    """The tokens that outputs have most, without end tokens, and those that they begin with."""
    library = library_of(backbone)
    outputs = [tokens for found in answers(backbone, library, requests(library)).values() for tokens in found]
    counts = Counter(token for tokens in outputs for token in tokens)
    own = {*backbone.eos_token_ids, backbone.forced_first, backbone.forced_last}
    often = [token for token, _ in counts.most_common(30) if token not in own]
    return often[::2], sorted({token for tokens in outputs for token in tokens[:2]} - own)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("family", SAVE)
def test_suppressed_tokens_and_forced_ones_are_those_of_generate(family: str, forced: bool, tmp_path: Path) -> None:
    """Greedy and beams, prompts of one token and more. Without the fields other tokens come out."""
    fields = {"forced_bos_token_id": 11, "forced_eos_token_id": 2, "eos_token_id": 2} if forced else {}
    plain = with_config(tmp_path / "plain", family, **fields)
    never, first = likely(plain)
    library = library_of(plain)
    before = answers(plain, library, requests(library))
    for name, more in (
        ("never", {"suppress_tokens": never}),
        ("first", {"begin_suppress_tokens": first}),
        ("both", {"suppress_tokens": never, "begin_suppress_tokens": first}),
    ):
        backbone = with_config(tmp_path / name, family, **fields, **more)
        asked = requests(library)
        found = answers(backbone, library, asked)
        assert found == {request.request_id: expected(backbone, library, request) for request in asked}
        assert found != before, name


@pytest.mark.parametrize("family", SAVE)
def test_samples_have_no_suppressed_token_and_keep_the_shares_of_the_others(family: str, tmp_path: Path) -> None:
    never, first = likely(with_config(tmp_path / "plain", family))
    backbone = with_config(tmp_path / "own", family, suppress_tokens=never, begin_suppress_tokens=first)
    library = library_of(backbone)
    asked = [
        library.request(f"r{seed}", 0, [5, 9], max_new_tokens=8, do_sample=True, seed=seed, num_return_sequences=8)
        for seed in range(4)
    ]
    outputs = [tokens for found in answers(backbone, library, asked).values() for tokens in found]
    assert not {token for tokens in outputs for token in tokens} & set(never)
    assert not {tokens[0] for tokens in outputs} & set(first)
    assert {token for tokens in outputs for token in tokens[1:]} & set(first), "only the first is suppressed"
    coldest = library.request("cold", 0, [5, 9], max_new_tokens=8, do_sample=True, temperature=1e-30, seed=1)
    greedy = library.request("greedy", 0, [5, 9], max_new_tokens=8)
    found = answers(backbone, library, [coldest, greedy])
    assert found["cold"] == found["greedy"] == expected(backbone, library, greedy)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_forced_end_that_may_not_begin_an_output_fails_that_request_alone(tmp_path: Path, beams: int) -> None:
    """transformers has no number left there, and gives token 0 or an error."""
    backbone = with_config(tmp_path, "bart", forced_eos_token_id=2, begin_suppress_tokens=[2])
    library = library_of(backbone)
    engine = make_engine(backbone, library)
    short = library.request("short", 0, [5, 9], max_new_tokens=1, num_beams=beams)
    long = library.request("long", 0, [5, 9], max_new_tokens=5, num_beams=beams)
    ended = run(engine, [short, long])
    engine.close()
    failed, done = ended["short"], ended["long"]
    assert isinstance(failed, Failed) and isinstance(failed.error, InvalidParameter)
    assert isinstance(done, Finished)
    assert [list(output.token_ids) for output in done.outputs] == expected(backbone, library, long)


def test_tokens_suppressed_under_pressure_are_those_of_generate(tmp_path: Path) -> None:
    """Preempted groups compute their tokens again, and an output still begins only once."""
    never, first = likely(with_config(tmp_path / "plain", "gpt2"))
    backbone = with_config(tmp_path / "own", "gpt2", suppress_tokens=never, begin_suppress_tokens=first)
    library = library_of(backbone)
    asked = requests(library)
    engine = make_engine(backbone, library, blocks=45, max_rows=12, max_step_tokens=24)
    ended = run(engine, asked, random.Random(3), preempt=0.2)
    engine.close()
    for request in asked:
        event = ended[request.request_id]
        assert isinstance(event, Finished)
        assert [list(output.token_ids) for output in event.outputs] == expected(backbone, library, request)
