"""Beam search against transformers' own, without an engine: a tiny model whose end tokens are likely."""

from __future__ import annotations

import itertools
import random
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefixes.errors import InvalidParameter
from server.engine.decoding.beams import BeamSearch, Hypothesis
from server.engine.decoding.token_rules import TokenRules
from server.engine.types import FinishReason, SamplingParams, length_penalty_limit

VOCAB, END = 16, frozenset({0, 5, 9, 12})
Rule = bool | Literal["never"]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=8, n_layer=1, n_head=2, initializer_range=0.6,
                        bos_token_id=0, eos_token_id=sorted(END))
    return GPT2LMHeadModel(config).double().eval()


@torch.inference_mode()
def ours(model: GPT2LMHeadModel, prompt: list[int], params: SamplingParams
         ) -> tuple[list[tuple[int, ...]], list[float]]:
    """The search driven by plain forward passes over whole rows."""
    search = BeamSearch(params, params.max_new_tokens, TokenRules(END))
    rows: list[list[int]] = [[]]
    for _ in range(params.max_new_tokens):
        logits = model(torch.tensor([[*prompt, *row] for row in rows])).logits[:, -1].float()
        running = search.advance(torch.log_softmax(logits, dim=1), rows)
        if search.done:
            break
        rows = [[*rows[beam.parent], beam.token_id] for beam in running]
    assert search.done
    best = search.best()
    assert all((found.finish_reason is FinishReason.STOP) == (found.token_ids[-1] in END) for found in best)
    return [found.token_ids for found in best], [float(found.score) for found in best]


@torch.inference_mode()
def theirs(model: GPT2LMHeadModel, prompt: list[int], params: SamplingParams
           ) -> tuple[list[tuple[int, ...]], list[float]]:
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        num_beams=params.num_beams, num_return_sequences=params.num_return_sequences, pad_token_id=0,
        max_new_tokens=params.max_new_tokens, length_penalty=params.length_penalty,
        early_stopping=params.early_stopping, output_scores=True, return_dict_in_generate=True,
    )
    found = []
    for tokens in out.sequences[:, len(prompt) :].tolist():
        end = next((index for index, token in enumerate(tokens) if token in END), len(tokens) - 1)
        found.append(tuple(tokens[: end + 1]))
    return found, out.sequences_scores.tolist()


@pytest.mark.parametrize("rule", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.5, -0.4, 0.0, 1.0, 2.5])
def test_hypotheses_and_scores_equal_transformers(model: GPT2LMHeadModel, rule: Rule, penalty: float) -> None:
    rng = random.Random(f"{rule} {penalty}")
    for beams, limit in itertools.product([2, 4], [1, 4, 14]):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 4]))]
        params = SamplingParams(num_beams=beams, num_return_sequences=beams, max_new_tokens=limit,
                                length_penalty=penalty, early_stopping=rule)
        tokens, scores = ours(model, prompt, params)
        expected, expected_scores = theirs(model, prompt, params)
        assert tokens == expected, params
        assert scores == pytest.approx(expected_scores, rel=1e-5)


@pytest.mark.parametrize("rule", [False, True, "never"])
@pytest.mark.parametrize("share", [-1.0, -0.5, -0.25, -0.15, 0.5, 1.0])
def test_extreme_penalties_have_transformers_scores_to_the_bit_or_are_refused(
    model: GPT2LMHeadModel, rule: Rule, share: float
) -> None:
    """``share`` is of the accepted range. Above 21 at 64 tokens the scores were equal, below -21 infinite."""
    rng = random.Random(f"{rule} {share}")
    for beams, limit, asked in itertools.product([2, 4], [3, 14], [1, 2]):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 4]))]
        params = SamplingParams(num_beams=beams, num_return_sequences=asked, max_new_tokens=limit,
                                length_penalty=share * length_penalty_limit(limit), early_stopping=rule)
        expected, expected_scores = theirs(model, prompt, params)
        try:
            tokens, scores = ours(model, prompt, params)
        except InvalidParameter as error:
            assert error.detail["parameter"] == "length_penalty"
            assert f"with max_new_tokens {limit}, got" in error.message
            assert min(expected_scores) <= -1e9, "transformers has a hypothesis"
        else:
            assert tokens == expected, params
            assert scores == expected_scores, "not the same bits"


