"""Which tokens an output must have and must not have, as the backbone says: those that begin and end it, those that it
suppresses. At least one must be left. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefixes.errors import InvalidParameter


@dataclass(frozen=True)
class TokenRules:
    """``eos`` tokens end an output. As in transformers, ``first`` is forced behind a decoder prompt of one token, and
    ``last`` where an output reaches its limit, if they are set. ``suppressed`` tokens are never chosen, and
    ``suppressed_first`` not as an output's first, or behind ``first``.
    """

    eos: frozenset[int] = frozenset()
    first: int | None = None
    last: int | None = None
    suppressed: frozenset[int] = frozenset()
    suppressed_first: frozenset[int] = frozenset()

    def forced(self, prompt_length: int, generated: int, max_new_tokens: int) -> int | None:
        """The token that a row with ``generated`` tokens must take next, if any."""
        if self.last is not None and generated == max_new_tokens - 1:
            return self.last
        return self.first if prompt_length + generated == 1 else None

    def banned(self, prompt_length: int, generated: int) -> frozenset[int]:
        """The tokens that a row with ``generated`` tokens must not take next."""
        begins = 1 if prompt_length == 1 and self.first is not None else 0
        return self.suppressed | self.suppressed_first if generated == begins else self.suppressed

    def cut_short(self, generated: int, max_new_tokens: int) -> bool:
        """Whether the limit forced the last of ``generated`` tokens, be it an end token or not."""
        return self.last is not None and generated >= max_new_tokens


def no_token_left() -> InvalidParameter:
    """The error of an output that cannot go on: its request and its backbone forbid every token."""
    return InvalidParameter(
        "no_repeat_ngram_size, min_new_tokens: expected at least one token that may follow, also beside those that the "
        "backbone suppresses, got none",
        parameter="no_repeat_ngram_size",
    )
