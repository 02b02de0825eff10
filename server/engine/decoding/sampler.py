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
from server.engine.decoding.token_rules import no_token_left
from server.engine.types import SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Choice:
    """A token to choose, for a row with these tokens and counters."""

    params: SamplingParams
    token_ids: Sequence[int]
    generated: int
    seed: int
    sample: int
    forced: int | None = None  # the token it must be
    banned: frozenset[int] = frozenset()  # tokens it must not be


@dataclass(frozen=True)
class Chosen:
    """The token, and its log-probabilities where they were asked for."""

    token_id: int
    logprob: TokenLogprob | None = None


def best_tokens(logits: torch.Tensor) -> list[int | None]:
    """Return the likeliest token of each row of ``logits (n, vocab)``, None for a row that is not finite.

    One pass over all rows finds both: NaN wins a maximum, so that a row with any has it there.
    """
    if logits.device.type == "cpu":  # numpy's is one quick pass; torch shares even a few rows out to its threads
        array = logits.numpy()
        tokens = array.argmax(axis=1)
        finite = np.isfinite(array[np.arange(len(tokens)), tokens]).tolist()
    else:
        best, tokens = logits.max(dim=1)
        finite = torch.isfinite(best).tolist()
    return [token if usable else None for token, usable in zip(tokens.tolist(), finite, strict=True)]


class Sampler:
    """Next tokens from float32 logits."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids

    def choose(self, logits: torch.Tensor, choice: Choice, greedy: int) -> Chosen:
        """Choose from one row's finite ``logits (vocab,)``, whose likeliest token is ``greedy``.

        Raises InvalidParameter if parameters and backbone leave the row no token.
        """
        params, token = choice.params, greedy
        changed = changes_scores(params, choice.generated, choice.banned)
        if choice.forced is not None:
            if choice.forced in choice.banned:
                raise no_token_left()
            token = choice.forced
        elif changed or params.do_sample:
            scores = self._processed(logits, choice) if changed else logits
            token = self._draw(scores, choice) if params.do_sample else int(scores.argmax())
        return Chosen(token, raw_logprob(logits, token, params.logprobs) if params.logprobs is not None else None)

    def _processed(self, logits: torch.Tensor, choice: Choice) -> torch.Tensor:
        scores = processed(logits, choice.token_ids, choice.generated, choice.params, self._eos, choice.banned)
        if bool(scores.max() == -torch.inf):
            raise no_token_left()
        return scores

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
