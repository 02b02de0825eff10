"""The sampler: each row's choice is its own, and the log-probabilities are of the raw distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from prefixes.errors import InvalidParameter
from server.engine.decoding.sampler import Choice, Chosen, Sampler, best_tokens, raw_logprob
from server.engine.types import SamplingParams

VOCAB, EOS = 50, frozenset({7})


Indexed = tuple[int, Choice]
"""A row of logits, and what is to be chosen from it."""


def choice(index: int, *, seed: int = 0, sample: int = 0, tokens: tuple[int, ...] = (1, 2, 3), generated: int = 1,
           **params: object) -> Indexed:
    return index, Choice(SamplingParams(**params), tokens, generated, seed, sample)  # type: ignore[arg-type]


def choose(sampler: Sampler, logits: torch.Tensor, choices: Sequence[Indexed]) -> list[Chosen | None]:
    """As the engine does; None for a row that is not finite."""
    best = best_tokens(logits)
    found = [(logits[index], one, best[index]) for index, one in choices]
    return [None if greedy is None else sampler.choose(row, one, greedy) for row, one, greedy in found]


def token(chosen: Chosen | None) -> int | None:
    return None if chosen is None else chosen.token_id


def mixed_choices() -> list[Indexed]:
    return [
        choice(0),
        choice(1, do_sample=True, seed=4, temperature=1.3, top_k=20, top_p=0.9),
        choice(2, repetition_penalty=2.0, no_repeat_ngram_size=2, min_new_tokens=9),
        choice(3, do_sample=True, seed=4, logprobs=3),
        choice(3, do_sample=True, seed=4, sample=1, logprobs=3),
        choice(4, logprobs=0),
    ]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def test_a_choice_is_the_same_alone_and_in_any_batch(logits: torch.Tensor) -> None:
    sampler, choices = Sampler(EOS), mixed_choices()
    together = choose(sampler, logits, choices)
    assert choose(sampler, logits.flip(0), [(4 - index, one) for index, one in reversed(choices)]) == together[::-1]
    for (index, one), chosen in zip(choices, together, strict=True):
        assert choose(sampler, logits[index][None], [(0, one)]) == [chosen]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", range(5))
def test_a_row_that_is_not_finite_has_no_token_and_its_neighbours_are_as_without_it(
    logits: torch.Tensor, row: int, value: float
) -> None:
    sampler, choices = Sampler(EOS), mixed_choices()
    clean = choose(sampler, logits, choices)
    spoilt = logits.clone()
    spoilt[row, 13] = value
    for (index, _), before, after in zip(choices, clean, choose(sampler, spoilt, choices), strict=True):
        assert after == before if index != row else after is None


def test_a_row_of_negative_infinities_has_no_token(logits: torch.Tensor) -> None:
    logits[0] = -torch.inf
    assert choose(Sampler(EOS), logits, [choice(0)]) == [None]


def test_greedy_takes_the_maximum_of_the_processed_scores(logits: torch.Tensor) -> None:
    best = int(logits[0].argmax())
    sampler = Sampler(frozenset({best}))
    assert token(choose(sampler, logits, [choice(0)])[0]) == best
    [chosen] = choose(sampler, logits, [choice(0, min_new_tokens=5)])
    second = logits[0].clone()
    second[best] = -torch.inf
    assert token(chosen) == int(second.argmax())


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-45, 5e-324])
def test_a_sample_at_a_tiny_temperature_is_the_greedy_token(logits: torch.Tensor, temperature: float) -> None:
    sampler = Sampler(EOS)
    for seed in range(20):
        choices = [choice(index, do_sample=True, seed=seed, temperature=temperature) for index in range(len(logits))]
        assert [token(chosen) for chosen in choose(sampler, logits, choices)] == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.5, "top_k": 2}])
def test_a_row_that_may_take_no_token_fails_by_the_name_of_what_forbids_them(sampling: dict[str, Any]) -> None:
    """It took token 0, which was banned."""
    banned = choice(0, tokens=(0, 1, 2), no_repeat_ngram_size=1, **sampling)
    with pytest.raises(InvalidParameter, match="no_repeat_ngram_size, min_new_tokens: expected at least one token"):
        choose(Sampler(EOS), torch.zeros(1, 3), [banned])


def test_the_sample_index_and_the_position_draw_anew_and_the_same_counters_draw_the_same(logits: torch.Tensor) -> None:
    flat, sampler = torch.zeros(1, 5000), Sampler(EOS)
    drawn = [
        token(choose(sampler, flat, [choice(0, do_sample=True, seed=seed, sample=sample, generated=generated)])[0])
        for seed, sample, generated in [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[1:])) == 4


def test_sampling_draws_only_what_the_filters_left_and_in_proportion() -> None:
    """Chi-square at the 0.1 % level over the three tokens that top-k leaves."""
    logits, draws = torch.log(torch.tensor([[0.05, 0.4, 0.05, 0.2, 0.3]])), 2000
    sampler, counts = Sampler(EOS), torch.zeros(5)
    for seed in range(draws):
        [chosen] = choose(sampler, logits, [choice(0, do_sample=True, top_k=3, temperature=0.5, seed=seed)])
        assert chosen is not None
        counts[chosen.token_id] += 1
    assert counts[0] == counts[2] == 0
    squares = torch.tensor([0.16, 0.04, 0.09])
    expected = squares / squares.sum() * draws
    assert float(((counts[[1, 3, 4]] - expected) ** 2 / expected).sum()) < 13.82


def test_logprobs_are_those_of_the_raw_distribution_whatever_the_penalties(logits: torch.Tensor) -> None:
    [chosen] = choose(
        Sampler(EOS), logits, [choice(2, do_sample=True, temperature=0.3, repetition_penalty=5.0, top_k=5, logprobs=4)]
    )
    expected = torch.log_softmax(logits[2], 0)
    assert chosen is not None
    assert chosen.logprob is not None
    assert chosen.logprob.token_id == chosen.token_id
    assert chosen.logprob.logprob == pytest.approx(float(expected[chosen.token_id]), abs=1e-6)
    values, ids = expected.topk(4)
    assert [token for token, _ in chosen.logprob.top] == ids.tolist()
    assert [value for _, value in chosen.logprob.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_no_more_alternatives_than_tokens() -> None:
    assert len(raw_logprob(torch.zeros(3), 1, 20).top) == 3
    assert raw_logprob(torch.zeros(3), 1, 0).top == ()
