"""Chooses each row's next token: greedy or sampled, with log-probabilities if asked for.

Owns the choice for rows without beams; knows no scheduling. A row's choice depends only on its own logits, tokens and
counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.decoding.noise import gumbel
from server.engine.decoding.processors import changes_scores, processed, warped
from server.engine.types import SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Choice:
    """A token to choose: from logits row ``logits_index``, for a row with these tokens and counters."""

    logits_index: int
    params: SamplingParams
    token_ids: Sequence[int]
    generated: int
    seed: int
    sample: int
    forced: int | None = None  # the token it must be


@dataclass(frozen=True)
class Chosen:
    """The token; None if the row's logits are not finite (its neighbours are not affected)."""

    token_id: int | None
    logprob: TokenLogprob | None = None


def best_tokens(logits: torch.Tensor) -> tuple[list[bool], list[int]]:
    """Whether each row is finite, and its most likely token. NaN wins a maximum, so the maximum tells of any NaN."""
    if logits.device.type == "cpu":  # numpy makes one quick pass; torch shares even a few rows out to its threads
        array = logits.numpy()
        tokens = array.argmax(axis=1)
        return np.isfinite(array[np.arange(len(tokens)), tokens]).tolist(), tokens.tolist()
    best, indices = logits.max(dim=1)
    return torch.isfinite(best).tolist(), indices.tolist()


class Sampler:
    """Next tokens from float32 logits."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids

    def choose(self, logits: torch.Tensor, choices: Sequence[Choice]) -> list[Chosen]:
        """``logits (n, vocab)`` -> one token for each choice. Plain greedy rows share one argmax."""
        finite, greedy = best_tokens(logits)
        return [
            self._one(logits[choice.logits_index], choice, greedy[choice.logits_index])
            if finite[choice.logits_index]
            else Chosen(None)
            for choice in choices
        ]

    def _one(self, logits: torch.Tensor, choice: Choice, greedy: int) -> Chosen:
        params, token = choice.params, greedy
        if choice.forced is not None:
            token = choice.forced
            return Chosen(token, raw_logprob(logits, token, params.logprobs) if params.logprobs is not None else None)
        changed = changes_scores(params, choice.generated)
        if changed or params.do_sample:
            scores = processed(logits, choice.token_ids, choice.generated, params, self._eos) if changed else logits
            token = self._draw(scores, choice) if params.do_sample else int(scores.argmax())
        return Chosen(token, raw_logprob(logits, token, params.logprobs) if params.logprobs is not None else None)

    def _draw(self, scores: torch.Tensor, choice: Choice) -> int:
        ids, scores = warped(scores, choice.params)
        noise = gumbel(choice.seed, choice.sample, choice.generated, ids)
        return int(ids[(scores.double() + noise).argmax()])


def raw_logprob(logits: torch.Tensor, token_id: int, alternatives: int) -> TokenLogprob:
    """The token's log-probability under the raw distribution, and the best ``alternatives``."""
    log_probs = torch.log_softmax(logits, dim=0)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        values, ids = torch.topk(log_probs, min(alternatives, log_probs.shape[0]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(log_probs[token_id]), top)
