"""Beam search with transformers' semantics, one request at a time.

Owns scores and finished hypotheses; the engine owns the rows. The steps follow ``GenerationMixin._beam_search`` of
transformers 5, in float32 as there: the length penalty counts generated tokens, candidates beyond the best
``num_beams`` may run on but not finish, and the three stopping rules are the same. There, a place without a hypothesis
has the score -1e9, so that no hypothesis below it counts. Where too few are left, the search raises InvalidParameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from prefixes.errors import InvalidParameter
from server.engine.decoding.token_rules import TokenRules, no_token_left
from server.engine.types import FinishReason, SamplingParams, length_penalty_limit

_NEVER = np.float32(-1e9)  # of a beam that must not win, and of a place that no hypothesis has taken


@dataclass(frozen=True)
class Continuation:
    """A running beam after a step: which row it extends, and by which token."""

    parent: int
    token_id: int
    score: np.float32


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam: generated tokens (the end token included) and its length-penalised score."""

    token_ids: tuple[int, ...]
    score: np.float32
    finish_reason: FinishReason


@dataclass
class BeamSearch:
    """The state of one request's beam search."""

    params: SamplingParams
    max_new_tokens: int
    rules: TokenRules
    scores: list[np.float32] = field(default_factory=list)  # of the running beams; empty before the first step
    finished: list[Hypothesis] = field(default_factory=list)  # best first
    done: bool = False

    @property
    def candidates(self) -> int:
        """How many of each row's best continuations ``advance`` looks at; fewer if the vocabulary is smaller."""
        return max(2, 1 + len(self.rules.eos)) * self.params.num_beams

    def advance(self, log_probs: torch.Tensor, generated: list[list[int]]) -> list[Continuation]:
        """One step: ``log_probs (rows, vocab)`` float32, processed; ``generated`` are the rows' tokens so far.

        Returns the ``num_beams`` running beams, best first (none once ``done``).
        """
        values, ids = torch.topk(log_probs, min(self.candidates, log_probs.shape[1]))
        return self.choose(values, ids, generated)

    def choose(self, values: torch.Tensor, ids: torch.Tensor, generated: list[list[int]]) -> list[Continuation]:
        """As ``advance``, but given each row's best ``candidates``: log-probabilities, best first, and token ids.

        Returns the ``num_beams`` running beams, best first (none once ``done``). Raises InvalidParameter if the search
        ends with fewer hypotheses than are asked for.
        """
        beams = self.params.num_beams
        length = len(generated[0]) + 1
        started = bool(self.scores)
        if not started:
            # As in transformers, the search begins with equal beams, and all but the first never win. They fill up the
            # beams if the first token is forced.
            self.scores = [np.float32(0.0)] + [_NEVER] * (beams - 1)
            values, ids = values.expand(beams, -1), ids.expand(beams, -1)
            generated = generated * beams
        eos, width = self.rules.eos, values.shape[1]
        total = values.cpu().numpy() + np.array(self.scores, np.float32)[:, None]
        best = np.argsort(-total, axis=None, kind="stable")[: self.candidates]
        tokens = ids.cpu().numpy()
        candidates = [
            Continuation(int(row) if started else 0, int(tokens[row, rank]), total[row, rank])
            for row, rank in zip(best // width, best % width, strict=True)
        ]
        at_limit = length >= self.max_new_tokens
        running = [c for c in candidates if not at_limit and c.token_id not in eos][:beams]
        self._finish(candidates[:beams], generated, length, at_limit)
        self.scores = [c.score for c in running]
        self.done = not running or self._satisfied(length)
        if self.done and len(self.best()) < self.params.num_return_sequences:
            raise self._without_hypotheses(candidates[:beams], length)
        return [] if self.done else running

    def best(self) -> list[Hypothesis]:
        """The ``num_return_sequences`` best finished hypotheses."""
        return self.finished[: self.params.num_return_sequences]

    def _finish(self, top: list[Continuation], generated: list[list[int]], length: int, at_limit: bool) -> None:
        for candidate in top:
            ended = candidate.token_id in self.rules.eos
            score = self._penalised(candidate.score, length)
            if (ended or at_limit) and score >= _NEVER:
                tokens = (*generated[candidate.parent], candidate.token_id)
                natural = ended and not self.rules.cut_short(length, self.max_new_tokens)
                reason = FinishReason.STOP if natural else FinishReason.LENGTH
                self.finished.append(Hypothesis(tokens, score, reason))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: the earlier of equals stays ahead
        del self.finished[self.params.num_beams :]

    def _satisfied(self, length: int) -> bool:
        """Whether no running beam can improve on the finished ones any more, by transformers' heuristic."""
        full = len(self.finished) == self.params.num_beams
        if full and self.params.early_stopping is True:
            return True
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        best_possible = self._penalised(self.scores[0], self.max_new_tokens if longest else length)
        return bool(best_possible <= (self.finished[-1].score if full else _NEVER))

    def _penalised(self, score: np.float32, length: int) -> np.float32:
        """The score of a hypothesis of ``length`` tokens. One that float32 cannot hold is infinitely low."""
        with np.errstate(over="ignore"):
            return np.float32(score / np.float32(float(length) ** self.params.length_penalty))

    def _without_hypotheses(self, last: list[Continuation], length: int) -> InvalidParameter:
        """The error of a search whose best continuations, of ``length`` tokens, score too low to be hypotheses."""
        penalty, worst = self.params.length_penalty, last[-1].score
        if penalty >= 0 or not np.isfinite(worst):
            return no_token_left()
        at_limit = -float(worst) * max(1.0, self.max_new_tokens / length)
        least = -math.log(-float(_NEVER) / at_limit) / math.log(max(2, self.max_new_tokens))
        expected = f"{min(0, math.ceil(100 * least) / 100):g} to {length_penalty_limit(self.max_new_tokens):g}"
        return InvalidParameter(
            f"length_penalty: expected {expected} with max_new_tokens {self.max_new_tokens}, got {penalty!r}: the "
            "outputs' scores fall below -1e9",
            parameter="length_penalty",
            expected=expected,
            got=penalty,
        )
