"""Beam search with transformers' semantics, one request at a time.

Owns scores and finished hypotheses; the engine owns the rows. The steps follow ``GenerationMixin._beam_search`` of
transformers 5, in float32 as there: the length penalty counts generated tokens, candidates beyond the best
``num_beams`` may run on but not finish, and the three stopping rules are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from server.engine.decoding.token_rules import TokenRules
from server.engine.types import FinishReason, SamplingParams

_NEVER = np.float32(-1e9)


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

        Returns the ``num_beams`` running beams, best first (none once ``done``).
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
        return [] if self.done else running

    def best(self) -> list[Hypothesis]:
        """The ``num_return_sequences`` best finished hypotheses."""
        return self.finished[: self.params.num_return_sequences]

    def _finish(self, top: list[Continuation], generated: list[list[int]], length: int, at_limit: bool) -> None:
        penalty = np.float32(length**self.params.length_penalty)
        for candidate in top:
            ended = candidate.token_id in self.rules.eos
            if ended or at_limit:
                tokens = (*generated[candidate.parent], candidate.token_id)
                natural = ended and not self.rules.cut_short(length, self.max_new_tokens)
                reason = FinishReason.STOP if natural else FinishReason.LENGTH
                self.finished.append(Hypothesis(tokens, np.float32(candidate.score / penalty), reason))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: the earlier of equals stays ahead
        del self.finished[self.params.num_beams :]

    def _satisfied(self, length: int) -> bool:
        """Whether no running beam can improve on the finished ones any more, by transformers' heuristic."""
        if len(self.finished) < self.params.num_beams:
            return False
        if self.params.early_stopping is True:
            return True
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        reach = self.max_new_tokens if longest else length
        best_possible = self.scores[0] / np.float32(reach**self.params.length_penalty)
        return bool(best_possible <= self.finished[-1].score)
