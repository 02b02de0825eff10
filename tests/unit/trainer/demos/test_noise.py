"""BART's noise: how much it hides, in what spans, and that what it leaves stands in its order."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from trainer.demos.pretrain.noise import infill, permute_sentences, sentences

MASK = -1


def hidden_spans(ids: list[int], corrupted: list[int]) -> list[int]:
    """The length of the span behind every mask, for ids that are 0, 1, 2, …"""
    kept = [-1, *(token for token in corrupted if token != MASK), len(ids)]
    assert kept == sorted(kept), "kept tokens stand in their order"
    spans, last = [], -1
    for index, token in enumerate([*corrupted, len(ids)]):
        if token == MASK:
            assert corrupted[index - 1 : index] != [MASK], "no two masks touch"
            continue
        if index and corrupted[index - 1] == MASK:
            spans.append(token - last - 1)
        else:
            assert token == last + 1, "nothing is hidden without a mask"
        last = token
    return spans


def test_thirty_percent_are_hidden_in_spans_of_poisson_lengths_with_a_mask_each() -> None:
    rng, ids = random.Random(0), list(range(1000))
    spans = [length for _ in range(100) for length in hidden_spans(ids, infill(ids, MASK, rng))]
    assert sum(spans) == 100 * 300
    assert sum(spans) / len(spans) == pytest.approx(3.0, abs=0.1)
    shares = Counter(spans)
    for length, expected in enumerate((0.050, 0.149, 0.224, 0.224, 0.168)):  # Poisson(3)
        assert shares[length] / len(spans) == pytest.approx(expected, abs=0.015), f"spans of length {length}"


def test_every_position_but_the_outermost_is_hidden_as_often_as_another() -> None:
    """A span over the first token can only begin there: the ends are hidden less, as in the published code."""
    rng, ids, rounds = random.Random(0), list(range(60)), 4000
    kept = Counter(token for _ in range(rounds) for token in infill(ids, MASK, rng) if token != MASK)
    for token in ids[6:-6]:
        assert kept[token] / rounds == pytest.approx(0.7, abs=0.05), f"token {token}"


@pytest.mark.parametrize("length", range(12))
def test_short_documents_are_noised_too(length: int) -> None:
    rng, ids = random.Random(0), list(range(length))
    for _ in range(200):
        corrupted = infill(ids, MASK, rng)
        assert sum(hidden_spans(ids, corrupted)) == round(0.3 * length)
    assert ids == list(range(length)), "the target is untouched"


def test_the_same_seed_gives_the_same_noise() -> None:
    ids = list(range(50))
    assert infill(ids, MASK, random.Random("1/0")) == infill(ids, MASK, random.Random("1/0"))
    assert infill(ids, MASK, random.Random("1/0")) != infill(ids, MASK, random.Random("1/1"))


def test_permutation_keeps_every_sentence_and_changes_their_order() -> None:
    text = 'We show A. It costs £0.5 (Li et al. 2021)! Is it fast? £20 is less. "Yes" it is.'
    parts = ["We show A.", "It costs £0.5 (Li et al. 2021)!", "Is it fast?", "£20 is less.", '"Yes" it is.']
    assert sentences(text) == parts
    rng = random.Random(0)
    orders = {permute_sentences(text, rng) for _ in range(50)}
    assert len(orders) > 10
    assert all(sorted(sentences(order)) == sorted(parts) for order in orders)
    assert permute_sentences("One sentence.", rng) == "One sentence."
