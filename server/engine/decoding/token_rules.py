"""Which tokens an output must have: the backbone's own that begin and end it, and at least one. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from prefixes.errors import InvalidParameter


@dataclass(frozen=True)
class TokenRules:
    """``eos`` tokens end an output. As in transformers, ``first`` is forced behind a decoder prompt of one token, and
    ``last`` where an output reaches its limit, if they are set.
    """

    eos: frozenset[int] = frozenset()
    first: int | None = None
    last: int | None = None

    def forced(self, prompt_length: int, generated: int, max_new_tokens: int) -> int | None:
        """The token that a row with ``generated`` tokens must take next, if any."""
        if self.last is not None and generated == max_new_tokens - 1:
            return self.last
        return self.first if prompt_length + generated == 1 else None

    def cut_short(self, generated: int, max_new_tokens: int) -> bool:
        """Whether the limit forced the last of ``generated`` tokens, be it an end token or not."""
        return self.last is not None and generated >= max_new_tokens


def no_token_left() -> InvalidParameter:
    """The error of an output that cannot go on: its request's parameters forbid every token."""
    return InvalidParameter(
        "no_repeat_ngram_size, min_new_tokens: expected at least one token that may follow, got none",
        parameter="no_repeat_ngram_size",
    )