def test_the_range_that_a_refusal_names_is_accepted() -> None:
    """No beam ends before the limit, where -1e9 is what transformers gives a place without a hypothesis."""
    likely = {1: -20.0, 2: -21.0, 3: -22.0}

    def run(penalty: float) -> BeamSearch:
        search = searching("never", penalty, limit=10)
        rows: list[list[int]] = [[]]
        while not search.done:
            running = search.advance(table(*[likely] * len(rows)), rows)
            rows = [[*rows[beam.parent], beam.token_id] for beam in running]
        return search

    refusal = r"expected -6.69 to 37.92 with max_new_tokens 10, got -12"
    with pytest.raises(InvalidParameter, match=refusal) as caught:
        run(-12.0)
    least = float(str(caught.value.detail["expected"]).split()[0])
    assert run(least).best()[0].score > -1e9
    with pytest.raises(InvalidParameter, match="length_penalty"):
        run(least - 0.5)


def test_beams_that_may_take_no_token_fail_by_the_name_of_what_forbids_them() -> None:
    """Their score was minus infinity, which no JSON can carry."""
    search = searching(False, 1.0)
    with pytest.raises(InvalidParameter, match="no_repeat_ngram_size, min_new_tokens: expected at least one token"):
        search.advance(torch.full((1, 8), -torch.inf), [[]])


def searching(rule: Rule, penalty: float, beams: int = 2, limit: int = 10) -> BeamSearch:
    return BeamSearch(
        SamplingParams(num_beams=beams, max_new_tokens=limit, length_penalty=penalty, early_stopping=rule), limit,
        TokenRules(frozenset({0})),
    )


def table(*rows: dict[int, float]) -> torch.Tensor:
    """Log-probabilities of a few tokens; the others' are far below."""
    scores = torch.full((len(rows), 8), -100.0)
    for index, row in enumerate(rows):
        for token, value in row.items():
            scores[index, token] = value
    return scores


def test_an_end_token_below_the_best_beams_is_no_hypothesis() -> None:
    search = searching(False, 1.0)
    running = search.advance(table({1: -1.0, 2: -2.0, 0: -3.0}), [[]])
    assert [(beam.token_id, float(beam.score)) for beam in running] == [(1, -1.0), (2, -2.0)]
    assert search.finished == []


def test_spares_run_on_where_end_tokens_took_the_best_places() -> None:
    search = searching(False, 1.0)
    assert [beam.token_id for beam in search.advance(table({0: -1.0, 2: -2.0, 3: -3.0}), [[]])] == [2, 3]
    assert [found.token_ids for found in search.finished] == [(0,)]


def test_a_beam_may_take_over_both_rows() -> None:
    search = searching(False, 1.0)
    search.advance(table({1: -1.0, 2: -2.0}), [[]])
    running = search.advance(table({3: -1.0, 4: -1.5}, {3: -9.0}), [[1], [2]])
    assert [(beam.parent, beam.token_id) for beam in running] == [(0, 3), (0, 4)]


@pytest.mark.parametrize(("rule", "penalty", "best", "done"), [
    (True, 1.0, -1.0, True),  # as many hypotheses as beams: enough
    (False, 1.0, -10.0, False),  # -10 / 5 is better than the worse hypothesis, -2.5
    (False, 1.0, -13.0, True),
    ("never", 1.0, -13.0, False),  # at the limit it would be -13 / 10
    ("never", 1.0, -26.0, True),
    ("never", -1.0, -0.4, False),  # a negative penalty counts the length now: -0.4 * 5, not -0.4 * 10
    ("never", -1.0, -0.6, True),
    (False, -1.0, -0.4, False),
    ("never", 0.0, -2.4, False),
    ("never", 0.0, -2.5, True),
])
def test_the_search_ends_when_no_running_beam_can_do_better(
    rule: Rule, penalty: float, best: float, done: bool
) -> None:
    search = searching(rule, penalty)
    search.finished = [
        Hypothesis((1, 0), np.float32(-1.0), FinishReason.STOP), Hypothesis((2, 0), np.float32(-2.5), FinishReason.STOP)
    ]
    search.scores = [np.float32(best), np.float32(best - 0.5)]
    running = search.advance(table({3: 0.0}, {3: 0.0}), [[1] * 4, [2] * 4])  # the fifth token, of ten
    assert search.done is done
    assert [float(beam.score) for beam in running] == ([] if done else pytest.approx([best, best - 0.5]))
