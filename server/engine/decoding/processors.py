"""Changes to one row's scores before a token is chosen, with transformers' meanings and in its order.

Owns penalties, bans and the filters of sampling; knows no rows beyond the tokens it is given. Scores are float32,
``(vocab,)``. ``processed`` equals transformers' processors on the same scores; ``warped`` keeps the same tokens with
the same probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.types import SamplingParams

_CANDIDATES = 1024  # top-p looks at this many of the best tokens first, and sorts the whole vocabulary only if it must


def changes_scores(params: SamplingParams, generated: int, banned: frozenset[int]) -> bool:
    """Whether ``processed`` changes anything for a row with ``generated`` tokens of output."""
    return (
        bool(banned)
        or params.repetition_penalty != 1.0
        or params.no_repeat_ngram_size > 0
        or generated < params.min_new_tokens
    )


def processed(
    scores: torch.Tensor,
    token_ids: Sequence[int],
    generated: int,
    params: SamplingParams,
    eos_token_ids: frozenset[int],
    suppressed: frozenset[int],
) -> torch.Tensor:
    """The scores after penalties and bans, which see ``token_ids``, without ``suppressed``.

    ``scores`` is not changed.
    """
    scores = scores.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(token_ids)), dtype=torch.long, device=scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
    banned = set(suppressed)
    if params.no_repeat_ngram_size:
        banned |= _banned_by_ngrams(token_ids, params.no_repeat_ngram_size)
    if generated < params.min_new_tokens:
        banned |= eos_token_ids
    if banned:
        scores[torch.tensor(sorted(banned), dtype=torch.long, device=scores.device)] = -torch.inf
    return scores


def _banned_by_ngrams(token_ids: Sequence[int], size: int) -> set[int]:
    """Tokens that would complete an n-gram of ``size`` that the row already has."""
    if len(token_ids) + 1 < size:
        return set()
    tail = tuple(token_ids[len(token_ids) - size + 1 :])
    return {
        token_ids[end]
        for end in range(size - 1, len(token_ids))
        if tuple(token_ids[end - size + 1 : end]) == tail
    }


def warped(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Temperature, then top-k, then top-p: the tokens that may be drawn, and their unnormalised log-probabilities.

    Returns ``(token_ids, scores)``, in no particular order; the greatest score is 0. One of the given scores must be
    finite. Top-p keeps the smallest set of the most likely tokens whose probability reaches ``top_p``, at least one.
    """
    below_best = scores.double() - scores.max()
    scores = (below_best / params.temperature).float()  # no temperature is too small: the best token's score stays 0
    vocab = scores.shape[0]
    if params.top_k and params.top_k < vocab:
        threshold = torch.topk(scores, params.top_k).values[-1]
        ids = torch.nonzero(scores >= threshold).flatten()  # ties with the k-th stay, as in transformers
        scores = scores[ids]
    else:
        ids = torch.arange(vocab, device=scores.device)
    if params.top_p < 1.0:
        chosen = _top_p(scores, params.top_p)
        ids, scores = ids[chosen], scores[chosen]
    return ids, scores


def _top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Indices of the tokens that stay: all more likely tokens together stay below ``top_p``. The best always stays."""
    probabilities = torch.softmax(scores, dim=0)
    for count in (_CANDIDATES, scores.shape[0]):
        best = torch.topk(probabilities, min(count, scores.shape[0]))
        above = best.values.cumsum(0) - best.values  # probability of all more likely tokens
        stays = above < top_p
        stays[0] = True
        if count >= scores.shape[0] or not bool(stays[-1]):
            break
    return best.indices[stays]
