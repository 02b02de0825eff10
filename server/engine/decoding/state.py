"""The state of one output while it is decoded. It survives preemption and is copied into forks. Torch-free.

Owns what has been decided about an output: its tokens, its text, its end. Knows neither blocks nor other rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from server.engine.decoding.detokenizer import Detokenizer
from server.engine.types import FinishReason, TokenLogprob


@dataclass(eq=False)
class DecodingState:
    """Output ``index`` of a request. ``token_ids`` begin with the ``prompt_length`` tokens that the decoder reads.

    The only counters of the sampling noise are ``index`` and ``output_length``. Beams have no ``detokenizer``: only the
    end shows which of them become outputs.
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
        """A copy, as output ``index``, that goes on by itself."""
        return replace(
            self,
            index=index,
            token_ids=list(self.token_ids),
            detokenizer=self.detokenizer.fork() if self.detokenizer else None,
            logprobs=list(self.logprobs),
        )
