"""Penalties, bans and filters: the same kept set and the same probabilities as transformers' own."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.decoding.processors import changes_scores, processed, warped
from server.engine.types import SamplingParams

FILTERS: list[dict[str, Any]] = [
    {}, {"top_k": 1}, {"top_k": 5}, {"top_k": 2**31 - 1}, {"top_p": 5e-324}, {"top_p": 1e-45}, {"top_p": 1e-38},
    {"top_p": 1.0 - 2**-53}, {"top_k": 2**31 - 1, "top_p": 5e-324},
]


def theirs(
    scores: torch.Tensor,
    token_ids: list[int],
    generated: int,
    params: SamplingParams,
    eos: list[int],
    suppressed: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """transformers' processors in ``_get_logits_processor``'s order."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.min_new_tokens and eos:
        prompt = len(token_ids) - generated
        processors.append(MinNewTokensLengthLogitsProcessor(prompt, params.min_new_tokens, eos))
    if suppressed:
        processors.append(SuppressTokensLogitsProcessor(sorted(suppressed)))
    if params.do_sample and params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.do_sample and params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.do_sample and params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    result: torch.Tensor = processors(torch.tensor([token_ids]), scores[None].clone())[0]
    return result


def test_a_tiny_temperature_leaves_only_the_likeliest_token() -> None:
    """1e-37 overflowed float32 before the maximum was subtracted: several tokens, or none, had the same infinity."""
    for scores in (torch.randn(40) * 20, torch.log_softmax(torch.randn(40), 0), torch.randn(40) - 1000):
        for temperature in (1e-20, 1e-37, 1e-38, 1e-45, 1e-300, sys.float_info.min, 5e-324):
            for filters in FILTERS:
                params = SamplingParams(do_sample=True, temperature=temperature, **filters)
                ids, ours = warped(scores, params)
                assert not bool(ours.isnan().any()), params
                assert ids[torch.softmax(ours, 0) > 0].tolist() == [int(scores.argmax())], params


def test_extreme_filters_keep_the_likeliest_token_and_shares_that_are_numbers() -> None:
    scores = torch.randn(2000) * 3
    for temperature in (1e-30, 1e-3, 100.0):
        for filters in FILTERS:
            ids, ours = warped(scores, SamplingParams(do_sample=True, temperature=temperature, **filters))
            assert int(scores.argmax()) in ids.tolist()
            assert float(ours.max()) == 0.0
            assert float(torch.softmax(ours, 0).sum()) == pytest.approx(1.0)


def test_a_banned_token_stays_banned_at_any_temperature() -> None:
    scores = torch.tensor([-torch.inf, 1.0, 0.5])
    for temperature in (5e-324, 1e-37, 1.0, 100.0):
        ids, ours = warped(scores, SamplingParams(do_sample=True, temperature=temperature))
        assert 0 not in ids[torch.isfinite(ours)].tolist()


def scattered(vocab: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What ``warped`` gave, over the whole vocabulary."""
    whole = torch.full((vocab,), -torch.inf)
    whole[ids] = scores
    return whole


def random_case(rng: random.Random, vocab: int) -> tuple[torch.Tensor, list[int], int, list[int]]:
    torch.manual_seed(rng.randrange(10**6))
    scores = torch.randn(vocab) * rng.choice([0.5, 3.0, 20.0])
    if rng.random() < 0.5:
        scores = torch.log_softmax(scores, 0)
    token_ids = [rng.randrange(min(vocab, rng.choice([3, vocab]))) for _ in range(rng.randrange(1, 30))]
    eos = rng.sample(range(vocab), rng.choice([0, 1, 2]))
    return scores, token_ids, rng.randrange(len(token_ids)), eos


@pytest.mark.parametrize("vocab", [2, 5, 40, 3000])
def test_penalties_and_bans_equal_transformers(vocab: int) -> None:
    rng = random.Random(vocab)
    for _ in range(60):
        scores, token_ids, generated, eos = random_case(rng, vocab)
        params = SamplingParams(
            repetition_penalty=rng.choice([1.0, 0.01, 0.5, 1.3, 5.0, 100.0]),
            no_repeat_ngram_size=rng.choice([0, 1, 2, 3, 5, 40]),
            min_new_tokens=rng.choice([0, 5, 20]),
        )
        before = scores.clone()
        suppressed = frozenset(rng.sample(range(vocab), rng.choice([0, 1, vocab // 2])))
        ours = processed(scores, token_ids, generated, params, frozenset(eos), suppressed)
        assert torch.equal(ours, theirs(scores, token_ids, generated, params, eos, suppressed))
        assert torch.equal(scores, before), "the caller's scores were changed"
        if not changes_scores(params, generated, suppressed):
            assert torch.equal(ours, scores)


@pytest.mark.parametrize("vocab", [2, 5, 40, 3000])
def test_temperature_top_k_and_top_p_equal_transformers(vocab: int) -> None:
    rng = random.Random(vocab)
    for _ in range(60):
        scores, token_ids, generated, eos = random_case(rng, vocab)
        params = SamplingParams(
            do_sample=True,
            temperature=rng.choice([0.1, 0.7, 1.0, 1.5, 10.0]),
            top_k=rng.choice([0, 1, 3, 50, 4000]),
            top_p=rng.choice([1.0, 0.95, 0.5, 0.01]),
        )
        ours = scattered(vocab, *warped(scores, params))
        expected = theirs(scores, token_ids, generated, params, eos)
        assert torch.equal(torch.isfinite(ours), torch.isfinite(expected)), params
        torch.testing.assert_close(  # transformers rounds scores far from 0
            torch.softmax(ours, 0), torch.softmax(expected, 0), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("top_p", [0.1, 0.26, 0.49, 0.5, 0.51, 0.75, 0.9, 0.99])
def test_of_equal_tokens_top_p_keeps_as_many_as_transformers(top_p: float) -> None:
    params = SamplingParams(do_sample=True, top_p=top_p)
    for scores in (torch.zeros(4), torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, -3.0]), torch.zeros(1), torch.zeros(1999)):
        _, ours = warped(scores, params)
        expected = theirs(scores, [0], 0, params, [])
        kept = expected[torch.isfinite(expected)]
        assert torch.equal(ours.sort().values, (kept - kept.max()).sort().values)


def test_ties_with_the_kth_token_stay_as_in_transformers() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    params = SamplingParams(do_sample=True, top_k=2)
    ours = scattered(5, *warped(scores, params))
    assert torch.equal(ours, theirs(scores, [0], 0, params, []) - scores.max())
    assert int(torch.isfinite(ours).sum()) == 4


def test_top_p_sees_only_what_top_k_left() -> None:
    scores = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    params = SamplingParams(do_sample=True, top_k=2, top_p=0.55)
    ids, _ = warped(scores, params)  # of the two that are left the first has 4/7 > 0.55
    assert ids.tolist() == [0]


def test_top_p_of_a_flat_distribution_reaches_beyond_its_first_candidates() -> None:
    params = SamplingParams(do_sample=True, top_p=0.9)
    ids, _ = warped(torch.zeros(5000), params)
    assert len(ids) == 4500


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}, {}])
def test_banned_tokens_stay_banned_through_the_filters(params: dict[str, Any]) -> None:
    scores = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.5])
    ids, kept = warped(scores, SamplingParams(do_sample=True, **params))
    assert set(ids[torch.isfinite(kept)].tolist()) <= {1, 3}
    assert 1 in ids.tolist()
