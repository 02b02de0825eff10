"""The state of one output while it is decoded. It survives preemption and goes along into forks. Torch-free.

Owns what has been decided about an output: its tokens, its text, its end. Knows neither blocks nor other rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from server.engine.decoding.detokenizer import Detokenizer
from server.engine.types import FinishReason, TokenLogprob


@dataclass(eq=False)
class DecodingState:
    """Output ``index`` of a request. ``token_ids`` begin with the ``prompt_length`` tokens that the decoder reads.

    The noise of sampling is drawn by ``index`` and ``output_length``: they are its only counters. Beams have no
    ``detokenizer``: which of them becomes an output is known at the end.
    """

    index: int
    token_ids: list[int]
    prompt_length: int
    detokenizer: Detokenizer | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def output_ids(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.token_ids[self.prompt_length :]

    @property
    def output_length(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def active(self) -> bool:
        return self.finish_reason is None

    def fork(self, index: int) -> DecodingState:
        """The same state as output ``index``; the two go on apart."""
        return replace(
            self,
            index=index,
            token_ids=list(self.token_ids),
            detokenizer=self.detokenizer.fork() if self.detokenizer else None,
            logprobs=list(self.logprobs),
        )
